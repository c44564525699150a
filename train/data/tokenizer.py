"""Learning the vocabulary: sentencepiece on the training split, and on nothing else."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from jaxformer.errors import UserError
from jaxformer.run import SOURCE_TOKENIZER_FILE, TARGET_TOKENIZER_FILE, TOKENIZER_FILE
from jaxformer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import datasets

# More sentences hardly change the pieces, but training on them takes memory and hours.
_MAX_SENTENCES = 2_000_000


def learn_tokenizers(
    dataset: "datasets.Dataset",
    run: str | Path,
    *,
    vocab_size: int,
    joint: bool,
    model_type: Literal["bpe", "unigram"] = "bpe",
    character_coverage: float = 1.0,
) -> tuple[Tokenizer, Tokenizer]:
    """Learn, write into the directory `run`, and return the source and the target tokenizer.

    Args:
      dataset: the training pairs, with the columns "source" and "target".
      run: the run directory; made if it is not there.
      vocab_size: pieces of each vocabulary, the four special ones included.
      joint: one vocabulary of both languages, returned twice (§5.1), instead of one of each.
      model_type: byte-pair encoding, or sentencepiece's unigram language model.
      character_coverage: share of the corpus whose characters become pieces; the rarest others
        become unk.

    Raises:
      UserError: `vocab_size` is more or less than this corpus allows; the message says how many.
    """
    files = (
        {TOKENIZER_FILE: ("source", "target")}
        if joint
        else {SOURCE_TOKENIZER_FILE: ("source",), TARGET_TOKENIZER_FILE: ("target",)}
    )
    tokenizers = [
        _learn(dataset, columns, vocab_size, model_type, character_coverage)
        for columns in files.values()
    ]
    for file, tokenizer in zip(files, tokenizers, strict=True):
        path = Path(run) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(tokenizer.model)
        os.replace(partial, path)
    return tokenizers[0], tokenizers[-1]


def _learn(
    dataset: "datasets.Dataset",
    columns: tuple[str, ...],
    vocab_size: int,
    model_type: str,
    character_coverage: float,
) -> Tokenizer:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(dataset, columns),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            byte_fallback=False,
            minloglevel=2,  # errors only, and those are raised
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size, " and ".join(columns))) from error
    return Tokenizer(model.getvalue())


def _sentences(dataset: "datasets.Dataset", columns: tuple[str, ...]) -> Iterator[str]:
    """Yield the sentences of `columns`, or every n-th pair's where there are very many."""
    every = -(-len(dataset) * len(columns) // _MAX_SENTENCES)
    chosen = dataset.select(range(0, len(dataset), every))
    for batch in cast("Iterator[dict[str, list[str]]]", chosen.iter(10_000)):
        for column in columns:
            yield from batch[column]


def _explain(error: str, vocab_size: int, side: str) -> str:
    if match := re.search(r"too high .* value <= (\d+)", error):
        limit = f"more than the {side} text can fill; the largest possible is {match[1]}"
    elif match := re.search(r"smaller than required_chars. \d+ vs (\d+)", error):
        limit = f"too few for its characters alone; the {side} text needs at least {match[1]}"
    else:
        return f"sentencepiece cannot learn {vocab_size} pieces from the {side} text: {error}"
    return f"model.vocab_size={vocab_size} is {limit}"
