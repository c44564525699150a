"""Corpus scores with their sacreBLEU signatures, and where a run's numbers are written."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from jaxformer.errors import UserError
from jaxformer.run import METRICS_FILE


@dataclass(frozen=True)
class Score:
    """A corpus score from 0 to 100, and the sacreBLEU signature that says how it was computed."""

    name: str
    value: float
    signature: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} ({self.signature})"


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    tokenize: str = "13a",
) -> Score:
    """Return the corpus BLEU of detokenised translations (Papineni et al. 2002; Post 2018).

    Args:
      hypotheses: one translation a sentence.
      references: one reference a sentence, in the same order.
      tokenize: sacreBLEU's tokenizer: "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", …;
        "none" for text that is tokenised already.

    Raises:
      UserError: the counts differ or are 0, or the tokenizer does not exist or cannot be loaded.
    """
    return _score(bleu_metric(tokenize), hypotheses, references)


def bleu_metric(tokenize: str) -> Any:
    """Return sacreBLEU's BLEU, whose tokenizer is loaded by then.

    Raises:
      UserError: the tokenizer does not exist or cannot be loaded.
    """
    from sacrebleu.metrics.bleu import BLEU

    if tokenize not in BLEU.TOKENIZERS:
        choices = ", ".join(BLEU.TOKENIZERS)
        raise UserError(f"sacreBLEU has no tokenizer {tokenize!r}: choose one of {choices}")
    try:
        # force: no warning about text that looks tokenised, which "none" asks for.
        return BLEU(tokenize=tokenize, force=tokenize == "none")
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"sacreBLEU's tokenizer {tokenize!r} cannot be used: {reason}") from error


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Return the corpus chrF2, the character n-gram F-score of Popović (2015).

    Arguments and errors are those of `bleu`.
    """
    from sacrebleu.metrics.chrf import CHRF

    return _score(CHRF(), hypotheses, references)


def _score(metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    if len(hypotheses) != len(references) or not references:
        raise UserError(
            f"{len(hypotheses)} translations cannot be scored with {len(references)} references: "
            "give one reference for each translation, and at least one"
        )
    result = metric.corpus_score(hypotheses, [references])
    return Score(result.name, result.score, metric.get_signature().format())


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, [] if there are none.

    A last line without an end, left by a run that was killed, is dropped.

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
            raise UserError(f"{path}:{number} is no record of a step and a split: delete the line")
        records.append(record)
    return records


def has_ended(run: str | Path) -> bool:
    """Whether the last that a run wrote are its final scores."""
    records = read_metrics(run)
    return bool(records) and records[-1]["split"].startswith("final_")


class MetricsWriter:
    """Write a run's numbers to metrics.jsonl and as TensorBoard events, in the run directory.

    A line of metrics.jsonl is one record: `{"step": 500, "split": "validation", "time": 61.7,
    "loss": 3.2, …}`, where time is in seconds of training, over all resumed runs. There is one
    record for each step and split; nan and infinity are null. The split "start" says on what the
    training began, or went on, at its step.

    Args:
      run: the run directory, which exists.
      start_step: the step training resumes from: later records are dropped. 0 starts anew.
      tensorboard: whether to write events too.
      active: False makes this writer do nothing, for all processes but the first.

    Raises:
      UserError: metrics.jsonl is damaged or not writable, or tensorboardX is not installed.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        start_step: int = 0,
        tensorboard: bool = True,
        active: bool = True,
    ) -> None:
        self._path = Path(run) / METRICS_FILE
        self._file: TextIO | None = None
        self._events: Any = None
        if not active:
            return
        try:
            self._keep(lambda record: 0 < start_step >= record["step"])
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        records = read_metrics(run)
        self._written = {(record["step"], record["split"]) for record in records}
        self._start = time.monotonic() - max((record["time"] for record in records), default=0.0)
        if tensorboard:
            from tensorboardX import SummaryWriter

            # TensorBoard hides what an interrupted run wrote from purge_step on. The suffix keeps
            # two runs that start in the same second from writing to the same file.
            self._events = SummaryWriter(
                str(run), purge_step=start_step + 1, filename_suffix=f".from{start_step}"
            )

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Record `values`, such as {"loss": 3.2, "bleu": 41.02, "signature": "nrefs:1|…"}.

        Numbers may be numpy's or JAX's; strings go to metrics.jsonl alone. A second record of the
        same step and split takes the place of the first.

        Raises:
          UserError: metrics.jsonl cannot be written.
        """
        if self._file is None:
            return
        values = {name: _plain(value) for name, value in values.items()}
        seconds = round(time.monotonic() - self._start, 3)
        record = {"step": step, "split": split, "time": seconds, **values}
        try:
            if (step, split) in self._written:
                self._keep(lambda record: (record["step"], record["split"]) != (step, split))
            self._file.write(_line(record))
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free disk space, then run the same "
                "command again"
            ) from error
        self._written.add((step, split))
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, float | int):
                    self._events.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the other records from the file, in one move, and open it for appending."""
        if self._file is not None:
            self._file.close()
        records = filter(wanted, read_metrics(self._path.parent))
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(map(_line, records)), encoding="utf-8")
        partial.replace(self._path)
        self._file = self._path.open("a", buffering=1, encoding="utf-8")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> float | int | str | None:
    """Return a number, also one of numpy or JAX, as JSON has it."""
    if value is None or isinstance(value, int | str):
        return value
    value = float(value)
    return value if math.isfinite(value) else None
