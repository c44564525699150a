"""A plan as tables for people, with what it assumes, and as a picture over the machines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxformer.errors import UserError
from jaxformer.pages.pictures import picture
from train.plan.machines import Machine
from train.records import Records, aligned

NOTHING_TO_DRAW = "nothing to draw: give --topology several slices that can hold the model"

_COLORS = {"compute": "C0", "memory": "C1", "interconnect": "C2"}


def plan_tables(records: Records, machines: Sequence[Machine]) -> str:
    """Return a plan's tables: memory, work and time of training, decoding, and assumptions."""
    steps = [record for record in records if record["plan"] == "train"]
    parts = [
        "Compiled, not measured. Of one device, if nothing else is said; 1 GB is 1e9 bytes.",
        aligned([_MEMORY, *map(_memory, steps)]),
        aligned([_WORK, *map(_work, steps)]),
    ]
    timed = [record for record in steps if "step_seconds" in record]
    if timed:
        parts.append(aligned([_TIME, *map(_time, timed)]))
    decodes = [record for record in records if record["plan"] == "decode"]
    if decodes:
        parts.append(aligned([_DECODE, *map(_decode, decodes)]))
    parts += [
        f"{record['machine']}: the compiler says: {record['refusal']}"
        for record in records
        if "refusal" in record
    ]
    return "\n\n".join([*parts, _assumptions(steps, decodes, machines)])


_MEMORY = (
    *("machine", "chips", "layout", "rows", "batch tokens", "parameters", "optimizer", "batch"),
    *("temporaries", "code", "total", "of", "fits", "largest batch tokens"),
)


def _memory(record: dict[str, Any]) -> tuple[str, ...]:
    memory = record["memory"]
    names = ("parameters", "optimizer", "batch", "temporaries", "code", "total")
    return (
        record["machine"],
        str(record["chips"]),
        record["layout"],
        f"{record['rows']:,}",
        f"{record['batch_tokens']:,}",
        *(_size(memory[name]) if name in memory else "" for name in names),
        _size(record["memory_available"]),
        "yes" if record["fits"] else "NO",
        f"{record['largest_batch_tokens']:,}" if "largest_batch_tokens" in record else "",
    )


_WORK = (
    *("machine", "TFLOP", "by XLA", "moved", "moved, by XLA", "sent"),
    *("collectives", "compiled in s"),
)


def _work(record: dict[str, Any]) -> tuple[str, ...]:
    if "xla_flops" not in record:
        return (record["machine"], *[""] * (len(_WORK) - 1))
    devices = record["devices"]
    kinds = (
        f"{total['times']} {kind}, {_size(total['bytes'])}"
        for kind, total in record["collectives"].items()
    )
    return (
        record["machine"],
        f"{record['model_flops'] / devices / 1e12:,.3f}",
        f"{record['xla_flops'] / devices / 1e12:,.3f}",
        _size(record["bytes_moved"]),
        _size(record["xla_bytes"]),
        _size(record["bytes_sent"]),
        "; ".join(kinds) or "none",
        f"{record['compile_seconds']:.1f}",
    )


_TIME = (
    *("machine", "compute ms", "memory ms", "interconnect ms", "ms/step at least", "bound by"),
    *("tokens/s at most", "hours at least", "chip-hours at least"),
)


def _time(record: dict[str, Any]) -> tuple[str, ...]:
    terms = record["roofline_seconds"]
    return (
        record["machine"],
        *(f"{1000 * terms[name]:,.2f}" for name in _COLORS),
        f"{1000 * record['step_seconds']:,.2f}",
        record["bound_by"],
        f"{record['tokens_per_second']:,.0f}",
        f"{record['hours']:,.2f}",
        f"{record['chip_hours']:,.1f}",
    )


_DECODE = (
    *("decoding on", "sentences", "beams", "source", "longest", "memory", "of", "GFLOP/token step"),
    *("moved/token step", "ms/token step at least", "bound by", "tokens/s at most"),
)


def _decode(record: dict[str, Any]) -> tuple[str, ...]:
    timed = "step_seconds" in record
    return (
        record["machine"],
        str(record["sentences"]),
        str(record["beam_size"]),
        str(record["source_length"]),
        str(record["max_length"]),
        _size(record["memory"]),
        _size(record["memory_available"]),
        f"{record['step_flops'] / 1e9:,.2f}",
        _size(record["step_bytes"]) if "step_bytes" in record else "",
        f"{1000 * record['step_seconds']:,.3f}" if timed else "",
        record["bound_by"] if timed else "",
        f"{record['tokens_per_second']:,.0f}" if timed else "",
    )


def _assumptions(steps: Records, decodes: Records, machines: Sequence[Machine]) -> str:
    first = steps[0]
    lines = [
        f"a row has {first['source_length']} source and {first['target_length']} target positions, "
        "full of tokens (data.source_length=0 is taken for data.target_length; a run chooses it by "
        "its text, and may choose more: give what its line `batches` says)",
        "rows: those of the batch, and the empty ones that a run adds so that all devices have as "
        "many; they take time and hold no tokens",
        "temporaries: activations, gradients and all else that XLA plans for; what JAX and the "
        "driver keep for themselves is not in any figure",
        "TFLOP: matrix products by the paper's formulas; by XLA: what it counts, loops once",
        "moved: bytes of main memory by the compiled program's text, loops as often as they go "
        "round; by XLA: its count, on-chip memory included, loops once",
        "sent: what a ring sends, collectives in loops as often as they run; no latency, no "
        "contention, all links of a chip used",
        "ms/step: the longest of three terms, as if the others hid behind it, no input, logging or "
        f"evaluation; hours: {first['steps']:,} steps of it",
    ]
    if decodes:
        lines.append(
            f"decoding: {decodes[0]['sentences']} sentences of {decodes[0]['source_length']} "
            "tokens; tokens of the best beam"
        )
    if first["dtype"] == "float32":
        lines.append("float32 products are made at the rate of bfloat16, as on a TPU by default")
    searched = dict.fromkeys(one["largest_found_on"] for one in steps if "largest_found_on" in one)
    if searched:
        lines.append(
            f"largest batch: seen to compile and fit on {', '.join(searched)}; as much per device "
            "on other slices of the same chips"
        )
    chips = {machine.chip.name: machine.chip for machine in machines if machine.chip is not None}
    for chip in chips.values():
        half = " A chip is two devices." if chip.devices == 2 else ""
        lines.append(
            f"{chip.name}: {chip.flops / 1e12:,.0f} TFLOP/s bfloat16, {_size(chip.memory)} at "
            f"{chip.memory_bandwidth / 1e9:,.0f} GB/s, sends {chip.interconnect / 1e9:,.0f} GB/s "
            f"({chip.source}).{half}"
        )
    if not chips:
        lines.append(
            "no data sheet of this machine is known here, so no times and no largest batch"
        )
    return "Assumed:\n" + "\n".join(f"- {line}" for line in lines)


def _size(number: float | None) -> str:
    if number is None:
        return "too much"
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def plot_plan(path: str, records: Records) -> None:
    """Draw step time, throughput, cost and memory over the number of chips.

    Raises:
      UserError: there is only one machine, or as for `picture`.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "chip_hours" in record:
            lines.setdefault(record["machine"].partition(":")[0], []).append(record)
    if max(map(len, lines.values()), default=0) < 2:
        raise UserError(NOTHING_TO_DRAW)
    with picture(Path(path), 11.0, 8.0) as figure:
        (time, speed), (cost, memory) = figure.subplots(2, 2)
        for marker, (chip, points) in zip("os^Dv", lines.items(), strict=False):
            points.sort(key=lambda point: point["chips"])
            chips = [point["chips"] for point in points]
            for term, color in _COLORS.items():
                values = [1000 * point["roofline_seconds"][term] for point in points]
                time.plot(chips, values, marker=marker, color=color, label=f"{chip} {term}")
            for axis, name, scale in (
                (speed, "tokens_per_second", 1.0),
                (cost, "chip_hours", 1.0),
                (memory, "memory", 1e-9),
            ):
                values = [
                    point[name]["total"] if name == "memory" else point[name] for point in points
                ]
                axis.plot(chips, [scale * value for value in values], marker=marker, label=chip)
            available = points[0]["memory_available"] * 1e-9
            memory.axhline(available, linestyle=":", color=memory.lines[-1].get_color())
        for axis, title in (
            (time, "ms a step, at least"),
            (speed, "target positions/s, at most"),
            (cost, f"chip-hours of {records[0]['steps']:,} steps, at least"),
            (memory, "GB of a device; dotted: there are"),
        ):
            axis.set(xlabel="chips", ylabel=title, xscale="log", yscale="log")
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
        figure.suptitle("compiled, not measured")
