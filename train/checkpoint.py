"""Checkpoints of a training run: save in the background, keep the last and the best, average."""

import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxformer.checkpoints import (
    AVERAGE,
    CHECKPOINTS_DIR,
    INFO,
    METRICS,
    OPTIMIZER,
    PARAMS,
    check_same_arrays,
    checkpoint_steps,
    describe_arrays,
    evaluations,
    is_intact,
    load_params,
)
from jaxformer.errors import UserError, reason
from jaxformer.terminal import warn
from train.checkpoint_items import (
    DamagedCheckpoint,
    fingerprints,
    reading_checkpoint,
    saved_arrays,
    saving_checkpoint,
    split,
)
from train.hosts import means_lost_process, meet

State = TypeVar("State")

# Orbax also raises what it logs, unless it handles it; here an error ends as one line.
logging.getLogger("absl").setLevel(logging.CRITICAL)
# If several reads fail, one error is raised; asyncio would log the others.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class _Keep(policies.PreservationPolicy):
    """Keeps the newest checkpoint, to go on from, and the last and the `best` evaluated ones.

    A checkpoint that was saved because training had to stop is not one to choose or average: it is
    deleted once the next exists, as if training had not stopped.
    """

    def __init__(self, last: int, best: policies.PreservationPolicy) -> None:
        self._last, self._best = last, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept = list(self._best.should_preserve(checkpoints, context=context))
        evaluated = [n for n, checkpoint in enumerate(checkpoints) if checkpoint.metrics]
        for number in {*evaluated[-self._last :], len(checkpoints) - 1}:
            kept[number] = True
        return kept


class Checkpoints:
    """The checkpoints of one run, in `run/checkpoints`; use it in a `with` block.

    A state is any dataclass pytree of arrays with fields `step` and `params`. The parameters are
    saved apart from the rest, so that a translator can read them alone.

    With several processes, every one must make the same calls.

    Args:
      run: the run directory; created if need be.
      keep_last: how many of the latest evaluated checkpoints stay on disk; the newest always does.
      keep_best: how many of the best stay in addition.
      metric: name of the validation metric that decides which is best.
      mode: whether the best has the lowest ("min") or the highest ("max") value of it.

    Raises:
      UserError: the directory cannot be written to.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        keep_last: int = 5,
        keep_best: int = 1,
        metric: str = "loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise UserError(
                f"keep_last is {keep_last} and keep_best {keep_best}: give at least 1 and 0"
            )
        self._run = Path(run).absolute()
        self._metric, self._mode = metric, mode
        self.directory = self._run / CHECKPOINTS_DIR
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not os.access(self.directory, os.W_OK):
                raise PermissionError(None, "no permission to write")
        except OSError as error:
            raise UserError(
                f"cannot save checkpoints in {self.directory}: {error.strerror}; "
                "choose another run directory"
            ) from error
        self._set_unreadable_metrics_aside()
        best = policies.BestN(
            get_metric_fn=self._score,
            reverse=mode == "min",
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(keep_last, best),
            best_fn=self._score,
            best_mode=mode,
            cleanup_tmp_directories=True,
            # If creating a directory failed in the background, the exit would hang.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except Exception as error:  # from any damage to the files beside the arrays
            raise UserError(
                f"cannot read {self.directory}: {reason(error)}; restore what is damaged there, or "
                "choose another run directory"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not means_lost_process(error):  # closing would wait for it
            self.close()

    def all_steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def evaluated_steps(self) -> list[int]:
        """Return the steps of the checkpoints that were saved with metrics, ascending."""
        self.wait()
        return list(evaluations(self._run))

    def save(self, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Start to save `state` as the checkpoint of `state.step`, unless there is one.

        The arrays are copied before this returns and may then be donated; files are written in the
        background. An error there is raised by the next `save`, `wait` or `close`.

        Args:
          state: what `restore` is to return.
          metrics: validation metrics of this state; without them it cannot become the best.

        Raises:
          UserError: this checkpoint, or the one before it, could not be written; the directory is
            gone; or `metrics` lacks the one that decides which is best.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        if not self.directory.is_dir():  # orbax would make it anew, without the rest of the run
            raise UserError(f"{self.directory} is gone: move it back, and run the command again")
        record = None
        if metrics is not None:
            if self._metric not in metrics:
                raise UserError(
                    f"the best checkpoint is chosen by {self._metric!r}, which is not evaluated: "
                    f"choose one of {', '.join(metrics)}"
                )
            # A loss of nan is not a JSON number, and never the best.
            values = {name: float(v) for name, v in metrics.items() if math.isfinite(v)}
            record = {"metric": self._metric, "mode": self._mode, "values": values}
        items = split(state)
        with saving_checkpoint(self.directory):
            args = ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                **{INFO: ocp.args.JsonSave({"fingerprints": fingerprints(items)})},
            )
            self._manager.save(step, args=args, metrics=record, force=True)

    def restore(self, example: State) -> State:
        """Return the state of the last checkpoint that is undamaged.

        Damaged checkpoints that are skipped are reported on standard error and renamed, so that
        training can save their steps again.

        Args:
          example: a state of the same structure, of arrays or of `jax.ShapeDtypeStruct`s with
            shardings. The result has its structure, shapes, dtypes and shardings; the number of
            devices need not be that of the saving run.

        Raises:
          UserError: there is no checkpoint, all are damaged, or one is of another model or
            optimizer; the message names the first array that differs.
        """
        self.wait()
        steps = self._existing()
        for step in reversed(steps):
            try:
                return self._restore(example, step)
            except DamagedCheckpoint as error:
                if step == steps[0]:
                    raise
                self._set_aside(step, error)
        raise AssertionError  # the loop returns, or raises at the first step

    def _restore(self, example: State, step: int) -> State:
        directory = self.directory / str(step)
        examples = split(example)
        if not (directory / OPTIMIZER).exists():  # as in checkpoints of `save_params`
            raise DamagedCheckpoint(
                f"checkpoint {directory} has no {OPTIMIZER} that training could go on with; "
                "delete it to go on from the one before"
            )
        with reading_checkpoint(directory):
            saved = {name: saved_arrays(directory / name) for name in examples}
        for name, tree in examples.items():
            check_same_arrays(saved[name], describe_arrays(tree), directory / name)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in examples.items()}
        with reading_checkpoint(directory):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        for name in examples:
            if not is_intact(directory, name, restored[name]):
                raise DamagedCheckpoint(
                    f"checkpoint {directory} is damaged: its {name} are not what was saved; "
                    "delete it to go on from the one before"
                )
        return dataclasses.replace(restored[OPTIMIZER], params=restored[PARAMS])

    def _set_aside(self, step: int, error: DamagedCheckpoint) -> None:
        place = self._free_name(f"damaged-{step}")
        if jax.process_index() == 0:
            warn(f"{error}; it is now {place.name}, trying the one before")
            (self.directory / str(step)).rename(place)
        meet(f"damaged-{step}")
        self._manager.reload()

    def _set_unreadable_metrics_aside(self) -> None:
        """Rename unreadable metrics: orbax reads those of all checkpoints, and would fail."""
        if jax.process_index() == 0:
            evaluated = evaluations(self._run)
            for step in checkpoint_steps(self._run):
                folder = self.directory / str(step) / METRICS
                if (folder / METRICS).exists() and step not in evaluated:
                    place = self._free_name(f"damaged-{METRICS}-{step}")
                    warn(f"the metrics of checkpoint {step} cannot be read: now {place.name}")
                    folder.rename(place)
        meet("metrics")

    def _free_name(self, name: str) -> Path:
        """Return the path of `name` in the directory, numbered if that exists."""
        names = chain([name], (f"{name}.{number}" for number in count(2)))
        return next(place for name in names if not (place := self.directory / name).exists())

    def average(self, steps: Sequence[int]) -> tuple[Any, list[int]]:
        """Return the mean of several checkpoints' parameters, as numpy arrays, and the steps in it.

        The mean is taken in float32, one checkpoint after the other, and returned in the dtype of
        the saved parameters (paper §6.1: the last 5 checkpoints for base, 20 for big). Damaged ones
        are left out and reported on standard error.

        Args:
          steps: distinct steps.

        Raises:
          UserError: `steps` is empty or has duplicates, or one does not exist, or all are damaged.
        """
        if not steps or len(set(steps)) < len(steps):
            raise UserError(f"cannot average checkpoints {list(steps)}: give distinct steps")
        self.wait()
        averaged: list[int] = []
        mean: Any = None
        if missing := set(steps) - set(self._existing()):
            raise UserError(
                f"{self._run} has no checkpoint {min(missing)}: choose one of {self.all_steps()}"
            )
        for step in steps:
            try:
                saved = load_params(self._run, step)
            except UserError as error:
                if not averaged and step == steps[-1]:
                    raise
                if jax.process_index() == 0:
                    warn(f"{error}; the average leaves it out")
                continue
            averaged.append(step)
            if mean is None:
                dtypes = jax.tree.map(lambda leaf: leaf.dtype, saved)
                mean = jax.tree.map(lambda leaf: np.array(leaf, np.float32), saved)
                continue

            # In place, to save memory; in this form equal parameters average to themselves exactly.
            def include(mean: np.ndarray, leaf: np.ndarray, count: int = len(averaged)) -> None:
                mean += (leaf.astype(np.float32) - mean) / count

            jax.tree.map(include, mean, saved)
        cast = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype, copy=False), mean, dtypes)
        return cast, averaged

    def save_average(self, params: Any, steps: Sequence[int]) -> None:
        """Save `params`, the average of `steps`, as `checkpoints/average`.

        An older average stays until this one is complete.

        Raises:
          UserError: it could not be written.
        """
        self.wait()
        info = {
            "steps": sorted(steps),
            "latest": max(self.all_steps(), default=0),
            "fingerprints": fingerprints({PARAMS: params}),
        }
        args = {PARAMS: ocp.args.StandardSave(params), INFO: ocp.args.JsonSave(info)}
        new, old = (self.directory / f"{AVERAGE}.{which}" for which in ("new", "old"))
        with saving_checkpoint(self.directory):
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                writer.save(new, args=ocp.args.Composite(**args), force=True)
            if jax.process_index() == 0:
                shutil.rmtree(old, ignore_errors=True)
                if (self.directory / AVERAGE).exists():
                    (self.directory / AVERAGE).rename(old)
                new.rename(self.directory / AVERAGE)
                shutil.rmtree(old, ignore_errors=True)
        meet(AVERAGE)

    def remove_average(self) -> None:
        """Remove `checkpoints/average`, if it is there."""
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / AVERAGE, ignore_errors=True)
        meet(AVERAGE)

    def wait(self) -> None:
        """Return when everything is on disk; raises `UserError` if it could not be written."""
        with saving_checkpoint(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release orbax's threads; raises like `wait`."""
        with saving_checkpoint(self.directory):
            self._manager.close()

    def _score(self, record: Mapping[str, Any]) -> float:
        worst = math.inf if self._mode == "min" else -math.inf
        return record["values"].get(self._metric, worst)

    def _existing(self) -> list[int]:
        steps = self.all_steps()
        if not steps:
            raise UserError(f"{self._run} has no checkpoint yet: train longer")
        return steps
