"""`python -m train plan`: the training step and the search, compiled for machines and costed.

    python -m train plan wmt14_base --topology v5e:2x4,v5e:4x4 --plot cost.png
    python -m train plan wmt14_big --topology v5p:4x4x4 --parallel.strategy mesh --parallel.fsdp 4

Nothing runs and no corpus is read. Memory, bytes and collectives are those of the compiled program;
times are the least that a chip's data sheet allows for them.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from jaxformer.errors import UserError
from jaxformer.generation import max_target_length
from jaxformer.terminal import say
from train.config import TrainConfig
from train.costs.flops import decode_step_flops, train_flops
from train.parallel import batch_parts, completed
from train.plan.collectives import Collective
from train.plan.estimates import largest_fitting, roofline
from train.plan.machines import Machine
from train.plan.programs import DoesNotFit, decode_program, step_program

# What is decoded at once: a batch of sentences of WMT's usual length.
SENTENCES, SOURCE_LENGTH = 64, 32


@dataclasses.dataclass(frozen=True)
class Work:
    """A global batch.

    Attributes:
      full: rows with tokens, over all devices.
      rows: these and empty ones, added so that every device has the same number.
      source, target: positions of a row.
    """

    full: int
    rows: int
    source: int
    target: int


def plan(
    config: TrainConfig, machines: Sequence[Machine], rows_per_device: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a record of the training step for each machine, and of decoding for each kind of chip.

    Args:
      config: what would be trained.
      machines: what it would be trained on.
      rows_per_device: if given, the batch grows with the machine instead of being
        `config.data.batch_tokens`.

    Raises:
      UserError: a machine cannot be split as `config.parallel` says, or the batch cannot be split
        among its devices.
    """
    works = [work_of(config, machine, rows_per_device) for machine in machines]
    largest: dict[str, tuple[int, str]] = {}
    for machine, work in zip(machines, works, strict=True):
        record = _train_record(config, machine, work)
        if machine.chip is not None:
            if machine.chip.name not in largest:
                rows = _largest_rows_per_part(config, machine, work, record)
                largest[machine.chip.name] = rows, machine.name
            rows, found_on = largest[machine.chip.name]
            tokens = rows * batch_parts(config, machine.devices) * work.target
            record |= {"largest_batch_tokens": tokens, "largest_found_on": found_on}
        yield record
    for machine in {machine.devices[0].device_kind: machine for machine in machines}.values():
        yield _decode_record(config, machine)


def work_of(config: TrainConfig, machine: Machine, rows_per_device: int | None) -> Work:
    """Return the batch that a run takes on a machine, as `train.prepare` makes it.

    Raises:
      UserError: the rows of a device cannot be split into `config.accumulate` parts.
    """
    target = config.data.target_length
    full = max(1, config.data.batch_tokens // target)
    if rows_per_device is not None:
        if rows_per_device < 1 or rows_per_device % config.accumulate:
            raise UserError(
                f"--rows-per-device is {rows_per_device}: give a multiple of "
                f"accumulate={config.accumulate}"
            )
        full = rows_per_device * len(machine.devices)
    rows = completed(full, batch_parts(config, machine.devices))
    return Work(full, rows, config.data.source_length or target, target)


def _train_record(config: TrainConfig, machine: Machine, work: Work) -> dict[str, Any]:
    model, devices = config.model, len(machine.devices)
    flops = train_flops(model, work.rows, work.source, work.target)
    record: dict[str, Any] = {
        "plan": "train",
        "machine": machine.name,
        "chips": machine.chips,
        "devices": devices,
        "layout": _layout(config, devices),
        "dtype": model.dtype,
        "rows": work.rows,
        "full_rows": work.full,
        "source_length": work.source,
        "target_length": work.target,
        "batch_tokens": work.full * work.target,
        "steps": config.steps,
        "model_flops": flops,
        "memory_available": machine.memory,
    }
    try:
        program = step_program(config, machine, work.rows, work.source)
    except DoesNotFit as refusal:
        return record | {
            "fits": False,
            "memory": {"total": refusal.needed},
            "refusal": refusal.reason,
        }
    say(f"{machine.name}: {work.rows} rows compiled in {program.compile_seconds:.1f} s")
    sent = sum(one.sent for one in program.collectives)
    record |= {
        "fits": program.memory <= machine.memory,
        "memory": {
            "parameters": program.parameters,
            "optimizer": program.optimizer,
            "batch": program.arguments - program.parameters - program.optimizer,
            "temporaries": program.temporaries + program.results,
            "code": program.code,
            "total": program.memory,
        },
        "xla_flops": program.xla_flops * devices,
        "xla_bytes": program.xla_bytes,
        "bytes_moved": program.bytes_moved,
        "bytes_sent": sent,
        "collectives": _by_kind(program.collectives),
        "compile_seconds": program.compile_seconds,
    }
    if machine.chip is not None:
        terms = roofline(machine.chip, flops / devices, program.bytes_moved, sent)
        record |= _times(terms)
        hours = config.steps * record["step_seconds"] / 3600
        record |= {
            "tokens_per_second": record["batch_tokens"] / record["step_seconds"],
            "hours": hours,
            "chip_hours": hours * machine.chips,
        }
    return record


def _largest_rows_per_part(
    config: TrainConfig, machine: Machine, work: Work, record: dict[str, Any]
) -> int:
    """Find it in a few compilations, the first of which, that of `record`, is done already.

    With more of the same devices each would hold the same: only the axis `data` grows, along which
    only the batch is split.
    """
    parts = batch_parts(config, machine.devices)

    def needs(rows_per_part: int) -> float:
        rows = rows_per_part * parts
        tried = record
        if rows != work.rows:
            tried = _train_record(config, machine, dataclasses.replace(work, rows=rows))
        needed = tried["memory"]["total"] or math.inf
        return needed if tried["fits"] else max(needed, machine.memory + 1)

    return largest_fitting(needs, machine.memory, work.rows // parts)


def _decode_record(config: TrainConfig, machine: Machine) -> dict[str, Any]:
    evaluate = config.evaluate
    options = evaluate.search(evaluate.beam_size)
    room = max_target_length((config.model,), options, SOURCE_LENGTH)
    record: dict[str, Any] = {
        "plan": "decode",
        "machine": f"1 x {machine.devices[0].device_kind}",
        "dtype": config.model.dtype,
        "sentences": SENTENCES,
        "beam_size": options.beam_size,
        "source_length": SOURCE_LENGTH,
        "max_length": room,
        "step_flops": decode_step_flops(
            config.model, SENTENCES, options.beam_size, SOURCE_LENGTH, options.beam_size * room
        ),
        "memory_available": machine.memory,
    }
    try:
        program = decode_program(config, machine, options, SENTENCES, SOURCE_LENGTH)
    except DoesNotFit as refusal:
        return record | {"fits": False, "memory": refusal.needed, "refusal": refusal.reason}
    say(f"{machine.name}: decoding compiled in {program.compile_seconds:.1f} s")
    record |= {
        "fits": program.memory <= machine.memory,
        "memory": program.memory,
        "step_bytes": program.step_bytes,
        "compile_seconds": program.compile_seconds,
    }
    if machine.chip is not None:
        record |= _times(roofline(machine.chip, record["step_flops"], program.step_bytes))
        record |= {"tokens_per_second": SENTENCES / record["step_seconds"]}
    return record


def _times(terms: dict[str, float]) -> dict[str, Any]:
    bound_by = max(terms, key=terms.__getitem__)
    return {"roofline_seconds": terms, "step_seconds": terms[bound_by], "bound_by": bound_by}


def _layout(config: TrainConfig, devices: int) -> str:
    parallel = config.parallel
    if parallel.strategy == "pmap":
        return "pmap"
    data = devices // (parallel.fsdp * parallel.tensor)
    return f"mesh {data}x{parallel.fsdp}x{parallel.tensor}"


def _by_kind(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
    totals: dict[str, dict[str, float]] = defaultdict(lambda: {"times": 0, "bytes": 0, "sent": 0})
    for one in found:
        total = totals[one.kind]
        total["times"] += one.times
        total["bytes"] += one.times * one.bytes
        total["sent"] += one.sent
    return dict(totals)
