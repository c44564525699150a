"""Writing a directory completely or not at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxformer.errors import UserError
from jaxformer.files import writing


def check_free(directory: str | Path) -> None:
    """Raise `UserError` if something is there already that `new_directory` would not replace."""
    if not str(directory):
        raise UserError("the directory has an empty name: give a new one")
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
    with writing(directory, "choose another directory"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # An empty directory that exists may be a link, a mount or a shell's working directory: it
        # is filled, not replaced.
        inside = path if path.is_dir() else path.parent
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=inside) as scratch:
            partial = Path(scratch) / path.name
            partial.mkdir()
            yield partial
            if inside != path:
                partial.replace(path)
            else:
                for made in partial.iterdir():
                    made.replace(path / made.name)
