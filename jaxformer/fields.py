"""The fields of a frozen dataclass, checked against their declared types."""

import functools
import numbers
from collections.abc import Hashable, Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from jaxformer.errors import UserError

_LARGEST = 2**31 - 1  # that int32 can hold

_KINDS: Mapping[Any, tuple[type, str]] = MappingProxyType(
    {
        int: (numbers.Integral, "a whole number"),
        float: (numbers.Real, "a number"),
        bool: (bool, "True or False"),
        str: (str, "a string"),
    }
)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise `UserError` unless `value` is one of the `choices`, a `Literal`."""
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}: choose one of {', '.join(get_args(choices))}")


def check_fields(config: Any, prefix: str = "") -> None:
    """Raise `UserError` for a field of a frozen dataclass that is not of its declared type.

    NumPy scalars become Python numbers, and lists become tuples.
    """
    for name, hint in _hints(config.__class__).items():
        given = getattr(config, name)
        value = _plain(given)
        if get_origin(hint) is Literal:
            check_choice(f"{prefix}{name}", value, hint)
        elif not _is_of(value, hint):
            raise UserError(f"{prefix}{name} is {given!r}: give {_described(hint)}")
        elif isinstance(value, int) and abs(value) > _LARGEST:
            raise UserError(f"{prefix}{name} is {given!r}: give at most 2^31 - 1")
        if value is not given:
            object.__setattr__(config, name, value)


@functools.lru_cache
def _hints(config: Hashable) -> dict[str, Any]:
    return get_type_hints(config)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type: `_is_of(("a", 1), tuple[str, ...])` is False."""
    if isinstance(hint, UnionType):
        return any(_is_of(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    wanted, _ = _KINDS.get(hint, (hint, ""))
    return isinstance(value, wanted)


def _described(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(map(_described, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"several, each {_described(get_args(hint)[0])}"
    if hint in _KINDS:
        return _KINDS[hint][1]
    return "None" if hint is NoneType else f"a {hint.__name__}"
