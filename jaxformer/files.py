"""Reading lines of text, and writing files whole or not at all, where that is possible."""

import codecs
import contextlib
import os
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxformer.errors import UserError

# How compressed files begin, and the programs that unpack them.
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"\xfd7zXZ": "unxz",
    b"BZh": "bunzip2",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


def lines_of(file: Iterable[bytes], name: str | Path) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 file without their "\n" or "\r\n"; a BOM is skipped.

    Only "\n" ends a line: `str.splitlines` would also split at U+2028 or U+0085, which occur
    inside sentences, and shift one side of the corpus against the other.

    Raises:
      UserError: a line cannot be read or is not UTF-8, or the first one shows that the file is
        UTF-16; the message says where, with `name` for the file.
    """
    for number, raw in enumerate(_readable(file, name), start=1):
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            for begin, program in _COMPRESSED.items():
                if number == 1 and raw.startswith(begin):
                    raise UserError(f"{name} is compressed: unpack it, with {program}") from error
            raise UserError(
                f"{name}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at column "
                f"{error.start + 1}); convert it, for example with iconv"
            ) from error
        if number == 1 and 3 * raw.count(0) >= len(raw) > 0:  # every other byte of Latin text
            raise UserError(f"{name} is UTF-16, it seems: convert it, for example with iconv")
        yield line.removesuffix("\n").removesuffix("\r")


def _readable(file: Iterable[bytes], name: str | Path) -> Iterator[bytes]:
    try:
        yield from file
    except OSError as error:  # such as standard input under `nohup`
        raise UserError(f"cannot read {name}: {error.strerror}; give another file") from error


@contextlib.contextmanager
def writing(path: str | Path, advice: str = "choose another place") -> Iterator[None]:
    """Raise `UserError`, with advice, if writing to `path` fails."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_bytes(path: Path, content: bytes, *, advice: str = "choose another place") -> None:
    """Write a file whole or not at all, and make its folder if need be.

    Raises:
      UserError: it cannot be written; `advice` says what to do then.
    """
    # Renamed into place once all of it is on the disk: a reader never meets half a file, not even
    # after a power cut. Any other writer has a partial file of another name.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with writing(path, advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str, *, advice: str = "choose another place") -> None:
    """`write_bytes` of the text as UTF-8."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:  # a file name from the shell can be any bytes
        raise UserError(f"cannot write {path}: it would not be UTF-8; {advice}") from error
    write_bytes(path, content, advice=advice)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a file whole or not at all; a pipe or another special file is written in place.

    Raises:
      UserError: it cannot be written.
    """
    text = "".join(f"{line}\n" for line in lines)
    printed = _is_standard_output(path)
    if not printed and (path.is_file() or not path.exists()):
        write_text(path.resolve(), text)
        return
    with writing(path):
        if printed:  # after what was printed before, not over it
            sys.stdout.flush()
            sys.stdout.buffer.write(text.encode())
        else:
            path.write_text(text, encoding="utf-8")


def _is_standard_output(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # what replaces standard output may not be a file
        return False


def check_writable(path: str | Path) -> None:
    """Raise `UserError` if a file cannot be written, or its missing folder made; change nothing.

    For results that are written only at the end of long work, which would otherwise be lost.
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
        try:  # permissions alone do not show that a disk is full or read-only
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            problem = error.strerror
    if problem:
        raise UserError(f"cannot write {path}: {problem}; choose another place")
