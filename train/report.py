"""`python -m train report RUN …`: what runs have learned, as one page and pictures."""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import jax

from jaxformer.config import TransformerConfig
from jaxformer.errors import UserError
from jaxformer.files import write_text
from jaxformer.pages.heatmap import alignment_lines
from jaxformer.pages.page import details, page, script_note, section, table
from jaxformer.pages.pictures import can_draw, say_where
from jaxformer.run_directory import read_model_config
from jaxformer.transformer import parameter_shapes
from train.arguments import refuse
from train.curves import Chart, Line, png, svg
from train.history import PARTS, History
from train.progress import duration
from train.samples import Sample, best_and_worst
from train.scores import lower_is_better


def add_report(commands: Any) -> None:
    """Add the command to the sub-parsers of `python -m train`."""
    report = commands.add_parser(
        "report",
        help="write a page about a run, or one that compares several",
        description="Write index.html, which needs nothing beside it, and, if matplotlib is "
        "installed, a PNG of each chart.",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="directory that training wrote")
    report.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the page; default: RUN/report, or report if there are several runs",
    )
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace, overrides: list[str]) -> None:
    refuse(overrides, "report")
    index = write_report(options.runs, options.output)
    say_where(index, drawn=can_draw())


def report_after_training(run: Path) -> str:
    """Write the report of a run that has ended and say where it is, or why there is none."""
    try:
        return f"report: {write_report([run])}"
    except UserError as error:
        return f"no report: {error}"


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write index.html and PNGs about runs into a folder; return the page's path.

    Args:
      runs: run directories.
      output: the folder, by default RUN/report, or report for several runs.

    Raises:
      UserError: a run has no metrics, or they are damaged, or the folder cannot be written to.
    """
    histories = [History(run) for run in runs]
    for history, name in zip(histories, short_names(runs), strict=True):
        history.name = name
    if output is None:
        output = Path(runs[0], "report") if len(runs) == 1 else "report"
    index = Path(output, "index.html")
    charts = _charts(histories)
    write_text(index, report_page(histories, charts))
    if can_draw():
        for name, chart in charts.items():
            png(chart, index.parent / f"{name}.png")
    return index


def short_names(runs: Sequence[str | Path]) -> list[str]:
    """Return the shortest path endings that tell runs apart: ["seed0/tiny", "seed1/tiny"]."""
    paths = [Path(run).resolve().parts for run in runs]
    names = [""] * len(paths)
    for length in range(1, max(map(len, paths)) + 1):
        tails = ["/".join(path[-length:]) for path in paths]
        names = [
            name or (tail if tails.count(tail) == 1 else "")
            for name, tail in zip(names, tails, strict=True)
        ]
    return [name or path[-1] for name, path in zip(names, paths, strict=True)]


def report_page(histories: Sequence[History], charts: dict[str, Chart]) -> str:
    """Return the whole page."""
    names = ", ".join(history.name for history in histories)
    drawn = "".join(map(svg, charts.values()))
    samples = [_sentences(history, len(histories) > 1) for history in histories]
    body = [
        f"<h1>{escape(names)}</h1>",
        script_note(names + "".join(samples)),
        _results(histories),
        section("Curves", f'<div class="grid">{drawn}</div>'),
        _time(histories),
        section("Best and worst sentences", *samples),
        _parameters(histories),
        _configuration(histories),
        _machines(histories),
    ]
    return page(names, filter(None, body))


def _results(histories: Sequence[History]) -> str:
    rows, signatures = [], {}
    for history in histories:
        last = history.series("train", "step")[0][-1]
        seconds = sum(history.time_split.values())
        summary = f"{last:,.0f} steps in {duration(seconds)}"
        records = [(f"validation, step {r['step']:,}", r) for r in _best_validation(history)]
        for split in ("validation", "test"):
            for record in history.records(f"final_{split}")[-1:]:
                at_end = record["step"] >= last  # if not, training went on after it
                when = "at the end" if at_end else f"after step {record['step']:,}"
                records.append((f"{split}, {when}", record))
        for what, record in records:
            rows.append(
                (
                    history.name,
                    summary,
                    what,
                    *(_number(record, name) for name in ("perplexity", "bleu", "chrf")),
                    f"{record['exact_match']:.1%}" if "exact_match" in record else "",
                )
            )
            for name in ("bleu_signature", "chrf_signature"):
                signatures[record.get(name)] = name.removesuffix("_signature")
        if not records:
            rows.append((history.name, summary, "not evaluated yet", "", "", "", ""))
    said = "; ".join(
        f"{'BLEU' if name == 'bleu' else 'chrF2'} {signature}"
        for signature, name in signatures.items()
        if signature
    )
    header = ("run", "trained", "split", "perplexity", "BLEU", "chrF2", "exact match")
    return section(
        "Results",
        table(header, rows, numbers=range(3, 7)),
        f'<p class="soft">{escape(said)}</p>' if said else "",
    )


def _best_validation(history: History) -> list[dict[str, Any]]:
    """The record of the best evaluation, by the run's own metric; [] if there is none."""
    metric = history.settings.get("evaluate.metric", "bleu")
    records = [record for record in history.records("validation") if metric in record]
    return sorted(records, key=lambda record: record[metric], reverse=lower_is_better(metric))[-1:]


def _number(record: dict[str, Any], name: str) -> str:
    return f"{record[name]:.2f}" if name in record else ""


def _charts(histories: Sequence[History]) -> dict[str, Chart]:
    several = len(histories) > 1

    def lines(*wanted: tuple[str, str, str], percent: bool = False) -> list[Line]:
        """Return each run's lines of metrics (split, name, label): the first solid, others dashed.

        A single run has colours to spare: each of its lines has its own colour, too.
        """
        found = []
        for number, history in enumerate(histories):
            for index, (split, name, label) in enumerate(wanted):
                steps, values = history.series(split, name)
                label = " ".join(filter(None, (history.name if several else "", label)))
                values = 100 * values if percent else values
                colour = number if several else index
                found.append(Line(label, steps, values, colour, dashed=index > 0))
        return found

    def both(name: str) -> list[Line]:
        return lines(("train", name, "training"), ("validation", name, "validation"))

    warmup, *others = {history.settings.get("optimizer.warmup_steps") for history in histories}
    cooldown = [history.settings.get("optimizer.cooldown_steps") for history in histories]
    marks = {} if others or warmup is None else {"warm-up ends": warmup}
    return {
        "loss": Chart("Loss, label-smoothed, nats a token", both("loss")),
        "perplexity": Chart("Perplexity, unsmoothed, a token", both("perplexity"), log=True),
        "learning-rate": Chart(
            "Learning rate",
            lines(("train", "learning_rate", "learning rate")),
            note="rises in a line, then falls with the inverse square root of the step"
            + ", in the end in a line again" * any(cooldown),
            marks=marks,
        ),
        "gradient-norm": Chart(
            "Gradient norm, before clipping",
            lines(("train", "gradient_norm", "gradient norm")),
            log=True,
        ),
        "speed": Chart(
            "Speed, real target tokens a second",
            lines(("train", "tokens_per_second", "tokens/s")),
            note="compilation, evaluation and saving left out",
        ),
        "waste": Chart(
            "Waste, %",
            lines(
                ("train", "padding", "target positions that are padding"),
                ("train", "host_wait", "time that devices wait for data"),
                percent=True,
            ),
        ),
        "scores": Chart(
            "BLEU and chrF2 of the validation split",
            lines(("validation", "bleu", "BLEU"), ("validation", "chrf", "chrF2")),
            note="signatures under Results",
        ),
    }


def _time(histories: Sequence[History]) -> str:
    """One bar per run: what its time was spent on."""
    height, width, rows, bars = 26, 720, [], []
    splits = [history.time_split for history in histories]
    longest = max(sum(parts.values()) for parts in splits) or 1.0
    for number, (history, parts) in enumerate(zip(histories, splits, strict=True)):
        total, x = sum(parts.values()) or 1.0, 0.0
        for colour, (name, seconds) in enumerate(parts.items()):
            length = seconds / longest * width
            title = f"{history.name}: {name} {duration(seconds)}, {seconds / total:.0%}"
            bars.append(
                f'<rect x="{x:.1f}" y="{number * (height + 8)}" width="{length:.1f}" '
                f'height="{height}" fill="var(--line-{colour})">'
                f"<title>{escape(title)}</title></rect>"
            )
            x += length
        cells = [f"{duration(parts[name])} ({parts[name] / total:.0%})" for name in PARTS]
        rows.append((history.name, *cells, duration(sum(parts.values()))))
    keys = "".join(
        '<span class="key"><svg width="12" height="12" aria-hidden="true"><rect width="12" '
        f'height="12" fill="var(--line-{colour})"/></svg>{name}</span>'
        for colour, name in enumerate(PARTS)
    )
    tall = len(histories) * (height + 8)
    return section(
        "Time",
        f'<svg role="img" aria-label="time by activity" width="{width}" height="{tall}" '
        f'viewBox="0 0 {width} {tall}">{"".join(bars)}</svg><p class="soft">{keys}</p>',
        table(("run", *PARTS, "in all"), rows, numbers=range(1, len(PARTS) + 2)),
        '<p class="soft">compile is the first step after each start; save is how long training '
        "waits for it, files being written meanwhile; other is starting, and what no record "
        "covers.</p>",
    )


def _sentences(history: History, several: bool) -> str:
    title = f"<h3>{escape(history.name)}</h3>" if several else ""
    try:
        best, worst = best_and_worst(history.run)
    except UserError as error:
        return f'{title}<p class="soft">{escape(f"No sentences: {error}")}</p>'
    groups = (("worst", worst), ("best", best))
    return title + "".join(
        _sample(sample, f"{name} {number}")
        for name, samples in groups
        for number, sample in enumerate(samples, start=1)
    )


def _sample(sample: Sample, title: str) -> str:
    rows = [
        ("source", sample.source),
        ("reference", sample.reference),
        ("output", sample.output),
    ]
    drawn = details("where the decoder looked", alignment_lines(sample.alignment.joined()))
    return f"<h3>{title}: chrF2 {sample.chrf:.1f}</h3>{table(('', ''), rows)}{drawn}"


def parameter_counts(config: TransformerConfig) -> dict[str, int]:
    """Parameters of each module of a model, all layers of a stack together."""
    shapes = parameter_shapes(config)
    counts: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        names = [key.key for key in path]
        name = names[0]
        if "layers" in names:
            module = names[2].replace("_residual", ", layer norm").replace("_", " ")
            name = f"{names[0]}, {leaf.shape[0]} x {module}"
        counts[name] = counts.get(name, 0) + leaf.size
    # Embeddings, then the encoder, then the decoder.
    return dict(sorted(counts.items(), key=lambda item: (item[0][:3] == "dec", "," in item[0])))


def _parameters(histories: Sequence[History]) -> str:
    parts: list[str] = []
    for history in histories:
        counts = parameter_counts(read_model_config(history.run))
        total = sum(counts.values())
        rows = [(name, f"{n:,}", f"{n / total:.1%}") for name, n in counts.items()]
        rows.append(("in all", f"{total:,}", ""))
        parts += [f"<h3>{escape(history.name)}</h3>"] * (len(histories) > 1)
        parts.append(table(("module", "parameters", "share"), rows, numbers=(1, 2)))
    return section("Parameters", *parts)


def _configuration(histories: Sequence[History]) -> str:
    names = list(dict.fromkeys(name for history in histories for name in history.settings))
    rows = [
        (name, *(str(history.settings.get(name, "not set")) for history in histories))
        for name in names
    ]
    header = ("", *(history.name for history in histories))
    if len(histories) == 1:
        return section("Configuration", table(header, rows))
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return section(
        "Configuration",
        '<p class="soft">What differs:</p>',
        table(header, differing),
        details(f"all {len(rows)} settings", table(header, rows)),
    )


def _machines(histories: Sequence[History]) -> str:
    rows = []
    shown = {"step", "split", "time", "devices", "device"}
    for history in histories:
        for record in history.records("start"):
            device = f"{record.get('devices', '?')} x {record.get('device', '?')}"
            others = (f"{k} {v}" for k, v in record.items() if v and k not in shown)
            rows.append((history.name, f"{record['step']:,}", device, ", ".join(others)))
    if not rows:
        return section("Machine", '<p class="soft">not recorded</p>')
    return section("Machine", table(("run", "from step", "devices", ""), rows, numbers=(1,)))
