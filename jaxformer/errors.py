"""The one exception that users are meant to read."""

import contextlib
import os
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what is wrong, where, and how to fix it. The command lines
    print it after ``error:`` and exit with status 1; library callers may catch it as `ValueError`.
    """


def require(condition: bool, name: str, value: object, fix: str) -> None:
    """Raise UserError, naming argument, value and fix, unless `condition` holds."""
    if not condition:
        raise UserError(f"{name} is {value}: {fix}")


def one_line(error: BaseException) -> str:
    """The whole message of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for where the rest would be of no use."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason(error: Exception) -> str:
    """The useful part of an error from a library that reads files, above all from orbax.

    Tensorstore nests its messages, `failed "path": failed "path": reason [tensorstore_spec=…`.
    """
    text = str(error).partition(" [tensorstore_spec=")[0].partition(" [os_error_code=")[0]
    lines = text.rpartition('": ')[2].splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def machine_errors(advice: str) -> Iterator[None]:
    """Raise `UserError` if the machine lacks memory, a device or its working directory.

    Args:
      advice: what to do about memory.
    """
    try:
        yield
    except MemoryError as error:
        said = str(error) or "no more available"
        raise UserError(f"too little memory: {said}; {advice}") from error
    except (RuntimeError, AssertionError) as error:  # such as `jax.errors.JaxRuntimeError`
        said = one_line(error)
        if said.startswith("RESOURCE_EXHAUSTED"):
            said = said.removeprefix("RESOURCE_EXHAUSTED: ")[:200]
            raise UserError(f"too little memory on the device: {said}; {advice}") from error
        _check_devices()
        raise
    except FileNotFoundError:
        _check_working_directory()
        raise


def _check_devices() -> None:
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a word
        asked = jax.config.values["jax_platforms"] or ""
        raise UserError(
            f"JAX finds no device with JAX_PLATFORMS={asked}: unset it, or install what JAX needs"
        ) from error


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working directory has been deleted: change to another") from error
