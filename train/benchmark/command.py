"""The command line of the benchmarks."""

import argparse
import dataclasses
import itertools
import os
import tempfile
from typing import TYPE_CHECKING, Any

from jaxformer.config import PRESETS
from jaxformer.errors import UserError
from jaxformer.terminal import ShowDefaults
from train.arguments import list_of, load_config, override, refuse
from train.config import TrainConfig

if TYPE_CHECKING:
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
    steps.add_argument("--steps", type=int, default=5, help="steps in a turn")
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
    steps.add_argument("--profile", metavar="DIR", help="write a trace for TensorBoard or Perfetto")
    steps.add_argument("--plot", metavar="FILE.png", help="draw the sweep")
    steps.add_argument("--output", metavar="FILE", help="append the results, as JSON lines")
    steps.set_defaults(command=_benchmark_steps, kind=kind, corpus=False)


def _add_decode(kinds: Any) -> None:
    decode = kinds.add_parser(
        "decode",
        help="translation, beside another engine with the same weights",
        description="Measure sentences and tokens a second, compilation apart, beside another "
        "engine with the same weights, which has a process of its own and takes turns with ours.",
        formatter_class=ShowDefaults,
    )
    decode.add_argument(
        "run", metavar="RUN", help="directory that training wrote, or a preset such as base"
    )
    decode.add_argument(
        "--source", metavar="FILE", help="text file to translate, needed with a run"
    )
    decode.add_argument(
        "--sentences", type=int, default=0, help="at most; 0 is the whole file, or 128 random ones"
    )
    decode.add_argument("--vocab-size", type=int, default=32_000, help="pieces, with a preset")
    decode.add_argument(
        "--length", type=int, default=25, help="tokens of a sentence, with a preset"
    )
    decode.add_argument(
        "--beam-size", type=int, default=4, help="number of beams; 1 is greedy search"
    )
    decode.add_argument(
        "--length-penalty", type=float, default=1.0, help="alpha of the penalty length^alpha"
    )
    decode.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="source positions translated at once, over all devices; by default 4096 per device, "
        "fewer on a CPU",
    )
    decode.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32"],
        help="precisions of jaxformer: float32, bfloat16, int8",
    )
    decode.add_argument("--one-by-one", action="store_true", help="translate each sentence alone")
    decode.add_argument("--peer", choices=("ctranslate2", "transformers"), help="the other engine")
    decode.add_argument(
        "--peer-types",
        nargs="+",
        default=["float32"],
        help="compute types of the peer, such as float32 and int8",
    )
    decode.add_argument(
        "--peer-batches",
        type=int,
        nargs="+",
        default=[32, 128],
        help="sentences that the peer takes at once; the fastest of these counts",
    )
    decode.add_argument("--rounds", type=int, default=5, help="measurements of each engine")
    decode.add_argument(
        "--profile", metavar="DIR", help="write a trace for TensorBoard or Perfetto"
    )
    decode.add_argument("--output", metavar="FILE", help="append the results, as JSON lines")
    decode.set_defaults(command=_benchmark_decode)


def _leave_memory_to_peers() -> None:
    """Keep JAX from taking three quarters of a GPU's memory at once."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _benchmark_steps(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.peer:
        _leave_memory_to_peers()
    from jaxformer.pages.pictures import check_picture
    from train.benchmark.report import NOTHING_TO_DRAW, plot, steps_table
    from train.records import collect, keep_records

    if options.plot is not None:
        swept = options.batch, options.length, options.vocab_size, options.devices
        if max(len(set(values)) for values in swept) < 2:
            raise UserError(NOTHING_TO_DRAW)
        check_picture(options.plot)
    import jax

    from train.benchmark.steps import benchmark_steps, check_steps

    # Programs from the cache would make compiling look free.
    jax.config.update("jax_enable_compilation_cache", False)
    benchmarks = [_step_benchmark(options, name, overrides) for name in options.config]
    for benchmark in benchmarks:  # reject what is impossible before anything is measured
        check_steps(benchmark)
    measured = itertools.chain.from_iterable(map(benchmark_steps, benchmarks))
    records = collect(keep_records(options.output, measured), steps_table)
    if options.plot is not None:
        plot(options.plot, records)


def _step_benchmark(
    options: argparse.Namespace, name: str, overrides: list[str]
) -> "StepBenchmark":
    from train.benchmark.steps import StepBenchmark

    config = (
        TrainConfig(model=PRESETS[name]) if name in PRESETS else load_config(name, also=PRESETS)
    )
    prog = f"python -m train benchmark {options.kind}"
    config = override(config, overrides, prog, own=vars(options))
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
    refuse(overrides, "benchmark decode")
    if options.peer is not None:
        _leave_memory_to_peers()
    from train.benchmark.decode import DecodeBenchmark, benchmark_decode
    from train.benchmark.report import decode_table
    from train.records import collect, keep_records

    names = [field.name for field in dataclasses.fields(DecodeBenchmark)]
    values = {name: getattr(options, name) for name in names}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    measured = benchmark_decode(DecodeBenchmark(**values | lists))
    collect(keep_records(options.output, measured), decode_table)
