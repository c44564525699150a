"""The same translations by `generate` of Hugging Face's Transformers."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from jaxformer.errors import UserError
from jaxformer.interop.marian import to_marian
from train.benchmark.peaks import process_peak
from train.benchmark.turns import Translate


def transformers_peak() -> int:
    """Most bytes in use, on a GPU since the process began."""
    import torch

    on_gpu = torch.cuda.is_available()
    return torch.cuda.max_memory_allocated() if on_gpu else process_peak()


def transformers_candidates(
    run: str,
    kind: str,
    scratch: str,
    *,
    beam_size: int,
    length_penalty: float,
    batches: Sequence[int],
    fixed: int | None,
) -> Iterator[Translate]:
    """Return a translation function for each batch size, on a GPU if there is one.

    Args:
      run: directory of the model.
      kind: the compute type: float32, bfloat16 or float16.
      scratch: a folder for the model.
      beam_size, length_penalty: of the search; the penalty is length^alpha.
      batches: numbers of sentences translated at once; any may be the fastest.
      fixed: tokens of every translation, if all are to have the same length.

    Raises:
      UserError: PyTorch is not installed, or Transformers has no such type or model.
    """
    try:
        import torch
        from transformers import MarianMTModel, MarianTokenizer
    except ImportError as error:
        raise UserError('Transformers lacks PyTorch: pip install -e ".[parity]"') from error
    if kind not in ("float32", "bfloat16", "float16"):
        raise UserError(
            f"Transformers does not compute in {kind}: give float32, bfloat16 or float16"
        )
    folder = f"{scratch}/transformers-{kind}"
    to_marian(run, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = MarianTokenizer.from_pretrained(folder)
    model: Any = MarianMTModel.from_pretrained(folder, dtype=getattr(torch, kind))
    model = model.eval().to(device)
    model.generation_config.max_length = None  # the model's own; here each batch has one
    if fixed is not None:  # otherwise the last token would be eos
        model.generation_config.forced_eos_token_id = None

    def translate(batch: int, lines: Sequence[str]) -> list[str]:
        encoded = tokenizer(list(lines))["input_ids"]
        sizes = list(map(len, encoded))
        order = sorted(range(len(lines)), key=lambda index: -sizes[index])
        translations = [""] * len(lines)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = tokenizer.pad(
                {"input_ids": [encoded[index] for index in chosen]}, return_tensors="pt"
            )
            found = model.generate(
                **inputs.to(device),
                num_beams=beam_size,
                do_sample=False,
                length_penalty=length_penalty,
                early_stopping=beam_size > 1,
                max_new_tokens=fixed or sizes[chosen[0]] + 50,
                min_new_tokens=fixed,
            )
            texts = tokenizer.batch_decode(found, skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                translations[index] = text
        return translations

    return iter([partial(translate, batch) for batch in batches])
