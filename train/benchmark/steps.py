"""`python -m train benchmark train|forward`: the compiled training step, or forward pass.

    python -m train benchmark train tiny --batch 32,64 --length 64 --dtype float32,bfloat16
    python -m train benchmark train multi30k --corpus --data.path DIR --peer torch flax-plain
    python -m train benchmark forward base --vocab-size 32000 --length 32,64,128 --plot forward.png

Steps are synchronised: each ends before the next begins. Engines take turns of a few steps, so that
what else the machine does disturbs them alike, and ratios are those of neighbouring turns.
"""

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from jaxformer.config import BOS_ID, DType, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.transformer import Transformer
from train.benchmark.flops import forward_flops, train_flops
from train.benchmark.machine import (
    datasheet_peak,
    describe_machine,
    matmul_peak,
    memory_bandwidth,
    peak_memory,
    summary,
)
from train.benchmark.processes import in_a_process
from train.benchmark.turns import Turn, take_turn
from train.config import TrainConfig
from train.data.batches import Batches
from train.data.corpus import EncodedCorpus
from train.parallel import data_parallel_train, prefetch, replicate
from train.state import create_state, make_optimizer, make_schedule
from train.step import make_train_step

Kind = Literal["train", "forward"]
PEERS = ("torch", "torch-compile", "marian", "flax-plain")


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of a sweep.

    Attributes:
      model: what is measured.
      batch: rows of a step, over all devices.
      source, target: positions of a row.
      devices: how many take part.
    """

    model: TransformerConfig
    batch: int
    source: int
    target: int
    devices: int

    def flops(self, kind: Kind) -> int:
        """Of a step, by the paper's formulas."""
        count = train_flops if kind == "train" else forward_flops
        return count(self.model, self.batch, self.source, self.target)


@dataclasses.dataclass(frozen=True)
class StepBenchmark:
    """What is measured.

    Attributes:
      kind: the training step, or the forward pass to logits without dropout.
      config: model, optimizer and, with `batches`, data.
      batches: of the training corpus; None measures full rows of random tokens.
      batch, length: rows, and positions of both sides; without batches, every combination.
      vocab_sizes, devices, dtypes: further dimensions of the sweep.
      steps: of a turn.
      rounds: turns of each engine, after one to warm up.
      peers: of `PEERS`, beside ours in every case.
      profile: folder for a trace of one turn of ours, for TensorBoard or Perfetto.
    """

    kind: Kind
    config: TrainConfig
    batches: Batches | None = None
    batch: tuple[int, ...] = (64,)
    length: tuple[int, ...] = (64,)
    vocab_sizes: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()
    dtypes: tuple[DType, ...] = ()
    steps: int = 5
    rounds: int = 3
    peers: tuple[str, ...] = ()
    profile: str | None = None


def benchmark_steps(settings: StepBenchmark) -> Iterator[dict[str, Any]]:
    """Measure case by case, and yield a record for each engine, ours first.

    Raises:
      UserError: a case or a peer is impossible here.
    """
    for name in ("steps", "rounds"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}: give at least 1")
    for peer in settings.peers:
        if peer not in PEERS:
            raise UserError(f"unknown peer {peer!r}: choose {', '.join(PEERS)}")
        if peer == "marian" and (settings.batches is None or settings.kind != "train"):
            raise UserError("Marian is measured in training, on a corpus: give --corpus")
    device = jax.local_devices()[0]
    bandwidth = memory_bandwidth(device)
    peaks: dict[str, float] = {}
    for case in _cases(settings):
        dtype = case.model.dtype
        if dtype not in peaks:
            peaks[dtype] = matmul_peak(dtype, device)
        # Simulated devices share the cores of one.
        machine_peak = peaks[dtype] * (1 if device.platform == "cpu" else case.devices)
        yield from _measure(settings, case, machine_peak, bandwidth)


def _cases(settings: StepBenchmark) -> Iterator[Case]:
    model = settings.config.model
    available = jax.local_device_count()
    for dtype, vocab_size, devices in itertools.product(
        settings.dtypes or (model.dtype,),
        settings.vocab_sizes or (model.vocab_size,),
        settings.devices or (available,),
    ):
        if not 1 <= devices <= available:
            raise UserError(f"{devices} devices are asked for, {available} are here")
        changed = model.replace(dtype=dtype, vocab_size=vocab_size)
        if settings.batches is not None:
            packing, parts = settings.batches.packing, devices * settings.config.accumulate
            rows = -(-settings.batches.rows_per_batch // parts) * parts
            yield Case(changed, rows, packing.source_length, packing.target_length, devices)
            continue
        for length, batch in itertools.product(settings.length, settings.batch):
            if batch % devices:
                raise UserError(f"{batch} rows cannot be split over {devices} devices")
            yield Case(changed, batch, length, length, devices)


def _measure(
    settings: StepBenchmark, case: Case, peak: float, bandwidth: float
) -> Iterator[dict[str, Any]]:
    engines: dict[str, Callable[[int], Turn]] = {}
    with contextlib.ExitStack() as processes:
        scratch = processes.enter_context(tempfile.TemporaryDirectory())
        for peer in settings.peers:
            engines[peer] = processes.enter_context(_peer(peer, settings, case, scratch))
        ours = OurStep(settings.kind, settings.config, case, settings.batches)
        compiled = ours.compile()
        engines = {"jaxformer": ours.turn} | engines
        for turn in engines.values():
            turn(2)
        turns: dict[str, list[Turn]] = {name: [] for name in engines}
        for _ in range(settings.rounds):
            for name, turn in engines.items():
                turns[name].append(turn(settings.steps))
    if settings.profile is not None:
        with jax.profiler.trace(settings.profile):
            ours.turn(settings.steps)
    flops = case.flops(settings.kind)
    for name, measured in turns.items():
        seconds = [second for turn in measured for second in turn.seconds]
        tokens, positions = (
            sum(itertools.chain.from_iterable(getattr(turn, field) for turn in measured))
            for field in ("tokens", "positions")
        )
        ratios = [
            _rate(ours_turn) / _rate(theirs)
            for ours_turn, theirs in zip(turns["jaxformer"], measured, strict=True)
        ]
        record = {
            "benchmark": settings.kind,
            "engine": name,
            "batch": case.batch,
            "source_length": case.source,
            "target_length": case.target,
            "vocab_size": case.model.vocab_size,
            "dtype": case.model.dtype,
            "step_seconds": summary(seconds),
            "target_tokens_per_second": tokens / sum(seconds),
            "target_positions_per_second": positions / sum(seconds),
            "padding": 1 - tokens / positions,
            "host_wait": sum(sum(turn.waited) for turn in measured) / sum(seconds),
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "model_flops": flops,
            "machine": describe_machine(ours.devices),
        }
        if name == "jaxformer":
            step = record["step_seconds"]["median"]
            sheet = datasheet_peak(case.model.dtype, ours.devices[0])
            # On CPU the devices are the same cores, and the program's bytes are moved by all.
            wide = 1 if ours.devices[0].platform == "cpu" else case.devices
            seconds_of = {
                "compute": max(flops, compiled["xla_flops"]) / peak,
                "memory": compiled["xla_bytes"] / (bandwidth * wide),
            }
            record |= compiled | {
                "matmul_peak_flops": peak,
                "memory_bandwidth": bandwidth * wide,
                "mfu": flops / step / peak,
                "mfu_datasheet": flops / step / (sheet * case.devices) if sheet else None,
                "roofline_seconds": seconds_of,
                "bound_by": max(seconds_of, key=seconds_of.__getitem__),
                "peak_memory_bytes": peak_memory(ours.devices),
            }
        yield record


def _rate(turn: Turn) -> float:
    return sum(turn.tokens) / sum(turn.seconds)


def _peer(
    name: str, settings: StepBenchmark, case: Case, scratch: str
) -> contextlib.AbstractContextManager[Callable[[int], Turn]]:
    def batches(multiple: int) -> list[dict[str, np.ndarray]]:
        if settings.batches is None:
            return [_rows(case)]
        return _padded(settings.batches, multiple=multiple)

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
    return in_a_process(torch_turn, settings.kind, case.model, batches(multiple=1), compiled)


class OurStep:
    """The step of `train.loop.fit`, on random rows or on the corpus."""

    def __init__(self, kind: Kind, config: TrainConfig, case: Case, batches: Batches | None):
        self.devices = jax.local_devices()[: case.devices]
        self._batches, self._all_rows = batches, slice(0, case.batch)
        self._full_rows = _rows(case)
        model = Transformer(case.model)
        schedule = make_schedule(config.optimizer, case.model.d_model, config.steps)
        optimizer = make_optimizer(config.optimizer, schedule)
        state = replicate(create_state(model, optimizer, jax.random.key(0)), self.devices)
        self._rng = jax.random.key(1)
        self._done = 0
        if kind == "train":
            step = make_train_step(model, optimizer, schedule, accumulate=config.accumulate)
            self._carry, self._step = state, data_parallel_train(step, self.devices)
            return

        def forward(params: Any, batch: dict, rng: jax.Array) -> tuple[Any, Any]:
            logits = model.apply(
                {"params": params},
                batch["source_ids"],
                batch["target_ids"],
                source_segment_ids=batch["source_segment_ids"],
                target_segment_ids=batch["target_segment_ids"],
            )
            return params, logits

        self._carry = state.params
        self._step = jax.pmap(
            forward,
            in_axes=(None, 0, None),
            out_axes=(None, 0),
            donate_argnums=0,
            devices=self.devices,
        )

    def compile(self) -> dict[str, Any]:
        """Compile, and return how long it took and what XLA says of the program."""
        arguments = self._carry, self._batch(0), self._rng
        began = time.perf_counter()
        jax.eval_shape(self._step, *arguments)
        traced = time.perf_counter()
        lowered = self._step.lower(*arguments)
        low = time.perf_counter()
        self._step = lowered.compile()
        done = time.perf_counter()
        cost, memory = self._step.cost_analysis(), self._step.memory_analysis()
        return {
            "trace_seconds": traced - began,
            "lower_seconds": low - traced,
            "compile_seconds": done - low,
            "xla_flops": cost.get("flops", float("nan")) * len(self.devices),
            "xla_bytes": cost.get("bytes accessed", float("nan")) * len(self.devices),
            "program_memory_bytes": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
        }

    def turn(self, steps: int) -> Turn:
        """Take `steps` steps; batches of a corpus are made meanwhile, as in training."""
        which = range(self._done, self._done + steps)
        self._done += steps
        ready = map(self._batch, which) if self._batches is None else prefetch(self._batch, which)
        turn = Turn([], [], [], [])
        began = time.perf_counter()
        for batch in ready:
            got = time.perf_counter()
            self._carry, out = self._step(self._carry, batch, self._rng)
            jax.block_until_ready((self._carry, out))
            done = time.perf_counter()
            turn.seconds.append(done - began)
            turn.waited.append(got - began)
            turn.tokens.append(int(np.count_nonzero(batch["labels"])))
            turn.positions.append(batch["labels"].size)
            began = time.perf_counter()
        return turn

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        batches, rows = self._batches, len(self.devices)
        batch = self._full_rows if batches is None else batches.at(step, self._all_rows)
        return {name: x.reshape(rows, -1, *x.shape[1:]) for name, x in batch.items()}


def _rows(case: Case) -> dict[str, np.ndarray]:
    """One batch of random tokens, each row a sentence that fills it."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return draw.integers(4, case.model.vocab_size, (case.batch, length), dtype=np.int32)

    source, target = ids(case.source), ids(case.target)
    return {
        "source_ids": source,
        "source_segment_ids": np.ones_like(source),
        "target_ids": target,
        "target_segment_ids": np.ones_like(target),
        "labels": ids(case.target),
    }


def _padded(batches: Batches, *, multiple: int, number: int = 200) -> list[dict[str, np.ndarray]]:
    """The corpus as other toolkits batch it: sentences of like length, padded, as many positions.

    Lengths are rounded up to a `multiple`. If it is more than 1, empty rows complete a batch, so
    that the shapes are few.
    """
    corpus = batches.corpus
    positions = batches.rows_per_batch * batches.packing.target_length
    lengths = np.maximum(corpus.source.lengths, corpus.target.lengths)
    kept = np.flatnonzero(lengths <= batches.packing.target_length)
    kept = kept[np.argsort(lengths[kept], kind="stable")]
    widths = -(-lengths[kept] // multiple) * multiple
    padded, start = [], 0
    while start < len(kept):
        stop = start + 1
        while (
            stop < len(kept)
            and (stop + 1 - start) * widths[stop] <= positions
            and (multiple == 1 or widths[stop] == widths[start])
        ):
            stop += 1
        width = int(widths[stop - 1])
        rows = stop - start if multiple == 1 else positions // width
        padded.append(_pad(corpus, kept[start:stop], rows, width))
        start = stop
    order = np.random.default_rng(0).permutation(len(padded))[:number]
    return [padded[index] for index in order]


def _pad(corpus: EncodedCorpus, pairs: np.ndarray, rows: int, width: int) -> dict[str, np.ndarray]:
    source, labels = np.zeros((2, rows, width), np.int32)
    for row, pair in enumerate(pairs):
        for ids, side in ((source, corpus.source), (labels, corpus.target)):
            ids[row, : side.lengths[pair]] = side.take(pairs[row : row + 1])
    target = np.zeros_like(labels)
    target[:, 1:] = labels[:, :-1]
    target[: len(pairs), 0] = BOS_ID
    return {"source_ids": source, "target_ids": target, "labels": labels}
