"""Curves over steps: SVG inside a page, and PNG files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from jaxformer.pages.page import COLOURS
from jaxformer.pages.pictures import literal, picture

# For a run's first and second curve; then the same for runs whose colours repeat.
_DASHES = ("", "5 3", "1 2", "8 2 1 2")
_STYLES = ("-", "--", ":", "-.")  # the same to matplotlib

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 8, 36
#: Lines with no more points than this have each of them marked.
_MARKED = 60


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
      label: its name in the legend.
      steps, values: ascending steps, and what was measured there.
      colour: number of its colour; of several runs each has its own.
      dashed: to tell it from another curve of that colour.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Some curves on common axes.

    Attributes:
      title: what is measured, with its unit.
      lines: the curves; those without points are left out.
      log: whether the values are on a logarithmic scale.
      note: a line of text below.
      marks: {label: step} of vertical lines.
    """

    title: str
    lines: Sequence[Line]
    log: bool = False
    note: str = ""
    marks: dict[str, float] | None = None

    @property
    def drawn(self) -> list[Line]:
        """The lines with points that the scale can show, reduced to these points."""
        lines = []
        for line in self.lines:
            known = line.values > 0 if self.log else np.isfinite(line.values)
            if np.any(known):
                steps, values = line.steps[known], line.values[known]
                lines.append(Line(line.label, steps, values, line.colour, line.dashed))
        return lines


def thin(steps: np.ndarray, values: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first, least, greatest and last point of each of `columns` parts of the axis.

    Drawn that many columns wide, the curve looks as it would with all its points.
    """
    if len(steps) <= 4 * columns:
        return steps, values
    span = steps[-1] - steps[0]
    part = np.minimum((steps - steps[0]) / span * columns, columns - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    counts = np.diff(starts, append=len(part))
    keep = [starts, starts + counts - 1]
    for extreme in (np.minimum, np.maximum):
        best = np.repeat(extreme.reduceat(values, starts), counts)
        hits = np.flatnonzero(values == best)
        keep.append(hits[np.unique(part[hits], return_index=True)[1]])
    chosen = np.unique(np.concatenate(keep))
    return steps[chosen], values[chosen]


def svg(chart: Chart) -> str:
    """Return a figure for a page or, if there are no points, a line that says so."""
    lines = chart.drawn
    title = f"<h3>{escape(chart.title)}</h3>"
    if not lines:
        return f'<figure>{title}<p class="soft">not recorded</p></figure>'
    columns = _WIDTH - _LEFT - _RIGHT
    thinned = [thin(line.steps, line.values, columns) for line in lines]
    x_low, x_high = _limits([steps for steps, _ in thinned], log=False)
    y_low, y_high = _limits([values for _, values in thinned], log=chart.log)

    def x_of(steps: np.ndarray | float) -> np.ndarray:
        return _LEFT + (np.asarray(steps) - x_low) / (x_high - x_low) * columns

    def y_of(values: np.ndarray | float) -> np.ndarray:
        scale = np.log10 if chart.log else np.asarray
        low, high = float(scale(y_low)), float(scale(y_high))
        share = (scale(values) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in ticks(y_low, y_high, log=chart.log):
        y = float(y_of(value))
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="var(--rule)"/>'
            f'<text class="soft" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{short(value)}</text>"
        )
    for value in ticks(x_low, x_high):
        parts.append(
            f'<text class="soft" x="{float(x_of(value)):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
            f'text-anchor="middle">{short(value)}</text>'
        )
    parts.append(
        f'<text class="soft" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">step</text>'
    )
    for label, step in (chart.marks or {}).items():
        if x_low < step < x_high:
            x = float(x_of(step))
            parts.append(
                f'<path d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="var(--soft)" '
                f'stroke-dasharray="1 3"/><text class="soft" x="{x + 5:.1f}" '
                f'y="{_HEIGHT - _BOTTOM - 6}">{escape(label)}</text>'
            )
    for line, (steps, values) in zip(lines, thinned, strict=True):
        parts.append(_path(line, x_of(steps), y_of(values)))
        if len(line.steps) <= _MARKED:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{_colour(line)}">'
                f"<title>{escape(line.label)}, step {step:,.0f}: {value:,.4g}</title></circle>"
                for x, y, step, value in zip(
                    x_of(line.steps), y_of(line.values), line.steps, line.values, strict=True
                )
            ]
    names = escape(", ".join(line.label for line in lines))
    notes = [chart.note] if chart.note else []
    if any(len(steps) < len(line.steps) for line, (steps, _) in zip(lines, thinned, strict=True)):
        most = max(len(line.steps) for line in lines)
        notes.append(f"{most:,} records: of each pixel column first, least, greatest, last")
    return (
        f'<figure>{title}<svg role="img" aria-label="{escape(chart.title)}: {names}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-size="12">{"".join(parts)}</svg>'
        f"<figcaption>{''.join(map(_key, lines))}"
        f"{''.join(f'<br>{escape(note)}' for note in notes)}</figcaption></figure>"
    )


def png(chart: Chart, path: Path) -> None:
    """Draw the chart with matplotlib.

    Raises:
      UserError: matplotlib is not installed, or the file cannot be written.
    """
    text = chart.title + "".join(line.label for line in chart.lines)
    with picture(path, 6.0, 3.6, text) as figure:
        axis = figure.subplots()
        lines = chart.drawn
        for line in lines:
            steps, values = thin(line.steps, line.values, 600)
            axis.plot(
                steps,
                values,
                color=COLOURS[line.colour % len(COLOURS)],
                linestyle=_STYLES[_style(line)],
                linewidth=1.2,
                marker="o" if len(line.steps) <= _MARKED else "",
                markersize=3,
            )
        if lines:  # named here: matplotlib leaves out lines whose own names begin with "_"
            axis.legend(axis.lines, [literal(line.label) for line in lines])
        for label, step in (chart.marks or {}).items():
            axis.axvline(step, color="0.5", linestyle=":", linewidth=1)
            axis.annotate(label, (step, 0.02), xycoords=("data", "axes fraction"))
        axis.set(xlabel="step", title=chart.title, yscale="log" if chart.log else "linear")
        axis.grid(alpha=0.3)


def ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """About five round numbers from `low` to `high`."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
            if len(found) >= 3:
                return found[:: -(-len(found) // 7)]
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * digit for digit in (1, 2, 5, 10) if size * digit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 12k, 0.05, 3e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _limits(values: Sequence[np.ndarray], *, log: bool) -> tuple[float, float]:
    """Return the range of the values, never empty; it begins at 0 if that is near."""
    low = float(min(np.min(v) for v in values))
    high = float(max(np.max(v) for v in values))
    if log:
        return (low / 1.1, high * 1.1)
    if 0 < low < high / 2:
        low = 0.0
    margin = 0.03 * (high - low) or abs(high) or 1.0
    return (low if low == 0.0 else low - margin, high + margin)


def _style(line: Line) -> int:
    return (line.dashed + 2 * (line.colour // len(COLOURS))) % len(_DASHES)


def _dash_array(line: Line) -> str:
    dashes = _DASHES[_style(line)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _path(line: Line, x: np.ndarray, y: np.ndarray) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    return (
        f'<polyline fill="none" stroke="{_colour(line)}" stroke-width="1.5" '
        f'stroke-linejoin="round"{_dash_array(line)} points="{points}"/>'
    )


def _key(line: Line) -> str:
    return (
        f'<span class="key"><svg width="24" height="8" aria-hidden="true"><path d="M0 4H24" '
        f'stroke="{_colour(line)}" stroke-width="2"{_dash_array(line)}/></svg>'
        f"{escape(line.label)}</span>"
    )


def _colour(line: Line) -> str:
    return f"var(--line-{line.colour % len(COLOURS)})"
