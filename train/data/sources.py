"""Pairs of strings from the hub, from local files or from the built-in corpus.

Every source becomes a `datasets.Dataset` with the string columns "source" and "target", in the
order of the input and with nothing left out: an evaluation must not lose a line. Local text is
streamed into an Arrow file, so that a corpus may be larger than memory.
"""

import contextlib
import dataclasses
import glob
import hashlib
import os
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from jaxformer.errors import UserError, first_line
from train.data.arrow import ADVICE, CACHE_VERSION, cache_folder, reading_cache, write_arrow
from train.data.files import Pair, existing, pair_lines, pair_table_rows, table_suffixes
from train.progress import Count

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from train.config import DataConfig

_ROWS_PER_BATCH = 10_000
_COMPRESSED = {".gz", ".xz", ".bz2", ".zst", ".zip"}
# Rows that are mapped at a time; a multiple of every batch size in use.
_MAPPED_ROWS = 100_000


def load_split(data: "DataConfig", split: str) -> "datasets.Dataset":
    """Return the sentence pairs of "train", "validation" or "test".

    Raises:
      UserError: a missing file, columns or lines that do not fit together, something that is not
        text, an empty corpus, or a hub that cannot be reached.
    """
    names = _names(data, split)
    if data.dataset:
        made = _builtin(names[0]) if data.dataset == "builtin" else _hub(data, names[0])
        dataset = _select_columns(made, data, f"{data.dataset}, split {names[0]!r}")
    else:
        dataset = _local(data, names)
    if len(dataset) == 0:
        raise UserError(f"data.{split} ({', '.join(names)}) holds no sentence pair: nothing to use")
    return dataset


def load_extra(data: "DataConfig", name: str) -> "datasets.Dataset":
    """Return the sentence pairs of one of `data.extra`.

    Raises:
      UserError: as for `load_split`.
    """
    dataset = _local(data, (name,))
    if len(dataset) == 0:
        raise UserError(f"data.extra: {name} holds no sentence pair: leave it out")
    return dataset


def iterate(dataset: "datasets.Dataset", rows: int) -> Iterator[Any]:
    """Do as `dataset.iter(rows)`, without keeping in memory the pages of the file that it reads.

    Only a part at a time is mapped: a file is pickled by its name, so the copy has a mapping of its
    own, which is freed with it.
    """
    for start in range(0, len(dataset), _MAPPED_ROWS):
        part = dataset.select(range(start, min(start + _MAPPED_ROWS, len(dataset))))
        yield from pickle.loads(pickle.dumps(part)).iter(rows)


def _names(data: "DataConfig", split: str) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(data, split)
    if not names:
        raise UserError(f"data.{split} is empty: name a hub split, a table, a prefix or two files")
    if len(names) > (1 if data.dataset else 2):
        raise UserError(
            f"data.{split} has {len(names)} names ({', '.join(names)}): give "
            + ("one split" if data.dataset else "one name, or the source and the target file")
        )
    return names


def _builtin(split: str) -> "datasets.Dataset":
    import datasets

    from train.data.builtin import Split, builtin

    if split not in get_args(Split):
        splits = ", ".join(get_args(Split))
        raise UserError(f"the built-in corpus has no split {split!r}: choose one of {splits}")
    english, korean = zip(*builtin(cast(Split, split)), strict=True)
    return datasets.Dataset.from_dict({"en": english, "ko": korean})


def _hub(data: "DataConfig", split: str) -> "datasets.Dataset":
    import datasets
    from datasets.exceptions import DatasetsError

    assert data.dataset is not None
    cache_folder(data.cache_dir)  # if it cannot be made, `datasets` would blame the data
    try:
        # A folder with data files is loaded by the same call as a name on the hub.
        with _quiet() if Path(data.dataset).is_dir() else contextlib.nullcontext():
            return datasets.load_dataset(
                data.dataset, data.dataset_config, split=split, cache_dir=data.cache_dir
            )
    except ConnectionError as error:
        raise UserError(
            f"cannot reach data set {data.dataset!r} on the hub ({first_line(error)}): without a "
            "network, leave data.dataset empty and name local files in data.path, data.train, …"
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"cannot load data set {data.dataset!r}, configuration {data.dataset_config!r}, "
            f"split {split!r}: {first_line(error)}"
        ) from error


def _local(data: "DataConfig", names: tuple[str, ...]) -> "datasets.Dataset":
    folder = Path(os.path.expanduser(data.path or "."))
    paths = [folder / os.path.expanduser(name) for name in names]
    suffixes = [path.suffix.lower() for path in paths]
    if suffixes == [".parquet"]:
        dataset = _parquet(existing(paths[0]), data)
        last = [_last_name(column, data) for column in (data.source, data.target)]
        if set(last) <= set(dataset.column_names):
            data = dataclasses.replace(data, source=last[0], target=last[1])
        selected = _select_columns(dataset, data, str(paths[0]))
        try:
            selected.data.validate(full=True)
        except ValueError as error:  # pyarrow.ArrowInvalid is a ValueError
            raise UserError(
                f"{paths[0]} cannot be read as text ({first_line(error)}): write it as UTF-8"
            ) from error
        return selected
    if len(paths) == 1 and suffixes[0] in table_suffixes:
        pairs = pair_table_rows(
            existing(paths[0]), data.source, data.target, last_names=bool(data.dataset)
        )
    else:
        if len(paths) == 1 and suffixes[0] in _COMPRESSED and os.path.isfile(paths[0]):
            raise UserError(f"{paths[0]} is compressed: unpack it")
        if len(paths) == 1:
            columns = data.source, data.target
            paths = [Path(f"{paths[0]}.{_last_name(column, data)}") for column in columns]
        elif tables := [
            path
            for path, suffix in zip(paths, suffixes, strict=True)
            if suffix in (*table_suffixes, ".parquet")
        ]:
            raise UserError(
                f"{tables[0]} is one of two files, but a table has both sides: give it alone, and "
                "others in data.extra"
            )
        pairs = pair_lines(existing(paths[0]), existing(paths[1]))
    return _stream_to_arrow(pairs, paths, data)


def _last_name(column: str, data: "DataConfig") -> str:
    """With a hub data set, local files may call "translation.en" just "en"."""
    return column.rpartition(".")[2] if data.dataset else column


def _parquet(path: Path, data: "DataConfig") -> "datasets.Dataset":
    import datasets
    import pyarrow.parquet
    from datasets.exceptions import DatasetsError
    from datasets.table import InMemoryTable

    cache_folder(data.cache_dir)  # as in `_hub`
    try:
        # `datasets` would log a broken file before it raises, and rejects one without rows.
        schema = pyarrow.parquet.read_schema(path)
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            return datasets.Dataset(InMemoryTable(schema.empty_table()))
        with _quiet():
            return datasets.load_dataset(
                "parquet",
                data_files=glob.escape(str(path)),
                split="train",
                cache_dir=data.cache_dir,
                **_wanted_of(schema, data),
            )
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ or error
        reason = first_line(cause)
        if isinstance(cause, OSError) and cause.errno:  # the disk failed: do not blame the file
            raise UserError(f"cannot read {path} into the cache ({reason}): {ADVICE}") from error
        raise UserError(f"{path} cannot be read as Parquet ({reason}): write it again") from error


def _wanted_of(schema: "pa.Schema", data: "DataConfig") -> dict[str, Any]:
    """Return arguments that skip other columns, whose types `datasets` may not know."""
    import datasets
    import pyarrow as pa

    found = []
    for column in (data.source, data.target):
        names = column, _last_name(column, data), column.partition(".")[0]
        found.append(next((name for name in names if schema.names.count(name) == 1), None))
    if None in found:
        return {}  # all columns, to be named in a message
    columns = list(dict.fromkeys(found))
    fields = pa.schema([schema.field(name) for name in columns])
    return {"columns": columns, "features": datasets.Features.from_arrow_schema(fields)}


def _stream_to_arrow(
    pairs: Iterator[Pair], paths: list[Path], data: "DataConfig"
) -> "datasets.Dataset":
    """Write `pairs`, which come from `paths`, to an Arrow file, unless an earlier run has."""
    import datasets
    import pyarrow as pa

    origin: list[Any] = [CACHE_VERSION, data.source, data.target]
    for path in paths:
        status = path.stat()
        origin += [str(path.resolve()), status.st_size, status.st_mtime_ns]
        # A copy may have the size and the date of the file that it replaces.
        origin += [status.st_ino, status.st_ctime_ns]
    name = hashlib.sha256(repr(origin).encode()).hexdigest()[:20]
    arrow = cache_folder(data.cache_dir) / f"text-{name}.arrow"
    schema = pa.schema({"source": pa.string(), "target": pa.string()})
    write_arrow(arrow, schema, _columns(pairs, f"reading {paths[0].name}"))
    with _quiet(), reading_cache(arrow):
        return datasets.Dataset.from_file(str(arrow))


def _columns(pairs: Iterator[Pair], what: str) -> Iterator[dict[str, tuple[str, ...]]]:
    count = Count(what)
    while rows := list(islice(pairs, _ROWS_PER_BATCH)):
        source, target = zip(*rows, strict=True)
        yield {"source": source, "target": target}
        count.add(len(rows))


def _select_columns(
    dataset: "datasets.Dataset", data: "DataConfig", where: str
) -> "datasets.Dataset":
    """Rename the columns that `data` names to "source" and "target"; check that they hold text."""
    wanted = [data.source, data.target]
    if not set(wanted) <= set(dataset.column_names):
        dataset = dataset.flatten()  # the dict column "translation" becomes "translation.de", …
    for name in wanted:
        if name not in dataset.column_names:
            raise UserError(
                f"{where}: no column {name!r}; data.source and data.target can be "
                f"{', '.join(dataset.column_names)}"
            )
        kind = getattr(dataset.features[name], "dtype", dataset.features[name])
        if kind not in ("string", "large_string", "string_view"):
            raise UserError(f"{where}: column {name!r} holds {kind}, not text; name another column")
        column = dataset.data.column(name)
        if column.null_count:
            row = column.is_null().index(True).as_py() + 1
            raise UserError(f"{where}: column {name!r} is null in row {row}; remove or fill it")
    dataset = dataset.select_columns(wanted)
    return dataset.rename_columns({data.source: "source", data.target: "target"})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of `datasets`: reading a local file needs none."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
