"""Whole lines on standard output, messages and throughput on standard error, and help."""

import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from jaxformer.errors import UserError


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option in its help, unless that is None, False or ()."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == ()
        return action.help if nothing else super()._get_help_string(action)


def begin_program() -> None:
    """Set up the process as a program needs it, and as a library must not."""
    # If a standard stream is closed, the next file opened would get what is meant for the stream.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:  # else its messages would be printed among translations
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if os.getpid() == 1:  # in a container: the kernel ignores signals that PID 1 does not handle
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    hook = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        # If several reads or writes fail, orbax raises one error and does not await the others.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = tell


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Let SIGTERM, or the closing of the terminal, end the block as an exception would.

    This way nothing half-written is left. What `nohup` ignores stays ignored.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    heard = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, old in heard.items():
            signal.signal(number, old)


def check_open(*names: str) -> None:
    """Raise `UserError` if a stream of `sys`, such as "stdin", was closed before Python began."""
    for name in names:
        if getattr(sys, name) is None:
            raise UserError(f"{name} is closed: connect it to a file, a pipe or a terminal")


def visible(text: str) -> str:
    r"""Escape control characters, except "\n" and "\t": text of files must not steer a terminal.

    >>> print(visible("red \x1b[31mdogs"))
    red \x1b[31mdogs
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


def say(text: str) -> None:
    """Print a line on standard error. It is not part of the result: a full disk stops nothing."""
    with contextlib.suppress(OSError):
        print(visible(text), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """`say` what the user may want to fix."""
    say(f"warning: {message}")


def drop_output() -> None:
    """Discard what is still to be written: Python would complain about it again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_argument(path: str | Path) -> str:
    """Return a path quoted as the argument of a shell command."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def write_line(text: str) -> None:
    """Write a line to standard output, at once and whole: Ctrl-C waits until it is out."""
    try:
        descriptor = sys.stdout.fileno()
    except io.UnsupportedOperation:  # not a real file, as in a notebook
        print(text, flush=True)
        return
    interrupted = []

    def remember(number: int, frame: FrameType | None) -> None:
        interrupted.append((number, frame))

    before = signal.signal(signal.SIGINT, remember)
    try:
        data = memoryview(text.encode() + b"\n")
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write standard output: {error.strerror}") from error
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted and callable(before):
        before(*interrupted[0])


class Throughput:
    """Counts lines and tokens; shows them live on a terminal, and prints the speed at the end."""

    def __init__(self, file: Any, *, quiet: bool = False) -> None:
        self._file = file
        self._quiet = quiet
        self._live = not quiet and file.isatty()
        self._began = self._shown = time.monotonic()
        self._lines = self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count a line with this many tokens."""
        self._lines += 1
        self._tokens += tokens
        now = time.monotonic()
        if self._live and now - self._shown > 0.5:
            self._shown = now
            self._write(f"\r{self._summary(now)}\x1b[K")

    def close(self) -> None:
        """Print the totals."""
        if not self._quiet:
            start = "\r" if self._live else ""
            end = "\x1b[K" if self._live else ""
            self._write(f"{start}{self._summary(time.monotonic())}{end}\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # it is not part of the result
            self._file.write(text)
            self._file.flush()

    def _summary(self, now: float) -> str:
        seconds = max(now - self._began, 1e-9)
        return (
            f"{self._lines:,} lines in {seconds:.1f} s, compilation included: "
            f"{self._lines / seconds:,.1f} lines/s, {self._tokens / seconds:,.0f} tokens/s"
        )
