"""Cache files: written once as Arrow, batch by batch, then read where they are needed."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxformer.errors import UserError, reason
from jaxformer.files import writing
from train.lock import acquire

if TYPE_CHECKING:
    import pyarrow as pa

# Part of every cache file's name: a change in what the files hold must change it.
CACHE_VERSION = 1

ADVICE = "make room, or set HF_DATASETS_CACHE or, to train, data.cache_dir"


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Return the folder for cache files: `cache_dir`, or a folder in the cache of `datasets`.

    Raises:
      UserError: it cannot be made.
    """
    if cache_dir is None:
        from datasets.config import HF_DATASETS_CACHE

        cache_dir = Path(HF_DATASETS_CACHE) / "jaxformer"
    folder = Path(os.path.expanduser(cache_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder}: {error.strerror}; set HF_DATASETS_CACHE in "
            "the environment or, to train, data.cache_dir"
        ) from error
    return folder


@contextlib.contextmanager
def reading_cache(path: Path) -> Iterator[None]:
    """Raise `UserError` if a cache file is not what was written."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is damaged ({reason(error)}): delete it to have it made again"
        ) from error


def _move(partial: Path, path: Path) -> None:
    """Put a file in its place once all of it is on disk: it is whole even after a power cut."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_arrow(
    path: Path, schema: "pa.Schema", batches: Iterable[Mapping[str, "Sequence[Any] | pa.Array"]]
) -> None:
    """Write `batches` of columns to `path` as an Arrow stream, unless the file is there.

    If several processes want it, one writes while the others wait; none sees half a file.

    Raises:
      UserError: it cannot be written.
    """
    import pyarrow as pa

    if path.exists():
        return
    partial = path.with_suffix(".partial")
    with contextlib.ExitStack() as locked:
        with writing(path, ADVICE):
            lock = acquire(path.with_suffix(".lock"))
        locked.callback(lock.release)
        if path.exists():  # written while this process waited
            return
        try:
            with writing(path, ADVICE):
                with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, schema) as out:
                    for batch in batches:
                        out.write_batch(pa.RecordBatch.from_pydict(dict(batch), schema=schema))
                _move(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def locate_lists(path: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where the lists of a column lie in an Arrow stream file of 32-bit numbers.

    Returns:
      The byte at which each list begins, int64 [rows], and its number of items, int32 [rows].

    Raises:
      ValueError: a list is not in the file.
    """
    import pyarrow as pa

    file = pa.memory_map(str(path)).read_buffer()
    starts, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for chunk in pa.ipc.open_stream(file).read_all().column(column).chunks:
        offsets = chunk.offsets.to_numpy()
        first = chunk.values.buffers()[1].address - file.address
        starts.append(first + 4 * offsets[:-1].astype(np.int64))
        lengths.append(np.diff(offsets))
    begin, length = np.concatenate(starts), np.concatenate(lengths)
    if np.any((begin < 0) | (length < 0) | (begin + 4 * length.astype(np.int64) > file.size)):
        raise ValueError("the file ends before its last list")
    return begin, length
