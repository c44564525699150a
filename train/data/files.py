"""Sentence pairs in local text files, line by line, with errors that name file and line."""

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jaxformer.errors import UserError
from jaxformer.files import lines_of

Pair = tuple[str, str]
# Where a row was found, for error messages, and its columns.
Row = tuple[str, dict[str, Any]]

# JSON can hold half of a surrogate pair, which is not text: a sentence cut inside an emoji.
_SURROGATE = re.compile("[\ud800-\udfff]")


def existing(path: Path) -> Path:
    """Return `path` if it is a file; otherwise raise a `UserError` that names similar files."""
    try:
        if path.is_file():
            return path
        if path.exists():
            raise UserError(f"{path} is not a regular file: give one, as it is read more than once")
    except OSError as error:  # the name is too long, or a folder may not be entered
        raise UserError(f"cannot read {path}: {error.strerror}; check data.path") from error
    if not path.parent.is_dir():
        raise UserError(f"no file {path}: there is no folder {path.parent}; check data.path")
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    near = difflib.get_close_matches(path.name, names, n=5, cutoff=0.5) or names[:5]
    hint = f"the folder has {', '.join(near)}" if near else "the folder has no files"
    raise UserError(f"no file {path}: {hint}")


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, see `lines_of`."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with file:
        yield from lines_of(file, path)


def pair_lines(source_path: Path, target_path: Path) -> Iterator[Pair]:
    """Yield line i of one file with line i of the other."""
    for source, target in zip_longest(read_lines(source_path), read_lines(target_path)):
        if source is None or target is None:
            raise UserError(
                f"{source_path} has {_count_lines(source_path)} lines, {target_path} has "
                f"{_count_lines(target_path)}: line i of one must be the translation of line i of "
                "the other"
            )
        yield source, target


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def pair_table_rows(
    path: Path, source: str, target: str, *, last_names: bool = False
) -> Iterator[Pair]:
    """Yield the two named columns of a .tsv, .csv, .jsonl or .json file.

    With `last_names`, the column "en" is accepted where "translation.en" is asked for.
    """
    for where, row in _READERS[path.suffix.lower()](path):
        pair = []
        for column in (source, target):
            last = column.rpartition(".")[2]
            known = last_names and isinstance(row, dict) and last in row and column not in row
            pair.append(_text(row, last if known else column, where))
        yield pair[0], pair[1]


def _tsv_rows(path: Path) -> Iterator[Row]:
    # Quotes are plain characters here: sentences contain them, and rarely in pairs.
    lines = enumerate(read_lines(path), start=1)
    return _name_fields(path, ((number, line.split("\t")) for number, line in lines if line))


class _Several:
    """Stands for fields whose columns share a name: an error only if they are asked for."""


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # a "sentence" may be a whole document
    reader = csv.reader((line + "\n" for line in read_lines(path)), strict=True)
    try:
        yield from _name_fields(path, ((reader.line_num, fields) for fields in reader if fields))
    except csv.Error as error:
        mend = "line ends" if "new-line" in str(error) else "quotes"
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error}); mend its {mend}") from error


def _name_fields(path: Path, rows: Iterable[tuple[int, list[str]]]) -> Iterator[Row]:
    """Pair the fields of each row with those of the first, the header."""
    rows = iter(rows)
    _, header = next(rows, (0, []))
    several = {name: _Several() for name in header if header.count(name) > 1}
    for number, fields in rows:
        if len(fields) != len(header):
            raise UserError(
                f"{path}:{number}: {len(fields)} columns, but the header has {len(header)} "
                f"({', '.join(header)}): mend or remove the line"
            )
        yield f"{path}:{number}", dict(zip(header, fields, strict=True)) | several


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse_json(line, path, number)


def _json_rows(path: Path) -> Iterator[Row]:
    rows = _parse_json("\n".join(read_lines(path)), path)
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list of objects: write [{{…}}, {{…}}], or use .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number = first_line + error.lineno - 1
        raise UserError(
            f"{path}:{number}: not JSON ({error.msg}, column {error.colno}): mend it"
        ) from error
    except (ValueError, RecursionError) as error:  # too long a number, or too deep a nesting
        raise UserError(
            f"{path}:{first_line}: cannot be read as JSON ({error}): mend it"
        ) from error


_READERS = {".tsv": _tsv_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}
table_suffixes = tuple(_READERS)


def _text(row: Any, column: str, where: str) -> str:
    """Return the text in a column of `row`; "translation.de" is "de" of the dict "translation"."""
    if not isinstance(row, dict):
        raise UserError(
            f'{where}: {json.dumps(row)} is not an object of columns: write {{"{column}": "…", …}}'
        )
    value = row
    for key in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or key not in value:
            raise UserError(
                f"{where}: no column {column!r}; the columns are {', '.join(_columns(row))}: "
                "name two of them in data.source and data.target"
            )
        value = value[key]
    if isinstance(value, _Several):
        raise UserError(f"{where}: several columns are called {column!r}; rename all but one")
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column {column!r} holds {json.dumps(value)}, not text: give it text"
        )
    if _SURROGATE.search(value):
        raise UserError(
            f"{where}: column {column!r} holds half a character (U+D800 to U+DFFF): remove it"
        )
    return value


def _columns(row: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _columns(value, f"{prefix}{key}.")
        else:
            yield prefix + key
