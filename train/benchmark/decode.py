"""How fast a model translates, beside another engine with the same weights.

    python -m train benchmark decode runs/multi30k --source test.en --beam-size 5 --peer ctranslate2
    python -m train benchmark decode base --vocab-size 32000 --length 25 --peer ctranslate2

Strings in, strings out, on both sides. The engines take turns, so that other work of the machine
disturbs them alike, and their ratio compares neighbouring rounds. Loading, compiling and one round
of warm-up are left out.
"""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer.checkpoints import save_params
from jaxformer.config import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    PRESETS,
    UNK_ID,
    Precision,
    TransformerConfig,
)
from jaxformer.errors import UserError
from jaxformer.files import check_writable
from jaxformer.generation_config import GenerationConfig
from jaxformer.run_directory import save_tokenizers, write_config
from jaxformer.tokenizer import Tokenizer
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from train.benchmark.compiles import count_compiles
from train.benchmark.peaks import separate_devices
from train.benchmark.processes import in_a_process
from train.benchmark.turns import Translate, summary
from train.data.files import read_lines
from train.machine import describe_machine, engine_version

Engine = Callable[[Sequence[str]], tuple[list[str], float]]  # translations and seconds


@dataclasses.dataclass(frozen=True)
class DecodeBenchmark:
    """What is measured.

    Attributes:
      run: a run directory, or the name of a preset: its parameters are then random, and so are
        the sentences.
      source: text file with the sentences; needed with a run directory.
      sentences: how many, at most; 0 is all of the file.
      vocab_size: of a preset.
      length: tokens of random sentences and of their translations.
      beam_size, length_penalty: as for `Translator.generate`; the penalty is length^alpha, and a
        sentence ends with its K-th finished hypothesis, for both engines.
      batch_tokens: source positions we translate at once; by default as in `Generator.generate`.
      dtypes: our precisions.
      one_by_one: translate each sentence alone, and report milliseconds a sentence.
      peer: "ctranslate2", "transformers" or None.
      peer_types: its compute types, such as float32 and int8.
      peer_batches: sentences it translates at once; the fastest is found as it warms up, for
        CTranslate2 also whether one worker on all cores or one worker per core is faster.
      rounds: measurements of each engine.
      profile: folder for a trace of one more round of our first, for TensorBoard or Perfetto.
    """

    run: str
    source: str | None = None
    sentences: int = 0
    vocab_size: int = 32_000
    length: int = 25
    beam_size: int = 4
    length_penalty: float = 1.0
    batch_tokens: int | None = None
    dtypes: tuple[Precision, ...] = ("float32",)
    one_by_one: bool = False
    peer: str | None = None
    peer_types: tuple[str, ...] = ("float32",)
    peer_batches: tuple[int, ...] = (32, 128)
    rounds: int = 5
    profile: str | None = None


def benchmark_decode(settings: DecodeBenchmark) -> Iterator[dict[str, Any]]:
    """Measure, and yield a record for each engine, ours first.

    Raises:
      UserError: the run, the file or the peer cannot be used.
    """
    at_least = {"rounds": 1, "sentences": 0, "batch_tokens": 1, "beam_size": 1}
    if settings.run in PRESETS:
        # One token of a source is its eos; of a vocabulary four are special.
        at_least |= {"length": 2, "vocab_size": 8}
    for name, least in at_least.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give at least {least}")
    if min(settings.peer_batches, default=0) < 1:
        raise UserError(f"--peer-batches are {settings.peer_batches}: give at least 1")
    if settings.run in PRESETS and settings.source is not None:
        raise UserError(
            f"{settings.run} is a preset, which knows no words: leave out --source, or give a run"
        )
    if settings.peer is not None:
        engine_version(settings.peer)
        if (devices := separate_devices(jax.local_devices())) > 1:
            raise UserError(
                f"a peer uses one device and we would use {devices}: set CUDA_VISIBLE_DEVICES=0"
            )
    GenerationConfig.of(_options(settings))
    if settings.profile is not None:
        check_writable(Path(settings.profile) / "trace")
    with tempfile.TemporaryDirectory() as scratch:
        run, fixed = settings.run, None
        if settings.run in PRESETS:
            run, fixed = f"{scratch}/run", settings.length
            config = PRESETS[settings.run].replace(vocab_size=settings.vocab_size)
            # Otherwise longer lines would be translated in parts, and each part to `length` tokens.
            config = config.replace(max_length=max(config.max_length, settings.length))
            _write_random_run(Path(run), config)
            lines = _random_lines(config, settings.sentences or 128, settings.length)
        else:
            lines = _read_lines(settings)
        translators = {
            f"jaxformer {dtype}": Translator.load(run, dtype=dtype) for dtype in settings.dtypes
        }
        engines: dict[str, Engine] = {
            name: partial(_timed, _ours(translator, settings))
            for name, translator in translators.items()
        }
        with contextlib.ExitStack() as processes:
            if settings.peer is not None:
                for kind in dict.fromkeys(settings.peer_types):
                    engines[f"{settings.peer} {kind}"] = processes.enter_context(
                        in_a_process(_peer, settings, run, kind, scratch, fixed)
                    )
            yield from _measure(engines, lines, settings, translators, fixed)


def _timed(translate: Translate, lines: Sequence[str]) -> tuple[list[str], float]:
    began = time.perf_counter()
    return translate(lines), time.perf_counter() - began


def _measure(
    engines: dict[str, Engine],
    lines: list[str],
    settings: DecodeBenchmark,
    translators: dict[str, Translator],
    fixed: int | None,
) -> Iterator[dict[str, Any]]:
    outputs, first_seconds, programs = {}, {}, {}
    for name, engine in engines.items():
        with count_compiles() as programs[name]:
            outputs[name], first_seconds[name] = engine(lines)
    # A translator learns in its first round whether its caches have to grow.
    warmed_up = {name: translator.steps for name, translator in translators.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(settings.rounds):
        for name, engine in engines.items():
            outputs[name], took = engine(lines)
            seconds[name].append(took)
    first = next(iter(engines))
    if settings.profile is not None:
        with jax.profiler.trace(settings.profile):
            engines[first](lines)
    tokenizer = translators[first].target_tokenizer
    for name in engines:
        ours = translators.get(name)
        spread = summary(seconds[name])
        median = spread["median"]
        if fixed is None:
            tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch(outputs[name]))
        else:  # whatever text an engine decodes them to
            tokens = fixed * len(lines)
        pairs = zip(seconds[name], seconds[first], strict=True)
        ratios = [this / best for this, best in pairs]
        same = sum(map(str.__eq__, outputs[name], outputs[first])) / len(lines)
        yield {
            "engine": name,
            "version": engine_version(name),
            "sentences": len(lines),
            "tokens": tokens,
            "seconds": [round(value, 4) for value in seconds[name]],
            "seconds_median": median,
            "seconds_p10": spread["p10"],
            "seconds_p90": spread["p90"],
            "sentences_per_second": len(lines) / median,
            "tokens_per_second": tokens / median,
            "milliseconds_per_sentence": 1000 * median / len(lines),
            # How many times as long as our first engine it takes.
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "same_as_first": same,
            # The first round compiles; that of a peer looks for its best settings.
            "compile_seconds": max(0.0, first_seconds[name] - median) if ours else None,
            "compiled_programs": len(programs[name]) if ours else None,
            "needed_share": _needed_share(warmed_up[name], ours.steps) if ours else None,
            "settings": dataclasses.asdict(settings),
            "machine": describe_machine(jax.devices()),
        }


def _needed_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    computed, needed = np.subtract(after, before).tolist()
    return needed / max(1, computed)


def _options(settings: DecodeBenchmark) -> dict[str, Any]:
    """Options of our search."""
    options: dict[str, Any] = {
        "beam_size": settings.beam_size,
        "length_penalty": settings.length_penalty,
        "length_penalty_form": "power",
        "early_stopping": True,
    }
    if settings.run in PRESETS:
        options |= {"max_length_ratio": 0.0}
        options |= {"max_length_extra": settings.length, "min_length_extra": settings.length}
    return options


def _ours(translator: Translator, settings: DecodeBenchmark) -> Translate:
    translate = partial(
        translator.translate, batch_tokens=settings.batch_tokens, **_options(settings)
    )
    return _one_by_one(translate) if settings.one_by_one else translate


def _peer(
    settings: DecodeBenchmark, run: str, kind: str, scratch: str, fixed: int | None
) -> Engine:
    """Return the peer with its fastest settings, which its first round finds."""
    if settings.peer == "ctranslate2":
        from train.benchmark.ctranslate2_peer import ctranslate2_candidates as find
    else:
        from train.benchmark.transformers_peer import transformers_candidates as find
    candidates = find(
        run,
        kind,
        scratch,
        beam_size=settings.beam_size,
        length_penalty=settings.length_penalty,
        batches=(1,) if settings.one_by_one else settings.peer_batches,
        fixed=fixed,
    )
    best: Translate | None = None

    def seconds(candidate: Translate, lines: Sequence[str]) -> float:
        candidate(lines[: len(lines) // 4 + 1])  # the first batches are slow
        return _timed(candidate, lines)[1]

    def translate_at_best(lines: Sequence[str]) -> list[str]:
        nonlocal best
        if best is None:
            made = (_one_by_one(one) if settings.one_by_one else one for one in candidates)
            best = min(made, key=partial(seconds, lines=lines))
        return best(lines)

    return partial(_timed, translate_at_best)


def _one_by_one(translate: Translate) -> Translate:
    return lambda lines: [translate([line])[0] for line in lines]


def _read_lines(settings: DecodeBenchmark) -> list[str]:
    if settings.source is None:
        raise UserError(
            f"{settings.run} needs --source FILE, the sentences to translate; "
            f"without it give a preset: {', '.join(PRESETS)}"
        )
    lines = islice(read_lines(Path(settings.source)), settings.sentences or None)
    if sentences := [line for line in lines if line.strip()]:
        return sentences
    raise UserError(f"{settings.source} has no sentence: give a text file, a sentence a line")


def _word(index: int) -> str:
    return f"w{index}"


def _random_lines(config: TransformerConfig, number: int, length: int) -> list[str]:
    draw = np.random.default_rng(0)
    ids = draw.integers(4, config.vocab_size, size=(number, length - 1))
    return [" ".join(map(_word, row)) for row in ids]


def _write_random_run(run: Path, config: TransformerConfig) -> None:
    """Write a model that has learned nothing, whose vocabulary is made-up words."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(_word, range(4, config.vocab_size)),
        model_writer=model,
        model_type="word",
        vocab_size=config.vocab_size,
        pad_id=PAD_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        minloglevel=2,
    )
    tokenizer = Tokenizer(model.getvalue())
    ids = np.ones((1, 2), np.int32)
    params = jax.jit(Transformer(config).init)(jax.random.key(0), ids, ids)["params"]
    write_config(run, {"model": config.to_dict()})
    save_tokenizers(run, tokenizer, tokenizer)
    save_params(run, 0, jax.tree.map(np.asarray, params))
