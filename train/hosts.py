"""Several processes that train as one: how they join, agree, and end together where one fails."""

import contextlib
import json
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint.multihost import get_barrier_sync_fn

from jaxformer.errors import UserError, one_line
from jaxformer.files import writing
from jaxformer.terminal import say
from train.config import ParallelConfig

# Long enough for any preparation; of a process that has died JAX's heartbeat tells much sooner.
_DAY_MS = 24 * 60 * 60 * 1000

# Before it is said that others are waited for.
_PATIENCE_S = 10.0

# What the libraries that carry collectives say where a process is not there any more.
_LOST = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|broken pipe|deadline|unavailable|coordination",
    re.IGNORECASE,
)


class ProcessLost(UserError):
    """Another process has ended, and nothing that all do together can be done.

    Attributes:
      status: the exit status that asks for another try, as systems understand it.
    """

    status = os.EX_TEMPFAIL


def initialize_hosts(config: ParallelConfig) -> None:
    """Join the other processes: found by itself on TPU, Slurm, Open MPI and Kubernetes, or told.

    Where one does not come the others say that they wait, until JAX ends them.

    Raises:
      UserError: there is nothing to find them by, or they have not as many devices each.
    """
    place = f" at {config.coordinator}" if config.coordinator else ""
    waiting = f"waiting for the other processes{place}; JAX gives up after five minutes"
    telling = threading.Timer(_PATIENCE_S, say, [waiting])
    telling.start()
    try:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes ({one_line(error)[:200]}): leave out "
            "--distributed True, or give parallel.coordinator, .processes and .process with it"
        ) from error
    finally:
        telling.cancel()
    devices = Counter(device.process_index for device in jax.devices())
    for process in range(jax.process_count()):
        if devices[process] != devices[0]:
            raise UserError(
                f"process 0 has {devices[0]} devices and process {process} {devices[process]}: "
                "give all as many"
            )


def meet(name: str) -> None:
    """Wait until all processes are here, however long one takes."""
    if jax.process_count() > 1:
        get_barrier_sync_fn()(key=name, timeout_ms=_DAY_MS)


def agreed(values: np.ndarray) -> np.ndarray:
    """Return process 0's array on all processes, which shall decide alike.

    Floating-point results of hosts may differ in the last bit, and files they share be read at
    different moments.
    """
    if jax.process_count() == 1:
        return values
    as_bytes = np.ascontiguousarray(values).view(np.uint8)  # or float64 would become float32
    meet("agreed")
    return np.asarray(multihost_utils.broadcast_one_to_all(as_bytes)).view(values.dtype)


def agreed_steps(steps: Sequence[int], most: int) -> list[int]:
    """Return process 0's list of steps, `most` at most, on all processes."""
    padded = np.full(most, -1)
    padded[: len(steps)] = steps
    return [step for step in agreed(padded).tolist() if step >= 0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let all processes through a block, or none: where one fails the others do not wait for it.

    In the block they must not wait for each other.

    Raises:
      UserError: another process failed.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        meet("together")
        failed = multihost_utils.process_allgather(np.array(failure is not None))
        if failure is None and np.any(failed):
            raise UserError(f"process {np.argmax(failed)} has failed: see what it says")
    if failure is not None:
        raise failure


def check_alike(values: Mapping[str, Any], advice: str) -> None:
    """Refuse to go on where processes were given different things.

    Args:
      values: by name, what JSON can hold.
      advice: what to give instead.

    Raises:
      UserError: on all processes.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values).encode()
    (size,) = agreed(np.array([len(text)])).tolist()
    first = json.loads(agreed(np.frombuffer(text[:size].ljust(size), np.uint8)).tobytes())
    with together():
        for name, value in json.loads(text).items():
            if value != first.get(name):
                raise UserError(
                    f"process {jax.process_index()} has {name}={value!r} and process 0 "
                    f"{first.get(name)!r}: {advice}"
                )


def check_shared(directory: Path) -> None:
    """Refuse a directory that is not the same one for all processes; it is there for process 0.

    Raises:
      UserError: on all processes.
    """
    if jax.process_count() == 1:
        return
    (number,) = agreed(np.array([secrets.randbits(62)])).tolist()
    mark = directory / f".shared-{number:x}"
    try:
        with together():
            if jax.process_index() == 0:
                with writing(mark):
                    mark.touch()
        with together():
            if not mark.exists():
                raise UserError(
                    f"the run directory {directory} of process {jax.process_index()} is not that "
                    "of process 0: name one on a file system that all see"
                )
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)


def means_lost_process(error: BaseException | None) -> bool:
    """Whether a collective failed because not all are there any more."""
    failed = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
    return failed and _LOST.search(str(error)) is not None


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Raise `ProcessLost` in the place of errors that come of it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not means_lost_process(error):
            raise
        raise ProcessLost(
            f"another process has ended ({one_line(error)[:100]}): see what it says, and run the "
            "same command again on all, to go on from the last checkpoint"
        ) from error
