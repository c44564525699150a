"""`python -m train benchmark train|forward`: the compiled training step, or forward pass.

    python -m train benchmark train tiny --batch 32,64 --length 64 --dtype float32,bfloat16
    python -m train benchmark train multi30k --corpus --data.path DIR --peer torch flax-plain
    python -m train benchmark forward base --vocab-size 32000 --length 32,64,128 --plot forward.png
    python -m train benchmark train base,big --vocab-size 32000 --dtype bfloat16 --batch 128 \
        --peer torch torch-compile

Steps are synchronised: each ends before the next begins. Engines take turns of a few steps, so that
other work of the machine disturbs them alike, and ratios compare neighbouring turns.
"""

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer.config import UNK_ID, DType
from jaxformer.errors import UserError
from jaxformer.files import check_writable
from train.allocator import return_free_memory
from train.benchmark.compiles import count_compiles
from train.benchmark.our_step import OurStep
from train.benchmark.peaks import (
    Yardstick,
    datasheet_peak,
    measured_devices,
    separate_devices,
)
from train.benchmark.processes import in_a_process
from train.benchmark.turns import Turn, summary, take_turn
from train.benchmark.work import Case, Kind, full_rows, padded_batches
from train.config import TrainConfig
from train.data.batches import Batches
from train.machine import describe_machine, engine_version
from train.parallel import completed, make_runner

PEERS = ("torch", "torch-compile", "marian", "flax-plain")


@dataclasses.dataclass(frozen=True)
class StepBenchmark:
    """What is measured.

    Attributes:
      kind: the training step, or the forward pass to logits without dropout.
      config: model, optimizer and, with `batches`, data.
      name: what the configuration is called.
      batches: of the training corpus; None measures full rows of random tokens.
      batch, length: rows, and positions of both sides; without batches, every combination.
      vocab_sizes, devices, dtypes: further dimensions of the sweep.
      steps: number of steps in a turn that count; one more comes before them.
      rounds: turns of each engine, after one to warm up.
      peers: engines in `PEERS` to measure beside ours in every case.
      peer_dtypes: those they compute in; none means that of our case. Marian's is float32.
      profile: folder for a trace of one turn of ours, for TensorBoard or Perfetto.
    """

    kind: Kind
    config: TrainConfig
    name: str = ""
    batches: Batches | None = None
    batch: tuple[int, ...] = (64,)
    length: tuple[int, ...] = (64,)
    vocab_sizes: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()
    dtypes: tuple[DType, ...] = ()
    steps: int = 5
    rounds: int = 3
    peers: tuple[str, ...] = ()
    peer_dtypes: tuple[DType, ...] = ()
    profile: str | None = None


def benchmark_steps(
    settings: StepBenchmark, yardstick: Yardstick | None = None
) -> Iterator[dict[str, Any]]:
    """Measure case by case, and yield a record for each engine, ours first.

    Raises:
      UserError: a case or a peer is impossible here.
    """
    cases = check_steps(settings)
    yardstick = yardstick or Yardstick(jax.local_devices()[0])
    for case in cases:
        yardstick.matmul(case.model.dtype)
        yardstick.bandwidth()
        yield from _measure(settings, case, yardstick)


def check_steps(settings: StepBenchmark) -> list[Case]:
    """Return what `benchmark_steps` would measure; raises `UserError` like it."""
    for name in ("steps", "rounds"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}: give at least 1")
    for peer in settings.peers:
        if peer not in PEERS:
            raise UserError(f"unknown peer {peer!r}: choose {', '.join(PEERS)}")
        if peer == "marian" and (settings.batches is None or settings.kind != "train"):
            raise UserError("Marian is only measured in training, on a corpus: train --corpus")
        _check_peer(peer, settings)
        engine_version(peer)
    if settings.profile is not None:
        check_writable(Path(settings.profile) / "trace")
    return list(_cases(settings))


def _check_peer(peer: str, settings: StepBenchmark) -> None:
    """Raise `UserError` if a peer would do other work than ours."""
    model = settings.config.model
    wanted: dict[str, tuple] = {
        "head_dim": (None, model.d_model // model.num_heads),
        "value_dim": (None, model.query_key_dim),
        "positions": ("sinusoidal",),
    }
    if settings.kind == "train" and peer not in ("torch", "torch-compile"):
        wanted |= {"attention_dropout": (0.0,), "activation_dropout": (0.0,)}
    if peer in ("torch", "torch-compile", "flax-plain"):
        wanted |= {"output_bias": (False,)}
    if peer == "flax-plain":
        wanted |= {"attention_bias": (False,)}
    for name, values in wanted.items():
        if getattr(model, name) not in values:
            raise UserError(
                f"model.{name} is {getattr(model, name)!r}, which {peer} does not have here: use "
                "the default, or leave the peer out"
            )


def _cases(settings: StepBenchmark) -> Iterator[Case]:
    model = settings.config.model
    accumulate = settings.config.accumulate if settings.kind == "train" else 1
    shapes = [(batch, n, n) for n, batch in itertools.product(settings.length, settings.batch)]
    if settings.batches is not None:
        batches = settings.batches
        shapes = [(batches.rows_per_batch, batches.source_length, batches.target_length)]
    for dtype, vocab_size, devices, shape in itertools.product(
        settings.dtypes or (model.dtype,),
        settings.vocab_sizes or (model.vocab_size,),
        settings.devices or (jax.local_device_count(),),
        shapes,
    ):
        taking_part = measured_devices(devices, beside_peer=bool(settings.peers))
        batch, source, target = shape
        for name, value in (("batch", batch), ("length", target)):
            if value < 1:
                raise UserError(f"--{name} is {value}: give at least 1")
        limit = model.num_positions
        if limit is not None and max(source, target) > limit:
            raise UserError(
                f"rows have {max(source, target)} positions and the model learns {limit}: give at "
                "most that many, or raise --model.max-length"
            )
        if vocab_size <= UNK_ID + 1:
            raise UserError(
                f"vocab_size is {vocab_size}: give at least 5, four of them are special"
            )
        changed = model.replace(dtype=dtype, vocab_size=vocab_size)
        config = dataclasses.replace(settings.config, model=changed)
        parts = make_runner(config, taking_part).row_parts * accumulate
        if settings.batches is not None:
            batch = completed(batch, parts)  # as in training
        elif batch % parts:
            raise UserError(
                f"{batch} rows cannot be split over {devices} devices"
                + (f" with accumulate={accumulate}" if accumulate > 1 else "")
                + f": give a multiple of {parts}"
            )
        yield Case(changed, batch, source, target, devices)


def _measure(settings: StepBenchmark, case: Case, yardstick: Yardstick) -> Iterator[dict[str, Any]]:
    engines: dict[tuple[str, str], Callable[[int], Turn]] = {}
    with contextlib.ExitStack() as processes:
        scratch = processes.enter_context(tempfile.TemporaryDirectory())
        dtypes = settings.peer_dtypes or (case.model.dtype,)
        for peer, dtype in itertools.product(settings.peers, dtypes):
            kind = "float32" if peer == "marian" else dtype
            if (peer, kind) not in engines:
                theirs = dataclasses.replace(case, model=case.model.replace(dtype=kind))
                turn = processes.enter_context(_peer(peer, settings, theirs, scratch))
                engines[peer, kind] = turn
        with count_compiles() as programs:
            ours = OurStep(settings.kind, settings.config, case, settings.batches)
            compiled = ours.compile()
            ours.turn(2)
        return_free_memory()  # as after the first step of training
        for turn in engines.values():
            turn(2)
        us = "jaxformer", case.model.dtype
        engines = {us: ours.turn} | engines
        turns: dict[tuple[str, str], list[Turn]] = {engine: [] for engine in engines}
        for _ in range(settings.rounds):
            for engine, turn in engines.items():
                turns[engine].append(_settled(turn, settings.steps))
    devices = separate_devices(jax.local_devices()[: case.devices])
    peak, bandwidth = yardstick.matmul(case.model.dtype), yardstick.bandwidth()
    if settings.profile is not None:
        with jax.profiler.trace(settings.profile):
            ours.turn(settings.steps)
    flops = case.flops(settings.kind)
    for (name, computed), measured in turns.items():
        seconds = [second for turn in measured for second in turn.seconds]
        tokens, positions = (
            sum(itertools.chain.from_iterable(getattr(turn, field) for turn in measured))
            for field in ("tokens", "positions")
        )
        ratios = [
            _rate(ours_turn) / _rate(theirs)
            for ours_turn, theirs in zip(turns[us], measured, strict=True)
        ]
        # A peer's batches of a corpus have shapes of their own, and more than one.
        same_rows = settings.batches is None or name == "jaxformer"
        record = {
            "benchmark": settings.kind,
            "config": settings.name,
            "engine": name,
            "version": engine_version(name),
            "batch": case.batch if same_rows else None,
            "source_length": case.source if same_rows else None,
            "target_length": case.target if same_rows else None,
            "vocab_size": case.model.vocab_size,
            "dtype": computed,
            "step_seconds": summary(seconds),
            "target_tokens_per_step": tokens / len(seconds),
            "target_tokens_per_second": tokens / sum(seconds),
            # Marian does not report its padding; a peer has its batches ready.
            "target_positions_per_second": None if name == "marian" else positions / sum(seconds),
            "padding": None if name == "marian" else 1 - tokens / positions,
            "host_wait": None,
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "model_flops": flops if same_rows else None,
            "model": case.model.to_dict(),
            "corpus": settings.batches is not None,
            "devices": case.devices if name == "jaxformer" else 1,
            "machine": describe_machine(ours.devices),
            "peak_memory_bytes": max((turn.peak_memory or 0) for turn in measured) or None,
        }
        if name == "jaxformer":
            step = record["step_seconds"]["median"]
            sheet = datasheet_peak(case.model.dtype, ours.devices[0])
            seconds_of = {
                "compute": max(flops, compiled["xla_flops"]) / (peak * devices),
                "memory": compiled["bytes_moved"] / (bandwidth * devices),
            }
            record |= compiled | {
                "host_wait": sum(sum(turn.waited) for turn in measured) / sum(seconds),
                "compiled_programs": len(programs),
                "matmul_peak_flops": peak,
                "memory_bandwidth": bandwidth,
                "mfu": flops / step / (peak * devices),
                "mfu_datasheet": flops / step / (sheet * case.devices) if sheet else None,
                "roofline_seconds": seconds_of,
                "bound_by": max(seconds_of, key=seconds_of.__getitem__),
            }
        yield record


def _settled(turn: Callable[[int], Turn], steps: int) -> Turn:
    """Take one more step first, which does not count.

    Until then another engine has had the caches and the memory of the machine; in training there is
    none.
    """
    taken = turn(1 + steps)
    return Turn(
        taken.seconds[1:],
        taken.waited[1:],
        taken.tokens[1:],
        taken.positions[1:],
        taken.peak_memory,
    )


def _rate(turn: Turn) -> float:
    return sum(turn.tokens) / sum(turn.seconds)


def _peer(
    name: str, settings: StepBenchmark, case: Case, scratch: str
) -> contextlib.AbstractContextManager[Callable[[int], Turn]]:
    def batches(multiple: int) -> list[dict[str, np.ndarray]]:
        if settings.batches is None:
            return [full_rows(case)]
        return padded_batches(settings.batches, multiple=multiple)

    if name == "flax-plain":
        from train.benchmark.flax_plain import plain_step

        turn = partial(take_turn, plain_step(settings.kind, case.model, batches(multiple=8)))
        return contextlib.nullcontext(turn)
    if name == "marian":
        from train.benchmark.marian_peer import marian_turn

        assert settings.batches is not None  # checked before
        return contextlib.nullcontext(marian_turn(case.model, settings.batches, scratch))
    from train.benchmark.torch_peer import torch_turn

    compiled = name == "torch-compile"
    padded = batches(multiple=8 if compiled else 1)
    return in_a_process(name, torch_turn, settings.kind, case.model, padded, compiled)
