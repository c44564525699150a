"""Files that are written whole or not at all, and known to be possible before the work for them."""

import contextlib
import os
import tempfile
from pathlib import Path

from jaxformer.errors import UserError


def write_text(path: Path, text: str, *, advice: str = "choose another place") -> None:
    """Write a file whole or not at all, in a folder that is made if need be.

    Raises:
      UserError: it cannot be written; `advice` says what to do then.
    """
    # Renamed into place: a reader never meets half a file.
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}") from error
    except UnicodeEncodeError as error:  # a name that the shell gave is bytes that are no letters
        raise UserError(f"cannot write {path}: it would not be UTF-8; {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def check_writable(path: str | Path) -> None:
    """Raise `UserError` if a file cannot be written, nor its folder made; change nothing.

    For what is written at the end of long work, which would be lost.
    """
    whole = Path(path).absolute()
    there = next(place for place in (whole, *whole.parents) if place.exists())
    problem = None
    if whole.is_dir():
        problem = "Is a directory"
    elif there == whole:
        problem = None if os.access(whole, os.W_OK) else "Permission denied"
    elif not there.is_dir():
        problem = f"{there} is not a directory"
    else:
        try:  # a permission alone says nothing of a disk that is full or can only be read
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            problem = error.strerror
    if problem:
        raise UserError(f"cannot write {path}: {problem}; choose another place")
