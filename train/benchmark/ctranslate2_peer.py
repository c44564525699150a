"""The same translations by CTranslate2."""

from collections.abc import Iterator, Sequence
from functools import partial

from jaxformer.errors import UserError
from jaxformer.interop.ctranslate2 import to_ctranslate2
from jaxformer.run_directory import load_tokenizers
from train.benchmark.peaks import process_peak
from train.benchmark.turns import Translate
from train.machine import cores


def ctranslate2_peak() -> int | None:
    """Most bytes in use; it does not tell those of a GPU."""
    import ctranslate2

    return None if ctranslate2.get_cuda_device_count() else process_peak()


def ctranslate2_candidates(
    run: str,
    kind: str,
    scratch: str,
    *,
    beam_size: int,
    length_penalty: float,
    batches: Sequence[int],
    fixed: int | None,
) -> Iterator[Translate]:
    """Return a translation function for each setting that may be the fastest.

    On two cores, two workers with one thread each were three times as fast in int8 as one worker
    with two.

    Args:
      run: directory of the model.
      kind: the compute type, such as float32 or int8.
      scratch: a folder for the model.
      beam_size, length_penalty: of the search; the penalty is length^alpha.
      batches: numbers of sentences translated at once.
      fixed: tokens of every translation, if all are to have the same length.

    Raises:
      UserError: CTranslate2 has no such type here, or cannot express the model.
    """
    import ctranslate2

    on_gpu = ctranslate2.get_cuda_device_count() > 0
    supported = sorted(ctranslate2.get_supported_compute_types("cuda" if on_gpu else "cpu"))
    if kind not in supported:
        raise UserError(f"CTranslate2 does not compute in {kind} here: give {', '.join(supported)}")
    folder = f"{scratch}/ctranslate2-{kind}"
    to_ctranslate2(run, folder, quantization=None if kind == "float32" else kind)
    source, target = load_tokenizers(run)
    ids = {piece: index for index, piece in enumerate(target.vocabulary)}

    def translate(engine: ctranslate2.Translator, batch: int, lines: Sequence[str]) -> list[str]:
        sentences = [source.pieces(sentence) for sentence in source.encode_batch(lines)]
        # Ours end 50 tokens after each sentence's length; CTranslate2 has one limit for all.
        lengths = {"max_decoding_length": max(map(len, sentences)) + 1 + 50}
        if fixed is not None:
            lengths = {"max_decoding_length": fixed, "min_decoding_length": fixed}
        results = engine.translate_batch(
            sentences,
            beam_size=beam_size,
            length_penalty=length_penalty,
            max_batch_size=batch,
            **lengths,
        )
        return [target.decode(map(ids.__getitem__, result.hypotheses[0])) for result in results]

    threads = cores()
    workers = min(threads, max(batches))

    def candidates() -> Iterator[Translate]:
        for inter_threads, intra_threads in ((1, threads), (workers, 1)):
            engine = ctranslate2.Translator(
                folder,
                "auto",
                compute_type=kind,
                inter_threads=inter_threads,
                intra_threads=intra_threads,
            )
            for batch in batches:
                yield partial(translate, engine, batch)

    return candidates()
