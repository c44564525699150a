"""Arrow files: written once, batch by batch, then memory-mapped."""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxformer.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Part of every cache file's name: a change in what the files hold must change it.
CACHE_VERSION = 1


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Return the folder for cache files: `cache_dir`, or a folder in the cache of `datasets`.

    Raises:
      UserError: it cannot be made.
    """
    if cache_dir is None:
        from datasets.config import HF_DATASETS_CACHE

        cache_dir = Path(HF_DATASETS_CACHE) / "jaxformer"
    folder = Path(cache_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder}: {error.strerror}; set data.cache_dir"
        ) from error
    return folder


def write_arrow(
    path: Path, schema: "pa.Schema", batches: Iterable[Mapping[str, Sequence[Any]]]
) -> None:
    """Write `batches` of columns to `path` as an Arrow stream; no reader ever sees half of it."""
    import pyarrow as pa

    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(pa.RecordBatch.from_pydict(dict(batch), schema=schema))
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def map_arrow(path: Path) -> "pa.Table":
    """Return the table in an Arrow stream file; its pages are read when they are touched."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
