"""Checks of what a caller gives for each line: text, prefix and seed."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from numbers import Integral
from typing import Any, NamedTuple

from jaxformer.errors import UserError


def refuse_one_string(*sides: Iterable[str] | None) -> None:
    """Raise `UserError` if a side is a single string: it would be translated letter by letter."""
    if any(isinstance(side, str) for side in sides):
        raise UserError("one string was given instead of a list of them: put it into a list")


class Line(NamedTuple):
    """A line to translate, with its own prefix and noise."""

    text: str
    prefix: str
    noise: tuple[int, int]  # a seed, and the line's number among those with this seed


def checked_lines(
    lines: Iterable[str], prefixes: Iterable[str] | None, seed: int | Iterable[int]
) -> Iterator[Line]:
    """Check what `Translator.generate` is given, and yield it line by line.

    Raises:
      UserError: a line or prefix is not text, a seed is invalid, or their numbers differ; raised
        after the lines before it.
    """
    given: dict[str, Iterable[Any]] = {"line": lines}
    if prefixes is not None:
        given["prefix"] = prefixes
    if isinstance(seed, Iterable):
        given["seed"] = seed
    ended = object()
    for number, values in enumerate(zip_longest(*given.values(), fillvalue=ended), start=1):
        if ended in values:
            missing = list(given)[values.index(ended)]
            raise UserError(f"there is no {missing} {number}: give one prefix or seed per line")
        each: dict[str, Any] = dict(zip(given, values, strict=True))
        noise: Any = (each["seed"], 1) if "seed" in each else (seed, number)
        line = Line(each["line"], each.get("prefix", ""), noise)
        check_text("line", number, line.text)
        check_text("prefix", number, line.prefix)
        check_seed(line.noise[0])
        yield line


def check_seed(seed: Any) -> None:
    """Raise `UserError` if `seed` is not an integer from 0 to 2^32 - 1."""
    if not (isinstance(seed, Integral) and 0 <= int(seed) < 2**32):
        raise UserError(f"seed is {seed!r}: give 0 to {2**32 - 1}")


def check_text(name: str, number: int, text: Any) -> None:
    """Raise `UserError` if `text` is not a string, or cannot be encoded in UTF-8."""
    if not isinstance(text, str):
        raise UserError(f"{name} {number} is {text!r}: give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} {number} has a lone surrogate, U+{ord(text[error.start]):X}, which is not "
            "text: leave it out"
        ) from None
