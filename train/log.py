"""What a run says about itself while it trains."""

import math
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxformer.errors import UserError
from train.config import TrainConfig
from train.data.batches import Batches
from train.metrics import MetricsWriter
from train.progress import Progress
from train.scores import perplexity


class Log:
    """Collects the metrics of steps and, now and then, writes and shows their means.

    Between reports nothing waits for the device, so that it always has the next step queued.
    """

    def __init__(
        self, writer: MetricsWriter, progress: Progress, batches: Batches, rows_per_step: int
    ) -> None:
        self._writer, self._progress = writer, progress
        self._epochs = batches.epochs
        self._positions = rows_per_step * batches.target_length
        self._pending: list[dict[str, jax.Array]] = []
        self._compiled = False
        self.restart_clock()

    def timed(self, batches: Iterable[Any]) -> Generator[Any]:
        """Pass batches on and note how long training waits for them."""
        batches = iter(batches)
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - began
            yield batch

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of one step, without waiting for them."""
        self._pending.append(metrics)

    def restart_clock(self) -> None:
        """Begin to measure anew, so that the speed excludes what was not training."""
        self._began, self._waited = time.monotonic(), 0.0

    def flush(self, step: int) -> None:
        """Report the steps since the last report; `step` steps are done in all.

        Raises:
          UserError: a loss was not finite; the message names the step.
        """
        if not self._pending:
            return
        steps = jax.device_get(self._pending)
        seconds = time.monotonic() - self._began
        for number, metrics in enumerate(steps, start=step - len(steps) + 1):
            check_finite("loss", float(metrics["loss"]), number)
        tokens = np.array([metrics["tokens"] for metrics in steps], np.float64)

        def per_token(name: str) -> float:
            return float(np.average([metrics[name] for metrics in steps], weights=tokens))

        nll = per_token("nll")
        values = {
            "loss": per_token("loss"),
            "nll": nll,
            "perplexity": perplexity(nll),
            "gradient_norm": float(np.mean([metrics["gradient_norm"] for metrics in steps])),
            "learning_rate": float(steps[-1]["learning_rate"]),
            "target_tokens": float(tokens.sum()),
            "padding": 1.0 - float(tokens.sum()) / (self._positions * len(steps)),
            "host_wait": self._waited / seconds,
            "epoch": self._epochs(step),
        }
        if self._compiled:
            values["tokens_per_second"] = float(tokens.sum()) / seconds
        else:  # the first report after a start covers one step, nearly all of it compilation
            values["compile_seconds"] = seconds
            self._compiled = True
        self._writer.write(step, "train", values)
        self._progress.update(step, values)
        self._pending = []
        self.restart_clock()


def check_finite(name: str, loss: float, step: int) -> None:
    """Raise `UserError` if `loss` is nan or infinite: the state is not worth saving."""
    if not math.isfinite(loss):
        raise UserError(
            f"the {name} is {loss} at step {step}: lower optimizer.peak_learning_rate or set "
            "optimizer.clip_norm; the checkpoints saved before are intact"
        )


def describe(config: TrainConfig, params: Any, batches: Batches, start: int) -> Iterator[str]:
    """Yield what is about to happen, in a few lines."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    yield f"run        {config.run}" + (f", from step {start:,}" if start else "")
    yield (
        f"devices    {jax.device_count()} x {jax.devices()[0].device_kind} "
        f"in {jax.process_count()} process{'es' * (jax.process_count() > 1)}, jax {jax.__version__}"
    )
    yield f"model      {size / 1e6:.2f} million parameters, {config.model.dtype}"
    names = ["data.train", *config.data.extra]
    for name, part, share in zip(names, batches.parts, batches.shares, strict=True):
        left_out = [
            f"{len(pairs):,} {why}"
            for why, pairs in (("empty", part.packing.empty), ("too long", part.packing.too_long))
            if len(pairs)
        ]
        pairs = f"{len(part.corpus):,} pairs" + (
            f", {' and '.join(left_out)} left out" if left_out else ""
        )
        if len(batches.parts) > 1:
            pairs = f"{share:.1%} {name}: {pairs}"
        steps = len(part) / (share * batches.rows_per_batch)
        # The last batch of an epoch, completed with empty rows, is a step too.
        epoch = f"{batches.steps_per_epoch:,}" if batches.whole_epochs else f"{steps:,.1f}"
        yield f"data       {pairs}; {epoch} step{'s' * (epoch != '1')} an epoch"
    yield (
        f"batches    {batches.rows_per_batch} rows of {batches.source_length} source and "
        f"{batches.target_length} target positions, {batches.target_fill:.1%} of the target's real"
    )


def examples(sources: list[str], hypotheses: list[str], references: list[str]) -> Iterator[str]:
    """Yield five translations, evenly spread."""
    for index in range(0, len(sources), max(1, len(sources) // 5))[:5]:
        yield (
            f"\nsource     {sources[index]}\noutput     {hypotheses[index]}\n"
            f"reference  {references[index]}"
        )
