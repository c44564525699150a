"""Results of benchmarks: a table for people, JSON lines for programs, a picture of a sweep."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxformer.errors import UserError
from jaxformer.pages.pictures import picture
from train.records import Records, aligned


def decode_table(records: Records) -> str:
    """Return the table of `benchmark_decode`: one line per engine and case."""
    rows = [
        (
            "model",
            "engine",
            "dtype",
            "devices",
            "beams",
            "at once",
            "length",
            "vocabulary",
            "sentences/s",
            "target tokens/s",
            "ms/sentence (p10 to p90)",
            "first is faster by",
            "same output",
            "MFU",
            "peak",
            "needed",
        )
    ]
    case = ("model", "dtype", "devices", "beams", "at once", "length", "vocabulary")
    programs: list[tuple[str, ...]] = [
        (*case, "programs", "compile s", "steps", "bytes/step", *_AT_BEST, "memory")
    ]
    for record in records:
        peak = record["peak_memory_bytes"]
        rows.append(
            (
                record["config"],
                record["engine"],
                record["dtype"],
                str(record["devices"]),
                str(record["beam_size"]),
                _cell(record["batch_tokens"], "d"),
                _cell(record["target_length"], "d"),
                f"{record['vocab_size']:,}",
                f"{record['sentences_per_second']:,.1f}",
                f"{record['target_tokens_per_second']:,.0f}",
                f"{record['milliseconds_per_sentence']:,.2f} "
                f"({1000 * record['seconds_p10'] / record['sentences']:,.2f} to "
                f"{1000 * record['seconds_p90'] / record['sentences']:,.2f})",
                _ratio(record),
                f"{record['same_as_first']:.1%}",
                _cell(record.get("mfu"), ".0%"),
                f"{peak / 2**20:,.0f} MiB" if peak else "",
                _cell(record.get("needed_share"), ".0%"),
            )
        )
        if "mfu" in record:
            programs.append(
                (
                    *_cells_of(rows, case),
                    *_compiled(record),
                    f"{record['steps']:,.0f}",
                    f"{record['step_bytes'] / 1e6:,.1f} MB",
                    *_at_best(record, record["sentences"]),
                    _memory(record),
                )
            )
    footer = (
        f"{_machine(records[0])}\n"
        f"{_versions(records)}\n"
        f"{_peaks(records)}\n"
        "first: the line of jaxformer that comes first with the same sentences\n"
        "at once: source positions; nothing: as many as jaxformer chooses\n"
        "MFU: the products of the formulas, without padding, as a share of that peak; "
        "peak: of memory in use meanwhile\n"
        "needed: share of the rows and steps computed that was for sentences not yet done\n"
        "steps: of a round, in all programs together\n"
        f"{_OF_PROGRAMS}, the largest of them\n"
        "at best: for a sentence, by the products of the formulas, and by the bytes of its steps, "
        "none of them in a cache"
    )
    return "\n\n".join((aligned(rows), aligned(programs), footer))


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
    case = tuple(name for name in header if name != "engine")
    programs: list[tuple[str, ...]] = [
        (
            *case,
            "programs",
            "compile s",
            "GFLOP",
            "of the formulas",
            "bytes",
            *_AT_BEST,
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
                str(record["devices"]),
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
            programs.append(
                (
                    *_cells_of(rows, case),
                    *_compiled(record),
                    f"{record['xla_flops'] / 1e9:,.1f}",
                    f"{record['model_flops'] / record['xla_flops']:.0%}",
                    f"{record['bytes_moved'] / 1e9:,.2f} GB",
                    *_at_best(record, 1),
                    _cell(record["mfu_datasheet"], ".0%"),
                    _memory(record),
                )
            )
    noise = records[-1]["machine"]["prng"]
    footer = (
        f"{_machine(records[-1])}, {noise} noise\n"
        f"{_versions(records)}\n"
        f"{_peaks(records)}\n"
        "faster by: how many times the tokens/s of this line ours are, median of the turns\n"
        "real tokens: of the target, a step; peak: of memory in use meanwhile\n"
        "programs: of the state, the step, and whatever else was compiled before the second step\n"
        f"{_OF_PROGRAMS}\n"
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


def _peaks(records: Records) -> str:
    # A later record has better ones: other work may have lowered earlier ones.
    ours = [record for record in records if "mfu" in record]
    peaks = {each["dtype"]: each["matmul_peak_flops"] for each in ours}
    products = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
    bandwidth = ours[-1]["memory_bandwidth"] / 1e9
    return f"measured peak, a device: {products}, {bandwidth:,.1f} GB/s"


_AT_BEST = ("at best ms", "bound by")
_OF_PROGRAMS = "compile: trace + lower + compile; memory: what the program plans"


def _cells_of(rows: Sequence[tuple[str, ...]], case: Sequence[str]) -> Iterator[str]:
    """The last row's cells in the columns that say which case it is."""
    return (cell for name, cell in zip(rows[0], rows[-1], strict=True) if name in case)


def _compiled(record: dict[str, Any]) -> tuple[str, str]:
    seconds = "{trace_seconds:.1f} + {lower_seconds:.1f} + {compile_seconds:.1f}"
    return str(record["compiled_programs"]), seconds.format(**record)


def _at_best(record: dict[str, Any], parts: int) -> tuple[str, str]:
    """Milliseconds of one of so many parts, by compute and by memory, and which is more."""
    milliseconds = [1000 * seconds / parts for seconds in record["roofline_seconds"].values()]
    return "{:,.1f} compute, {:,.1f} memory".format(*milliseconds), record["bound_by"]


def _memory(record: dict[str, Any]) -> str:
    return f"{record['program_memory_bytes'] / 2**20:,.0f} MiB"


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
    "batch_tokens": "source positions at once",
    "beam_size": "beams",
    "target_length": "length",
    "vocab_size": "vocabulary",
    "devices": "devices",
}


def plot(path: str, records: Records) -> None:
    """Draw throughput and MFU over each dimension that the sweep varies, as a picture file.

    The other dimensions, configuration, engine and dtype tell the lines apart.

    Raises:
      UserError: nothing varies, or as for `picture`.
    """
    several = len({record["config"] for record in records}) > 1
    ours = [record for record in records if "mfu" in record]  # peers may not state their rows
    varied = [name for name in _DIMENSIONS if len({record.get(name) for record in ours}) > 1]
    if not varied:
        raise UserError("nothing to draw: all cases are of the same size")
    with picture(Path(path), 5.0 * len(varied), 7.0) as figure:
        axes = figure.subplots(2, len(varied), squeeze=False)
        for column, name in enumerate(varied):
            others = [other for other in varied if other != name]
            lines: dict[str, list[dict[str, Any]]] = {}
            for record in records:
                label = " ".join(
                    [
                        *([Path(record["config"]).stem] if several else []),
                        record["engine"],
                        record["dtype"],
                        *(f"{_DIMENSIONS[other]} {record[other]}" for other in others),
                    ]
                )
                lines.setdefault(label, []).append(record)
            for label, line in lines.items():
                line = sorted(line, key=lambda record: record[name])
                where = [record[name] for record in line]
                speeds = [record["target_tokens_per_second"] for record in line]
                axes[0, column].plot(where, speeds, marker="o", label=label)
                if "mfu" in line[0]:
                    mfu = [100 * record["mfu"] for record in line]
                    axes[1, column].plot(where, mfu, marker="o", label=label)
            for axis, title in zip(axes[:, column], ("target tokens/s", "MFU, %"), strict=True):
                axis.set(xlabel=_DIMENSIONS[name], ylabel=title, ylim=(0, None), xticks=where)
                axis.grid(alpha=0.3)
            axes[0, column].legend(fontsize="small")
