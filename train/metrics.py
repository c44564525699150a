"""A run's numbers: metrics.jsonl, and TensorBoard's events beside it."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from jaxformer.errors import UserError
from jaxformer.files import write_text, writing
from jaxformer.run_directory import METRICS_FILE


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, [] if there are none.

    An unfinished last line, left by a run that was killed, is dropped.

    Raises:
      UserError: another line is not JSON.
    """
    path = Path(run) / METRICS_FILE
    if not path.is_file():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not JSON: delete the line") from error
        kinds: dict[str, Any] = {"step": int, "split": str, "time": (int, float)}
        if not isinstance(record, dict) or not all(
            isinstance(record.get(name), kind) for name, kind in kinds.items()
        ):
            raise UserError(f"{path}:{number} is not a record of a step and split: delete the line")
        records.append(record)
    return records


class MetricsWriter:
    """Write a run's numbers to metrics.jsonl and as TensorBoard events, in the run directory.

    A line of metrics.jsonl is one record: `{"step": 500, "split": "validation", "time": 61.7,
    "loss": 3.2, …}`, where time is in seconds of training, over all resumed runs. There is one
    record for each step and split; nan and infinity are null. A record of the split "start"
    describes the machine on which training began, or went on, at its step.

    Args:
      run: the run directory, which exists.
      start_step: the step training resumes from: later records are dropped. 0 starts anew.
      active: False makes this writer do nothing, for all processes but the first.

    Raises:
      UserError: metrics.jsonl is damaged or not writable.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        start_step: int = 0,
        active: bool = True,
    ) -> None:
        self._path = Path(run) / METRICS_FILE
        self._file: TextIO | None = None
        self._events: Any = None
        if not active:
            return
        with writing(self._path, "choose another --run"):
            self._keep(lambda record: start_step > 0 and record["step"] <= start_step)
        records = read_metrics(run)
        self._written = {(record["step"], record["split"]) for record in records}
        self._start = time.monotonic() - max((record["time"] for record in records), default=0.0)
        # Not `SummaryWriter`: after one failed write its thread is dead, and whoever writes more
        # waits for it for ever. The suffix keeps two runs that start in the same second from
        # writing to the same file.
        from tensorboardX.event_file_writer import EventsWriter

        with writing(self._path.parent, "choose another --run"):
            self._events = EventsWriter(str(self._path.parent / "events"), f".from{start_step}")
        # From such a start on, TensorBoard hides what an interrupted run wrote.
        self._add_event(start_step + 1, session_log={"status": "START"})

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Record `values`, such as {"loss": 3.2, "bleu": 41.02, "signature": "nrefs:1|…"}.

        Numbers may be numpy's or JAX's; strings go to metrics.jsonl alone. A second record of the
        same step and split replaces the first.

        Raises:
          UserError: metrics.jsonl or the events cannot be written.
        """
        if self._file is None:
            return
        values = {name: _plain(value) for name, value in values.items()}
        seconds = round(time.monotonic() - self._start, 3)
        record = {"step": step, "split": split, "time": seconds, **values}
        with writing(self._path, "free disk space, then run the same command again"):
            if (step, split) in self._written:
                self._keep(lambda record: (record["step"], record["split"]) != (step, split))
            self._file.write(_line(record))
        self._written.add((step, split))
        scalars = [
            {"tag": f"{split}/{name}", "simple_value": value}
            for name, value in values.items()
            if isinstance(value, float | int)
        ]
        self._add_event(step, summary={"value": scalars})

    def close(self) -> None:
        """Close the files. A full disk is no error here: every record is written already."""
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with writing(self._path.parent, "free disk space, then run the same command again"):
            self._events.write_event(Event(step=step, wall_time=time.time(), **content))
            self._events.flush()

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop all but the `wanted` records from the file, atomically; open it for appending."""
        if self._file is not None:
            self._file.close()
        records = filter(wanted, read_metrics(self._path.parent))
        write_text(self._path, "".join(map(_line, records)))
        self._file = self._path.open("a", buffering=1, encoding="utf-8")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> float | int | str | None:
    """Return a value as JSON can hold it: any number as Python's, nan and infinity as None."""
    if value is None or isinstance(value, int | str):
        return value
    value = float(value)
    return value if math.isfinite(value) else None
