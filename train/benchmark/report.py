"""Results of benchmarks: a table for people, JSON lines for programs, a picture of a sweep."""

from pathlib import Path
from typing import Any

from jaxformer.errors import UserError
from jaxformer.pages.pictures import picture
from train.records import Records, aligned

NOTHING_TO_DRAW = "nothing to draw: give --batch, --length, --vocab-size or --devices a list"


def decode_table(records: Records) -> str:
    """Return the table of `benchmark_decode`: one line per engine."""
    first = records[0]["engine"]
    header = ("engine", "sentences/s", "tokens/s", "ms/sentence (p10 to p90)")
    ours = ("needed", "programs", "compile s")
    rows = [(*header, f"{first} is faster by", "same output", *ours)]
    for record in records:
        rows.append(
            (
                record["engine"],
                f"{record['sentences_per_second']:,.1f}",
                f"{record['tokens_per_second']:,.0f}",
                f"{record['milliseconds_per_sentence']:,.2f} "
                f"({1000 * record['seconds_p10'] / record['sentences']:,.2f} to "
                f"{1000 * record['seconds_p90'] / record['sentences']:,.2f})",
                _ratio(record),
                f"{record['same_as_first']:.1%}",
                _cell(record["needed_share"], ".0%"),
                _cell(record["compiled_programs"], "d"),
                _cell(record["compile_seconds"], ".1f"),
            )
        )
    devices = records[0]["machine"]["devices"]
    return (
        f"{aligned(rows)}\n\n{devices} device{'s' * (devices > 1)}: {_machine(records[0])}\n"
        f"{_versions(records)}\n"
        "needed: share of the rows and steps computed that was for sentences not yet done"
    )


def steps_table(records: Records) -> str:
    """Return the tables of `benchmark_steps`: engines, then what XLA says of our programs."""
    header = ("config", "engine", "dtype", "devices", "rows", "source", "target", "vocabulary")
    rows = [
        (
            *header,
            "real tokens",
            "ms/step (p10 to p90)",
            "target tokens/s",
            "with padding",
            "padding",
            "MFU",
            "wait",
            "peak",
            "faster by",
        )
    ]
    programs = [
        (
            "programs",
            "compile s",
            "GFLOP",
            "of the formulas",
            "bytes",
            "at best ms",
            "bound by",
            "MFU by data sheet",
            "memory",
        )
    ]
    for record in records:
        milliseconds = {name: 1000 * value for name, value in record["step_seconds"].items()}
        ours, peak = "mfu" in record, record["peak_memory_bytes"]
        rows.append(
            (
                record["config"],
                record["engine"],
                record["dtype"],
                str(record["machine"]["devices"]),
                _cell(record["batch"], "d"),
                _cell(record["source_length"], "d"),
                _cell(record["target_length"], "d"),
                f"{record['vocab_size']:,}",
                f"{record['target_tokens_per_step']:,.0f}",
                "{median:,.1f} ({p10:,.1f} to {p90:,.1f})".format(**milliseconds),
                f"{record['target_tokens_per_second']:,.0f}",
                _cell(record["target_positions_per_second"], ",.0f"),
                _cell(record["padding"], ".1%"),
                f"{record['mfu']:.0%}" if ours else "",
                _cell(record["host_wait"], ".1%"),
                f"{peak / 2**20:,.0f} MiB" if peak else "",
                _ratio(record),
            )
        )
        if ours:
            at_best = [1000 * seconds for seconds in record["roofline_seconds"].values()]
            programs.append(
                (
                    str(record["compiled_programs"]),
                    "{trace_seconds:.1f} + {lower_seconds:.1f} + {compile_seconds:.1f}".format(
                        **record
                    ),
                    f"{record['xla_flops'] / 1e9:,.1f}",
                    f"{record['model_flops'] / record['xla_flops']:.0%}",
                    f"{record['bytes_moved'] / 1e9:,.2f} GB",
                    "{:,.1f} compute, {:,.1f} memory".format(*at_best),
                    record["bound_by"],
                    _cell(record["mfu_datasheet"], ".0%"),
                    f"{record['program_memory_bytes'] / 2**20:,.0f} MiB",
                )
            )
    # The last record has the best peaks: other work may have lowered earlier ones.
    ours_alone = [record for record in records if "mfu" in record]
    last = ours_alone[-1]
    measured = {record["dtype"]: record["matmul_peak_flops"] for record in ours_alone}
    peaks = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, peak in measured.items())
    footer = (
        f"{_machine(last)}, {last['machine']['prng']} noise\n"
        f"{_versions(records)}\n"
        f"measured peak, a device: {peaks}, {last['memory_bandwidth'] / 1e9:,.1f} GB/s\n"
        "faster by: how many times the tokens/s of this line ours are, median of the turns\n"
        "real tokens: of the target, a step; peak: of memory in use meanwhile\n"
        "programs: of the state, the step, and whatever else was compiled before the second step\n"
        "compile: trace + lower + compile; memory: what the program plans\n"
        "GFLOP: by XLA, which counts once what a loop repeats, such as chunks of the loss"
    )
    return "\n\n".join((aligned(rows), aligned(programs), footer))


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"{machine['device']}, {machine['cores']} cores; "
        f"Python {machine['python']}, jax {machine['jax']}, jaxlib {machine['jaxlib']}, "
        f"flax {machine['flax']}; XLA_FLAGS={machine['xla_flags']!r}"
    )


def _versions(records: Records) -> str:
    return ", ".join(dict.fromkeys(record["version"] for record in records))


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(record: dict[str, Any]) -> str:
    ratios = (record["ratio_median"], record["ratio_min"], record["ratio_max"])
    return "{:.2f}x ({:.2f} to {:.2f})".format(*ratios)


#: What a sweep can vary and be drawn over, and the label of its axis.
_DIMENSIONS = {
    "batch": "rows a step",
    "target_length": "positions a row",
    "vocab_size": "vocabulary",
    "devices": "devices",
}


def plot(path: str, records: Records) -> None:
    """Draw throughput and MFU over each dimension that the sweep varies, as a picture file.

    The other dimensions, configuration, engine and dtype tell the lines apart.

    Raises:
      UserError: nothing varies, or as for `picture`.
    """
    points = [record | {"devices": record["machine"]["devices"]} for record in records]
    several = len({point["config"] for point in points}) > 1
    ours = [point for point in points if "mfu" in point]  # peers may not state their rows
    varied = [name for name in _DIMENSIONS if len({point[name] for point in ours}) > 1]
    if not varied:
        raise UserError(NOTHING_TO_DRAW)
    with picture(Path(path), 5.0 * len(varied), 7.0) as figure:
        axes = figure.subplots(2, len(varied), squeeze=False)
        for column, name in enumerate(varied):
            others = [other for other in varied if other != name]
            lines: dict[str, list[dict[str, Any]]] = {}
            for point in points:
                label = " ".join(
                    [
                        *([Path(point["config"]).stem] if several else []),
                        point["engine"],
                        point["dtype"],
                        *(f"{_DIMENSIONS[other]} {point[other]}" for other in others),
                    ]
                )
                lines.setdefault(label, []).append(point)
            for label, line in lines.items():
                line = sorted(line, key=lambda point: point[name])
                where = [point[name] for point in line]
                speeds = [point["target_tokens_per_second"] for point in line]
                axes[0, column].plot(where, speeds, marker="o", label=label)
                if "mfu" in line[0]:
                    mfu = [100 * point["mfu"] for point in line]
                    axes[1, column].plot(where, mfu, marker="o", label=label)
            for axis, title in zip(axes[:, column], ("target tokens/s", "MFU, %"), strict=True):
                axis.set(xlabel=_DIMENSIONS[name], ylabel=title, ylim=(0, None), xticks=where)
                axis.grid(alpha=0.3)
            axes[0, column].legend(fontsize="small")
