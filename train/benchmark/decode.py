"""How fast a model translates, beside another engine with the same weights.

    python -m train benchmark decode runs/multi30k --source test.en --beam-size 5 --peer ctranslate2
    python -m train benchmark decode base --vocab-size 32000 --length 25 --peer ctranslate2
    python -m train benchmark decode tiny --beam-size 1,4,8 --length 25,50 --plot decoding.png

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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxformer.checkpoints import save_params
from jaxformer.config import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    Precision,
    TransformerConfig,
)
from jaxformer.continuous_batching import Shape
from jaxformer.errors import UserError
from jaxformer.fields import check_choice
from jaxformer.files import check_writable
from jaxformer.generation_config import GenerationConfig
from jaxformer.generator import Generator
from jaxformer.run_directory import save_tokenizers, write_config
from jaxformer.tokenizer import Tokenizer
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from train.benchmark.compiles import Compiles, time_compiles
from train.benchmark.peaks import (
    Yardstick,
    forget_process_peak,
    measured_devices,
    peak_memory,
    separate_devices,
)
from train.benchmark.processes import in_a_process
from train.benchmark.turns import Translate, summary
from train.costs.flops import search_flops
from train.costs.hlo import Program
from train.costs.memory import program_memory
from train.data.files import read_lines
from train.machine import describe_machine, engine_version


class Round(NamedTuple):
    """What an engine did with all sentences once."""

    translations: list[str]
    seconds: float
    peak_memory: int | None  # most bytes in use, where the engine can tell


Engine = Callable[[Sequence[str]], Round]
EngineName = tuple[str, str]  # with the type it computes in


@dataclasses.dataclass(frozen=True)
class DecodeBenchmark:
    """What is measured.

    Attributes:
      run: a run directory, or what `model` is called.
      source: text file with the sentences, needed with a run.
      model: what to measure with random parameters and random sentences, instead of a run.
      sentences: how many, at most; 0 is all of the file, or 128 random ones.
      length: tokens of random sentences and of their translations.
      beam_size, length_penalty: as for `Translator.generate`; the penalty is length^alpha, and a
        sentence ends with its K-th finished hypothesis, for both engines.
      batch_tokens: source positions we translate at once; by default as in `Generator.generate`.
      devices: how many take part; by default all.
      dtypes: our precisions.
      one_by_one: translate each sentence alone, and report milliseconds a sentence.
      peer: "ctranslate2", "transformers" or None.
      peer_dtypes: the types it computes in, such as float32 and int8.
      peer_batches: sentences it translates at once; the fastest is found as it warms up, for
        CTranslate2 also whether one worker on all cores or one worker per core is faster.
      rounds: measurements of each engine.
      profile: folder for a trace of one more round of our first, for TensorBoard or Perfetto.
    """

    run: str
    source: str | None = None
    model: TransformerConfig | None = None
    sentences: int = 0
    length: int = 25
    beam_size: int = 4
    length_penalty: float = 1.0
    batch_tokens: int | None = None
    devices: int | None = None
    dtypes: tuple[Precision, ...] = ("float32",)
    one_by_one: bool = False
    peer: str | None = None
    peer_dtypes: tuple[str, ...] = ("float32",)
    peer_batches: tuple[int, ...] = (32, 128)
    rounds: int = 5
    profile: str | None = None


def benchmark_decode(
    settings: DecodeBenchmark, yardstick: Yardstick | None = None
) -> Iterator[dict[str, Any]]:
    """Measure, and yield a record for each engine, ours first; cases may share a yardstick.

    Raises:
      UserError: the run, the file or the peer cannot be used.
    """
    check_decode(settings)
    yardstick = yardstick or Yardstick(jax.local_devices()[0])
    with tempfile.TemporaryDirectory() as scratch:
        run, model, fixed = settings.run, settings.model, None
        if model is not None:
            run, fixed = f"{scratch}/run", settings.length
            # Otherwise longer lines would be translated in parts, and each part to `length` tokens.
            model = model.replace(max_length=max(model.max_length, settings.length))
            _write_random_run(Path(run), model)
            lines = _random_lines(model, settings.sentences or 128, settings.length)
        else:
            lines = _read_lines(settings)
        translators: dict[EngineName, Translator] = {
            ("jaxformer", dtype): Translator.load(run, dtype=dtype, devices=_devices(settings))
            for dtype in settings.dtypes
        }
        engines: dict[EngineName, Engine] = {
            name: _engine(_ours(translator, settings), partial(peak_memory, _devices(settings)))
            for name, translator in translators.items()
        }
        with contextlib.ExitStack() as processes:
            if settings.peer is not None:
                for kind in settings.peer_dtypes:
                    engines[settings.peer, kind] = processes.enter_context(
                        in_a_process(
                            f"{settings.peer} {kind}", _peer, settings, run, kind, scratch, fixed
                        )
                    )
            yield from _measure(engines, lines, settings, translators, fixed, yardstick)


def check_decode(settings: DecodeBenchmark) -> None:
    """Raise `UserError` where `benchmark_decode` would before it measures anything."""
    at_least = {"rounds": 1, "sentences": 0, "batch_tokens": 1, "beam_size": 1}
    if settings.model is not None:
        at_least |= {"length": 2}  # one token of a source is its eos
    for name, least in at_least.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give at least {least}")
    if min(settings.peer_batches, default=0) < 1:
        raise UserError(f"--peer-batch is {settings.peer_batches}: give at least 1")
    for name in ("dtypes", "peer_dtypes"):
        if len(set(kinds := getattr(settings, name))) < len(kinds):
            option = name.replace("_", "-").removesuffix("s")
            raise UserError(f"--{option} is {','.join(kinds)}: give each once")
    for dtype in settings.dtypes:
        check_choice("--dtype", dtype, Precision)
    if settings.model is None:
        if settings.source is None:
            raise UserError(
                f"{settings.run} needs --source FILE, the sentences to translate; without it give "
                "a preset or a configuration, such as base"
            )
    else:
        if settings.source is not None:
            raise UserError(
                f"{settings.run} has random parameters, which know no words: leave out --source, "
                "or give a run directory"
            )
        if settings.model.vocab_size < 8:  # four are special
            raise UserError(f"--vocab-size is {settings.model.vocab_size}: give at least 8")
    _devices(settings)
    if settings.peer is not None:
        engine_version(settings.peer)
    GenerationConfig.of(_options(settings))
    if settings.profile is not None:
        check_writable(Path(settings.profile) / "trace")


def _devices(settings: DecodeBenchmark) -> list[jax.Device]:
    return measured_devices(settings.devices, beside_peer=settings.peer is not None)


def _engine(translate: Translate, peak: Callable[[], int | None]) -> Engine:
    """Return a function that translates, and reads the clock and `peak`, bytes in use."""

    def take_round(lines: Sequence[str]) -> Round:
        forget_process_peak()
        translations, seconds = _timed(translate, lines)
        return Round(translations, seconds, peak())

    return take_round


def _timed(translate: Translate, lines: Sequence[str]) -> tuple[list[str], float]:
    began = time.perf_counter()
    return translate(lines), time.perf_counter() - began


def _measure(
    engines: dict[EngineName, Engine],
    lines: list[str],
    settings: DecodeBenchmark,
    translators: dict[EngineName, Translator],
    fixed: int | None,
    yardstick: Yardstick,
) -> Iterator[dict[str, Any]]:
    devices = _devices(settings)
    for dtype in settings.dtypes:
        yardstick.matmul(dtype)
    yardstick.bandwidth()
    compiles: dict[EngineName, Compiles] = {}
    for name, engine in engines.items():
        with time_compiles() as compiles[name]:
            engine(lines)
    generators = {name: translator.generator for name, translator in translators.items()}
    # A generator learns in its first round whether its caches have to grow.
    warmed_up = {name: _Searched.by(generator) for name, generator in generators.items()}
    rounds: dict[EngineName, list[Round]] = {name: [] for name in engines}
    for _ in range(settings.rounds):
        for name, engine in engines.items():
            rounds[name].append(engine(lines))
    searched = {name: _Searched.by(each) - warmed_up[name] for name, each in generators.items()}
    first = next(iter(engines))
    if settings.profile is not None:
        with jax.profiler.trace(settings.profile):
            engines[first](lines)
    config, source, target = (
        getattr(translators[first], name)
        for name in ("config", "source_tokenizer", "target_tokenizer")
    )
    for name, taken in rounds.items():
        ours = name in translators
        seconds = [each.seconds for each in taken]
        spread = summary(seconds)
        median = spread["median"]
        translations = taken[-1].translations
        if fixed is None:
            sources, targets = (
                [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]
                for tokenizer, texts in ((source, lines), (target, translations))
            )
        else:  # whatever text an engine decodes them to
            sources = targets = [fixed] * len(lines)
        ratios = [this / best.seconds for this, best in zip(seconds, rounds[first], strict=True)]
        same = sum(map(str.__eq__, translations, rounds[first][-1].translations)) / len(lines)
        record = {
            "benchmark": "decode",
            "config": settings.run,
            "engine": name[0],
            "version": engine_version(name[0]),
            "dtype": name[1],
            "devices": len(devices) if ours else 1,
            "beam_size": settings.beam_size,
            "batch_tokens": settings.batch_tokens,
            "source_length": fixed,
            "target_length": fixed,
            "vocab_size": config.vocab_size,
            "sentences": len(lines),
            "target_tokens": sum(targets),
            "seconds": [round(value, 4) for value in seconds],
            "seconds_median": median,
            "seconds_p10": spread["p10"],
            "seconds_p90": spread["p90"],
            "sentences_per_second": len(lines) / median,
            "target_tokens_per_second": sum(targets) / median,
            "milliseconds_per_sentence": 1000 * median / len(lines),
            # How many times as long as our first engine it takes.
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "same_as_first": same,
            "peak_memory_bytes": max((each.peak_memory or 0) for each in taken) or None,
            "settings": dataclasses.asdict(settings),
            "machine": describe_machine(devices),
        }
        if ours:
            peak, bandwidth = yardstick.matmul(name[1]), yardstick.bandwidth()
            at_once = separate_devices(devices)
            flops = sum(
                search_flops(config, *lengths, settings.beam_size)
                for lengths in zip(sources, targets, strict=True)
            )
            did = searched[name]
            costs = _costs(generators[name], did.turns, settings)
            steps = did.turns.total() / settings.rounds
            seconds_of = {
                "compute": flops / (peak * at_once),
                "memory": steps * costs["step_bytes"] / (bandwidth * at_once),
            }
            record |= compiles[name].seconds() | costs
            record |= {
                "compiled_programs": len(compiles[name].compilations),
                "steps": steps,
                "needed_share": did.needed / max(1, did.computed),
                "model_flops": flops,
                "matmul_peak_flops": peak,
                "memory_bandwidth": bandwidth,
                "mfu": flops / median / (peak * at_once),
                "roofline_seconds": seconds_of,
                "bound_by": max(seconds_of, key=seconds_of.__getitem__),
            }
        yield record


class _Searched(NamedTuple):
    """What a generator has done so far."""

    turns: Counter[Shape]
    computed: int
    needed: int

    @classmethod
    def by(cls, generator: Generator) -> "_Searched":
        return cls(generator.turns, generator.computed_steps, generator.needed_steps)

    def __sub__(self, before: "_Searched") -> "_Searched":
        turns = self.turns - before.turns
        return _Searched(turns, self.computed - before.computed, self.needed - before.needed)


def _costs(
    generator: Generator, turns: Counter[Shape], settings: DecodeBenchmark
) -> dict[str, float]:
    """Bytes that a decoding step moves, on average, and that the largest program plans for."""
    options = GenerationConfig.of(_options(settings) | {"n_best": 1})  # as Translator.translate
    moved, memory = 0.0, 0
    for shape, steps in turns.items():
        compiled = generator.lower(options, shape).compile()  # it has been before
        moved += steps * Program(compiled.as_text() or "").search_step_bytes()
        memory = max(memory, program_memory(compiled))
    return {"step_bytes": moved / max(1, turns.total()), "program_memory_bytes": memory}


def _options(settings: DecodeBenchmark) -> dict[str, Any]:
    """Options of our search."""
    options: dict[str, Any] = {
        "beam_size": settings.beam_size,
        "length_penalty": settings.length_penalty,
        "length_penalty_form": "power",
        "early_stopping": True,
    }
    if settings.model is not None:
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
        from train.benchmark.ctranslate2_peer import ctranslate2_peak as peak
    else:
        from train.benchmark.transformers_peer import transformers_candidates as find
        from train.benchmark.transformers_peer import transformers_peak as peak
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

    return _engine(translate_at_best, peak)


def _one_by_one(translate: Translate) -> Translate:
    return lambda lines: [translate([line])[0] for line in lines]


def _read_lines(settings: DecodeBenchmark) -> list[str]:
    assert settings.source is not None  # checked before
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
