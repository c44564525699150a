"""The one exception that users are meant to read."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what is wrong, where, and how to fix it. The command lines
    print it after ``error:`` and exit with status 1; library callers may catch it as `ValueError`.
    """


def reason(error: Exception) -> str:
    """Return what a person can use of an error of orbax, as one line.

    Tensorstore nests its messages, `failed "path": failed "path": reason [tensorstore_spec=…`.
    """
    text = str(error).partition(" [tensorstore_spec=")[0].partition(" [os_error_code=")[0]
    lines = text.rpartition('": ')[2].splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Raise `UserError`, with advice, where a device or this machine has too little memory."""
    try:
        yield
    except MemoryError as error:
        reason = str(error) or "no more to be had"
        raise UserError(f"too little memory: {reason}; {advice}") from error
    except RuntimeError as error:  # as `jax.errors.JaxRuntimeError` is
        reason = " ".join(str(error).split())
        if not reason.startswith("RESOURCE_EXHAUSTED"):
            raise
        reason = reason.removeprefix("RESOURCE_EXHAUSTED: ")[:200]
        raise UserError(f"too little memory on the device: {reason}; {advice}") from error
