"""What was measured or planned, as aligned columns and as JSON lines."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxformer.errors import UserError
from jaxformer.files import writing

Records = Sequence[dict[str, Any]]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def keep_records(path: str | None, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pass records on as they are made; append each at once to a file of JSON lines, if any.

    So a sweep that is stopped keeps its records, and an unwritable file fails before the work.

    Raises:
      UserError: the file cannot be written.
    """
    if path is None:
        yield from records
        return
    with writing(path):
        file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    try:
        for record in records:
            failure = None
            try:
                with writing(path):
                    file.write(json.dumps(record) + "\n")
            except UserError as error:
                failure = error
            yield record
            if failure is not None:
                raise failure
    finally:
        with contextlib.suppress(OSError):  # the disk may have refused the last record
            file.close()


def collect(
    records: Iterable[dict[str, Any]], table: Callable[[Records], str]
) -> list[dict[str, Any]]:
    """Print the table of all records, or of those made before an error; return the records."""
    collected: list[dict[str, Any]] = []
    try:
        collected.extend(records)
    finally:
        if collected:
            print(table(collected))
    return collected
