"""Writing a directory completely or not at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxformer.errors import UserError


def check_free(directory: str | Path) -> None:
    """Raise `UserError` if something is there already that `new_directory` would not replace."""
    path = Path(directory)
    if path.is_dir():
        if any(path.iterdir()):
            raise UserError(f"{directory} exists and is not empty: give a new directory")
    elif path.exists():
        raise UserError(f"{directory} is a file: give a new directory")


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Yield an empty directory that is moved to `directory` if the block ends without an error.

    Raises:
      UserError: `directory` exists and is not empty, or it cannot be written to.
    """
    check_free(directory)
    path = Path(directory).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that it can be renamed into place.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            partial = Path(scratch) / path.name
            partial.mkdir()
            yield partial
            partial.replace(path)  # an empty directory that was there gives way
    except OSError as error:
        raise UserError(
            f"cannot write {directory}: {error.strerror or error}; choose another directory"
        ) from error
