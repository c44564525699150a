"""A run's metrics.jsonl as columns, fast enough for a million records."""

from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformer.errors import UserError, one_line
from jaxformer.run_directory import METRICS_FILE, read_config
from train.config import flatten
from train.metrics import read_metrics

if TYPE_CHECKING:
    import pyarrow as pa

Series = tuple[np.ndarray, np.ndarray]

#: What a run spends its time on, in the order it is shown in.
PARTS = ("compile", "steps", "evaluate", "save", "other")


class History:
    """The metrics and the configuration of a run.

    Attributes:
      run: its directory.
      name: a short name; a caller that shows several runs may change it.
      settings: its configuration, {"model.d_model": 512, …}.

    Raises:
      UserError: the directory is not a run, or its metrics are missing, empty or damaged.
    """

    def __init__(self, run: str | Path):
        self.run = Path(run)
        self.name = self.run.resolve().name
        self.settings = flatten(read_config(run))
        self._table = _read(self.run)
        if len(self._rows("train")) == 0:
            raise UserError(f"{self.run / METRICS_FILE} holds no training record yet: train longer")

    def column(self, split: str, name: str) -> np.ndarray:
        """The values of a metric in a split, in order, float64; nan where a record has none."""
        rows = self._rows(split)
        if name not in rows.column_names:
            return np.full(len(rows), np.nan)
        return _numbers(rows.column(name))

    def series(self, split: str, name: str) -> Series:
        """Steps and values of a metric in a split, sorted by step, where there is a value."""
        steps, values = self.column(split, "step"), self.column(split, name)
        known = np.isfinite(values)
        steps, values = steps[known], values[known]
        if np.any(np.diff(steps) < 0):  # a record that replaced another stands at the end
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
        return steps, values

    def records(self, split: str) -> list[dict[str, Any]]:
        """The records of a split that has few of them, without their missing values."""
        rows = self._rows(split).to_pylist()
        return [{name: x for name, x in row.items() if x is not None} for row in rows]

    @cached_property
    def time_split(self) -> dict[str, float]:
        """Seconds spent on each of `PARTS`.

        A training record tells how long its steps took: tokens / (tokens / s) or, for the first
        after a start, the seconds of compiling. `time` tells when a record was written; the rest is
        what lies between. Saving counts only as long as training waits for it.
        """
        encoded = self._table.column("split").combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        names = encoded.dictionary.to_pylist()

        def among(*wanted: str) -> np.ndarray:
            return np.isin(codes, [i for i, name in enumerate(names) if name.startswith(wanted)])

        def after(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([[False], rows[:-1]])

        train, evaluation = among("train"), among("validation", "final_")
        times = _numbers(self._table.column("time"))
        gaps = np.maximum(np.diff(times, prepend=0.0), 0.0)
        tokens, speed = (self.column("train", n) for n in ("target_tokens", "tokens_per_second"))
        seconds = np.zeros(len(gaps))
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds[train] = np.nan_to_num(tokens / speed, posinf=0.0)
        seconds[train] += np.nan_to_num(self.column("train", "compile_seconds"))
        seconds = np.minimum(seconds, gaps)
        first = train & after(among("start"))
        first[0] |= train[0]  # from a version that did not record the start
        parts = {
            "compile": seconds[first].sum(),
            "steps": seconds[train & ~first].sum(),
            "evaluate": gaps[evaluation].sum(),
            "save": (gaps - seconds)[train & after(evaluation)].sum(),
        }
        parts["other"] = gaps.sum() - sum(parts.values())
        return {name: float(parts[name]) for name in PARTS}

    @cache  # noqa: B019 (a handful of runs, read once)
    def _rows(self, split: str) -> "pa.Table":
        import pyarrow.compute as pc

        return self._table.filter(pc.equal(self._table.column("split"), split))


def _read(run: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.json

    path = run / METRICS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; train the run first") from error
    end = data.rfind(b"\n") + 1  # an unfinished last line is from a run that was killed
    if not end or data.isspace():
        raise UserError(f"{path} is empty: nothing has been trained yet")
    try:
        table = pyarrow.json.read_json(pa.BufferReader(pa.py_buffer(data).slice(0, end)))
    except pa.ArrowInvalid as error:
        read_metrics(run)  # names the line
        raise UserError(
            f"{path} cannot be read: {one_line(error)}; mend or delete the line"
        ) from error
    if missing := {"step", "split", "time"} - set(table.column_names):
        raise UserError(
            f"{path} has no {', '.join(sorted(missing))}: restore the file that training wrote"
        )
    for name in ("step", "time"):
        if not np.all(np.isfinite(_numbers(table.column(name)))):
            read_metrics(run)  # names the line
            raise UserError(f"{path}: a {name} is not a number; delete its line")
    return table


def _numbers(column: "pa.ChunkedArray") -> np.ndarray:
    import pyarrow as pa

    if pa.types.is_string(column.type):
        return np.full(len(column), np.nan)
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
