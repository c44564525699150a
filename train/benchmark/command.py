"""The command line of the benchmarks."""

import argparse
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxformer.config import PRESETS, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.terminal import ShowDefaults
from train.arguments import list_of, load_config, override, refuse
from train.config import TrainConfig
from train.records import Records, collect, keep_records

if TYPE_CHECKING:
    from train.benchmark.decode import DecodeBenchmark
    from train.benchmark.steps import StepBenchmark


def add_benchmark(commands: Any) -> None:
    """Add `benchmark train|forward|decode` to the subcommands of `python -m train`."""
    benchmark = commands.add_parser(
        "benchmark", help="measure how fast training and translation are"
    )
    kinds = benchmark.add_subparsers(required=True, metavar="WHAT")
    for kind, what in (
        ("train", "the training step"),
        ("forward", "the forward pass to logits, without dropout"),
    ):
        _add_steps(kinds, kind, what)
    _add_decode(kinds)


def _add_steps(kinds: Any, kind: str, what: str) -> None:
    steps = kinds.add_parser(
        kind,
        help=f"{what}, also beside other engines at the same work",
        description=f"Measure {what}: time, tokens a second, share of the machine's measured "
        "matrix-product peak, memory. Lists, as in --batch 16,32, measure every combination. "
        "--section.field VALUE changes any field of the configuration.",
        formatter_class=ShowDefaults,
    )
    steps.add_argument(
        "config",
        metavar="CONFIG",
        type=list_of(str),
        help="configurations or presets, such as base,big",
    )
    numbers = list_of(int)
    steps.add_argument("--batch", type=numbers, default=(), help="rows per step; default: 64")
    steps.add_argument(
        "--length", type=numbers, default=(), help="positions per row, of both sides; default: 64"
    )
    steps.add_argument(
        "--vocab-size", type=numbers, default=(), help="pieces in the vocabulary; default: CONFIG's"
    )
    steps.add_argument(
        "--devices", type=numbers, default=(), help="how many take part; default: all"
    )
    steps.add_argument(
        "--dtype", type=list_of(str), default=(), help="float32,bfloat16; default: CONFIG's"
    )
    steps.add_argument(
        "--steps", type=int, default=5, help="steps in a turn, after one that does not count"
    )
    steps.add_argument("--rounds", type=int, default=3, help="turns of each engine")
    peers = "torch, torch-compile, flax-plain"
    if kind == "train":
        peers += ", marian"
        steps.add_argument(
            "--corpus",
            action="store_true",
            help="measure on CONFIG's training data, packed as in training, instead of full random "
            "rows; peers get padded batches of as many real tokens",
        )
    steps.add_argument(
        "--peer", nargs="+", default=(), metavar="PEER", help=f"engines to compare with: {peers}"
    )
    steps.add_argument(
        "--peer-dtype", type=list_of(str), default=(), help="dtypes of the peers; default: ours"
    )
    _add_outputs(steps)
    steps.set_defaults(command=_benchmark_steps, kind=kind, corpus=False)


def _add_decode(kinds: Any) -> None:
    decode = kinds.add_parser(
        "decode",
        help="translation, beside another engine with the same weights",
        description="Measure sentences and tokens a second, compilation apart, beside another "
        "engine with the same weights, which has a process of its own and takes turns with ours. "
        "Lists, as in --beam-size 1,4, measure every combination. --section.field VALUE changes "
        "any field of a preset or a configuration.",
        formatter_class=ShowDefaults,
    )
    decode.add_argument(
        "run",
        metavar="RUN|CONFIG",
        help="directory that training wrote; or a configuration or preset such as base, with "
        "random parameters",
    )
    decode.add_argument(
        "--source", metavar="FILE", help="text file to translate, needed with a run"
    )
    decode.add_argument(
        "--sentences", type=int, default=0, help="at most; 0 is the whole file, or 128 random ones"
    )
    numbers = list_of(int)
    decode.add_argument(
        "--vocab-size",
        type=numbers,
        default=(),
        help="pieces in the vocabulary, without a run; default: CONFIG's",
    )
    decode.add_argument(
        "--length",
        type=numbers,
        default=(),
        help="tokens of a sentence, without a run; default: 25",
    )
    decode.add_argument(
        "--beam-size",
        type=numbers,
        default="4",
        help="number of beams; 1 is greedy search",
    )
    decode.add_argument(
        "--length-penalty", type=float, default=1.0, help="alpha of the penalty length^alpha"
    )
    decode.add_argument(
        "--batch-tokens",
        type=numbers,
        default=(),
        metavar="N",
        help="source positions of a program, over all devices; default: 4096 per device, fewer on "
        "a CPU, where two programs may run at once",
    )
    decode.add_argument(
        "--devices", type=numbers, default=(), help="how many take part; default: all"
    )
    decode.add_argument(
        "--dtype",
        type=list_of(str),
        default=(),
        help="precisions of jaxformer: float32,bfloat16,int8; default: CONFIG's, float32 for a run",
    )
    decode.add_argument("--one-by-one", action="store_true", help="translate each sentence alone")
    decode.add_argument("--peer", choices=("ctranslate2", "transformers"), help="the other engine")
    decode.add_argument(
        "--peer-dtype",
        type=list_of(str),
        default="float32",
        help="types the peer computes in, such as float32,int8",
    )
    decode.add_argument(
        "--peer-batch",
        type=numbers,
        default="32,128",
        help="sentences that the peer takes at once; the fastest of these counts",
    )
    decode.add_argument("--rounds", type=int, default=5, help="measurements of each engine")
    _add_outputs(decode)
    decode.set_defaults(command=_benchmark_decode, kind="decode")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", metavar="DIR", help="write a trace for TensorBoard or Perfetto"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw the sweep")
    parser.add_argument("--output", metavar="FILE", help="append the results, as JSON lines")


def _leave_memory_to_peers() -> None:
    """Keep JAX from taking three quarters of a GPU's memory at once."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _check_plot(options: argparse.Namespace, sweep: Sequence[str]) -> None:
    """Raise `UserError` if a picture is asked for, and none of the named options has a list."""
    if options.plot is None:
        return
    from jaxformer.pages.pictures import check_picture

    if max(len(set(getattr(options, name))) for name in sweep) < 2:
        names = [f"--{name.replace('_', '-')}" for name in sweep]
        raise UserError(f"nothing to draw: give {', '.join(names[:-1])} or {names[-1]} a list")
    check_picture(options.plot)


def _report(
    options: argparse.Namespace,
    measured: Iterable[Iterator[dict[str, Any]]],
    table: Callable[[Records], str],
) -> None:
    """Measure, write, print and draw."""
    import jax

    from train.benchmark.report import plot

    # Programs from the cache would make compiling look free.
    jax.config.update("jax_enable_compilation_cache", False)
    each = itertools.chain.from_iterable(measured)
    records = collect(keep_records(options.output, each), table)
    if options.plot is not None:
        plot(options.plot, records)


def _configuration(options: argparse.Namespace, name: str, overrides: list[str]) -> TrainConfig:
    preset = name in PRESETS
    config = TrainConfig(model=PRESETS[name]) if preset else load_config(name, also=PRESETS)
    return override(
        config, overrides, f"python -m train benchmark {options.kind}", own=vars(options)
    )


def _benchmark_steps(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.peer:
        _leave_memory_to_peers()
    _check_plot(options, ("batch", "length", "vocab_size", "devices"))
    import jax

    from train.benchmark.peaks import Yardstick
    from train.benchmark.report import steps_table
    from train.benchmark.steps import benchmark_steps, check_steps

    benchmarks = [_step_benchmark(options, name, overrides) for name in options.config]
    for benchmark in benchmarks:  # reject what is impossible before anything is measured
        check_steps(benchmark)
    measure = partial(benchmark_steps, yardstick=Yardstick(jax.local_devices()[0]))
    _report(options, map(measure, benchmarks), steps_table)


def _step_benchmark(
    options: argparse.Namespace, name: str, overrides: list[str]
) -> "StepBenchmark":
    from train.benchmark.steps import StepBenchmark

    config = _configuration(options, name, overrides)
    batches = None
    if options.corpus:
        if options.batch or options.length or options.vocab_size:
            raise UserError(
                "a corpus is measured in the rows of its configuration: instead of --batch, "
                "--length and --vocab-size give --data.batch-tokens, --data.target-length and "
                "--model.vocab-size"
            )
        from train.prepare import prepare

        if options.peer and config.data.extra:
            raise UserError("a peer has one corpus: leave out data.extra, or --peer")
        with tempfile.TemporaryDirectory() as scratch:
            batches = prepare(dataclasses.replace(config, run=f"{scratch}/run")).batches
    return StepBenchmark(
        options.kind,
        config,
        name,
        batches,
        batch=options.batch or (64,),
        length=options.length or (64,),
        vocab_sizes=options.vocab_size,
        devices=options.devices,
        dtypes=options.dtype,
        steps=options.steps,
        rounds=options.rounds,
        peers=tuple(options.peer),
        peer_dtypes=options.peer_dtype,
        profile=options.profile,
    )


def _benchmark_decode(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.peer is not None:
        _leave_memory_to_peers()
    sweep = ("beam_size", "length", "vocab_size", "batch_tokens", "devices")
    _check_plot(options, sweep)
    import jax

    from train.benchmark.decode import benchmark_decode, check_decode
    from train.benchmark.peaks import Yardstick
    from train.benchmark.report import decode_table

    benchmarks = _decode_benchmarks(options, overrides)
    for benchmark in benchmarks:  # reject what is impossible before anything is measured
        check_decode(benchmark)
    yardstick = Yardstick(jax.local_devices()[0])
    measure = partial(benchmark_decode, yardstick=yardstick)
    _report(options, map(measure, benchmarks), decode_table)


def _decode_benchmarks(
    options: argparse.Namespace, overrides: list[str]
) -> list["DecodeBenchmark"]:
    from train.benchmark.decode import DecodeBenchmark

    models: list[TransformerConfig | None] = [None]
    if _is_run(options.run):
        refuse(overrides, "benchmark decode")
        for name in ("vocab_size", "length"):
            if getattr(options, name):
                raise UserError(
                    f"--{name.replace('_', '-')} is for random parameters, and {options.run} is a "
                    "run: leave it out, or give a preset or a configuration"
                )
    else:
        model = _configuration(options, options.run, overrides).model
        # The made-up words are those of both sides.
        models = [
            model.replace(vocab_size=vocab_size, source_vocab_size=None)
            for vocab_size in options.vocab_size or (model.vocab_size,)
        ]
    fixed = {
        name: getattr(options, name)
        for name in ("run", "source", "sentences", "length_penalty", "one_by_one", "peer")
    }
    return [
        DecodeBenchmark(
            **fixed,
            model=model,
            length=length,
            beam_size=beam_size,
            batch_tokens=batch_tokens,
            devices=devices,
            dtypes=options.dtype or (model.dtype if model else "float32",),
            peer_dtypes=options.peer_dtype,
            peer_batches=options.peer_batch,
            rounds=options.rounds,
            profile=options.profile,
        )
        for model, length, beam_size, batch_tokens, devices in itertools.product(
            models,
            options.length or (25,),
            options.beam_size,
            options.batch_tokens or (None,),
            options.devices or (None,),
        )
    ]


def _is_run(name: str) -> bool:
    """Whether RUN means a directory, not a preset, a configuration or a misspelling of these."""
    if name in PRESETS or name.endswith(".py"):
        return False
    return os.path.isdir(name) or os.sep in name
