"""How far training is: a live line on a terminal, a plain line at every report elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self, TextIO

from jaxformer.terminal import say, visible

if TYPE_CHECKING:
    import rich.progress

#: The metrics that are shown; a terminal of 80 columns has room for the first three.
_SHOWN = {
    "loss": "loss {:.3f}",
    "perplexity": "ppl {:.2f}",
    "tokens_per_second": "{:,.0f} target tokens/s",
    "compile_seconds": "compiled in {:.1f} s",
    "learning_rate": "lr {:.2e}",
    "epoch": "epoch {:.2f}",
}


class Progress:
    """Shows the progress of training on standard output; use it in a `with` block.

    On a terminal one line with a bar is redrawn in place, and messages appear above it. Elsewhere
    (a file, a pipe) each report is a line of its own, without control codes, flushed:

        step 1,200/8,000 (15%)  ETA 12m 05s  loss 4.123  ppl 35.20  12,345 target tokens/s  …

    Args:
      total_steps: the step at which training ends.
      start_step: the step it resumes from.
      active: False shows nothing, for all processes but the first.
      file: where to write; a terminal if its `isatty` says so.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        active: bool = True,
        file: TextIO | None = None,
    ) -> None:
        self._total, self._active, self._file = total_steps, active, file or sys.stdout
        self._shown = ""
        self._clock: tuple[int, float] | None = None
        self._bar = _bar(self._file, total_steps, start_step) if active else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that `step` steps are done.

        Args:
          step: counted from the beginning of training, not from `start_step`.
          metrics: a report, whose entries in `_SHOWN` are shown. None only moves the bar and
            prints no line.
        """
        if not self._active:
            return
        eta = self._eta(step)
        if metrics is not None:
            shown = [form.format(metrics[name]) for name, form in _SHOWN.items() if name in metrics]
            self._shown = "  ".join(shown)
        if self._bar is not None:
            text = "  ".join(filter(None, (eta, self._shown)))
            self._bar.update(self._bar.task_ids[0], completed=step, text=text)
        elif metrics is not None:
            done = f"step {step:,}/{self._total:,} ({step / max(self._total, 1):.0%})"
            print("  ".join(filter(None, (done, eta, self._shown))), file=self._file, flush=True)

    def message(self, text: str) -> None:
        """Print `text`, above the bar if there is one."""
        text = visible(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._active:
            print(text, file=self._file, flush=True)

    def _eta(self, step: int) -> str:
        """Return the time left, at the mean speed since the first step, which compiles."""
        now = time.monotonic()
        if self._clock is None:
            self._clock = step, now
        first, start = self._clock
        if step <= first or step >= self._total:
            return ""
        return f"ETA {duration((now - start) / (step - first) * (self._total - step))}"


class Count:
    """Says now and then, on standard error, how far a long preparation has come.

        tokenising: 1,240,000 of 5,000,000 pairs (25%)  ETA 2m 51s

    What takes no longer than `every` is done in silence.

    Args:
      what: the activity, such as "tokenising".
      total: pairs in all, if known.
      every: seconds between the lines.
    """

    def __init__(self, what: str, total: int | None = None, *, every: float = 10.0) -> None:
        self._what, self._total, self._every = what, total, every
        self._done = 0
        self._began = self._told = time.monotonic()

    def add(self, pairs: int) -> None:
        """Note that `pairs` more are done."""
        self._done += pairs
        now = time.monotonic()
        if now - self._told < self._every:
            return
        self._told = now
        line = f"{self._what}: {self._done:,} pairs"
        if self._total is not None:
            left = (now - self._began) / self._done * (self._total - self._done)
            line = (
                f"{self._what}: {self._done:,} of {self._total:,} pairs "
                f"({self._done / self._total:.0%})  ETA {duration(left)}"
            )
        say(line)


def _bar(file: TextIO, total_steps: int, start_step: int) -> "rich.progress.Progress | None":
    """Return a rich progress bar, or None if `file` is not a terminal that can redraw a line."""
    if not file.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console = Console(file=file)
    if console.is_dumb_terminal:
        return None
    text = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    bar = Progress(
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[text]}", table_column=text, markup=False),
        console=console,
        expand=True,
        refresh_per_second=4,
    )
    bar.add_task("", total=total_steps, completed=start_step, text="")
    return bar


def duration(seconds: float) -> str:
    """Return a time such as "1d 02h", "3h 07m", "12m 05s" or "9s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"
