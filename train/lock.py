"""One process, or one group of processes, trains in a run directory or at an address at a time."""

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from jaxformer.errors import UserError
from jaxformer.run_directory import check_name

LOCK_FILE = ".lock"


def acquire(path: Path, timeout: float = -1) -> FileLock:
    """Return a lock that is held until it is released or the process ends, however it ends.

    On a file system without locks none is held: a marker file in its place would outlive a process
    that was killed.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=timeout)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    return lock


@contextlib.contextmanager
def only_process(coordinator: str | None, process: int | None) -> Iterator[None]:
    """Be the only process on this machine with this number at this coordinator.

    If a second one joined, it would end all the others.

    Args:
      coordinator, process: HOST:PORT and the number; None where JAX finds them and a scheduler
        keeps the numbers unique.

    Raises:
      UserError: there is such a process already, or the port of process 0 is in use.
    """
    if coordinator is None or process is None:
        yield
        return
    with socket.socket(socket.AF_UNIX) as place:
        try:  # an abstract name is free again when the process ends, however it ends
            place.bind(f"\0jaxformer {coordinator} {process}")
        except OSError as error:  # only Linux has such names
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"process {process} at {coordinator} runs here already: wait until it ends, or "
                    "give another parallel.coordinator"
                ) from error
        if process == 0:
            port = int(coordinator.rpartition(":")[2])
            try:  # servers that listen as JAX does would share it without an error
                socket.create_server(("", port)).close()
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise UserError(
                        f"port {port} is in use: give parallel.coordinator another"
                    ) from error
        yield


@contextlib.contextmanager
def only_trainer(run: Path) -> Iterator[None]:
    """Create and hold the run directory; remove it at the end if nothing was put into it.

    Raises:
      UserError: another process holds the directory, or it cannot be written to.
    """
    check_name(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = acquire(run / LOCK_FILE, timeout=0)
    except Timeout as error:
        raise UserError(
            f"another process trains in {run}: wait until it ends, or choose another --run"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write {run}: {error.strerror}; choose another run directory"
        ) from error
    try:
        yield
    finally:
        # Before the release: after it, another process may hold the directory.
        with contextlib.suppress(FileNotFoundError):  # somebody has moved it
            if [path.name for path in run.iterdir()] in ([], [LOCK_FILE]):
                (run / LOCK_FILE).unlink(missing_ok=True)
                run.rmdir()
        lock.release()
