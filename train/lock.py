"""One process, or one group of processes, trains in a run directory at a time."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from jaxformer.errors import UserError
from jaxformer.run import check_name

LOCK_FILE = ".lock"


@contextlib.contextmanager
def only_trainer(run: Path) -> Iterator[None]:
    """Create the run directory and hold it; leave none behind if nothing was put into it.

    The lock ends with the process, however it ends. On a file system without locks there is none:
    a file that stands for one would outlive a process that was killed.

    Raises:
      UserError: another process holds the directory, or it cannot be written to.
    """
    check_name(run)
    lock = FileLock(run / LOCK_FILE, fallback_to_soft=False)
    try:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
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
        # Before the release: after it the directory may be another's.
        if [path.name for path in run.iterdir()] in ([], [LOCK_FILE]):
            (run / LOCK_FILE).unlink(missing_ok=True)
            run.rmdir()
        lock.release()
