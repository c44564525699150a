"""One process, or one group of processes, trains in a run directory at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from jaxformer.errors import UserError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def only_trainer(run: Path) -> Iterator[None]:
    """Create the run directory and hold it; leave none behind if nothing was put into it.

    The lock ends with the process, however it ends. On a file system without locks there is none.

    Raises:
      UserError: another process holds the directory, or it cannot be written to.
    """
    lock = FileLock(run / LOCK_FILE)
    try:
        run.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError):
            lock.acquire(timeout=0)
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
        lock.release()
        if [path.name for path in run.iterdir()] in ([], [LOCK_FILE]):
            (run / LOCK_FILE).unlink(missing_ok=True)
            run.rmdir()
