"""Several processes that train as one: how they join, agree, and end together where one fails."""

import contextlib
import json
import os
import re
import secrets
import socket
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

# Long enough for any preparation; JAX's heartbeat reports a dead process much sooner.
_DAY_MS = 24 * 60 * 60 * 1000

# How long to wait for the other processes before saying so.
_PATIENCE_S = 10.0

# What the libraries behind the collectives say when a process is gone.
_LOST = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|broken pipe|deadline|unavailable|coordination",
    re.IGNORECASE,
)


class ProcessLost(UserError):
    """Another process has ended, and collectives are no longer possible.

    Attributes:
      status: the exit status that, by convention, asks for another try.
    """

    status = os.EX_TEMPFAIL


def initialize_hosts(config: ParallelConfig) -> None:
    """Join the other processes, as `config` says or JAX finds (TPU, Slurm, Open MPI, Kubernetes).

    If one does not come, the others say that they are waiting, until JAX gives up.

    Raises:
      UserError: they cannot be joined, or do not all have the same number of devices.
    """
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")  # as in JAX
    telling = threading.Timer(_PATIENCE_S, _tell_who_is_missing, [coordinator])
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
                "give all the same number"
            )


def _tell_who_is_missing(coordinator: str | None) -> None:
    """Say what is being waited for; a name may be unknown until its machine has started."""
    place = ""
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        place = f" at {coordinator}"
        try:
            socket.getaddrinfo(host.strip("[]"), port)
        except (OSError, UnicodeError):
            place += f" (no address is known for {host!r}: has it started, and is the name right?)"
    say(f"waiting for the other processes{place}; JAX gives up after five minutes")


def meet(name: str) -> None:
    """Wait until all processes are here, however long one takes."""
    if jax.process_count() > 1:
        get_barrier_sync_fn()(key=name, timeout_ms=_DAY_MS)


def agreed(values: np.ndarray) -> np.ndarray:
    """Return process 0's array on all processes, so that all decide alike.

    Floating-point results of hosts may differ in the last bit, and files that they share may be
    read at different moments.
    """
    if jax.process_count() == 1:
        return values
    as_bytes = np.ascontiguousarray(values).view(np.uint8)  # or float64 would become float32
    meet("agreed")
    return np.asarray(multihost_utils.broadcast_one_to_all(as_bytes)).view(values.dtype)


def agreed_steps(steps: Sequence[int], most: int) -> list[int]:
    """Return process 0's list of at most `most` steps on all processes."""
    padded = np.full(most, -1)
    padded[: len(steps)] = steps
    return [step for step in agreed(padded).tolist() if step >= 0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let all processes through a block or none: if one fails, the others fail and do not wait.

    Inside the block they must not wait for each other.

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
            raise UserError(f"process {np.argmax(failed)} has failed: see its output")
    if failure is not None:
        raise failure


def check_alike(values: Mapping[str, Any], advice: str) -> None:
    """Raise an error if processes were given different values.

    Args:
      values: by name, of types that JSON can hold.
      advice: what to give instead.

    Raises:
      UserError: on all processes, if a value of one is not that of process 0.
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
    """Raise an error unless all processes share `directory`, which exists for process 0.

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
                    "of process 0: name one on a file system that all processes share"
                )
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)


def means_lost_process(error: BaseException | None) -> bool:
    """Whether a collective failed because a process is gone."""
    failed = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
    return failed and _LOST.search(str(error)) is not None


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Raise `ProcessLost` instead of the errors that a lost process causes."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not means_lost_process(error):
            raise
        raise ProcessLost(
            f"another process has ended ({one_line(error)[:100]}): see its output, and run the "
            "same command again in all processes to go on from the last checkpoint"
        ) from error
