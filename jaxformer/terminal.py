"""Whole lines to standard output, how fast they come to standard error, and help."""

import argparse
import contextlib
import io
import os
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
    """Do what a program needs, and a library must not do for the process that it is part of."""
    # Where a stream was closed, the next file that is opened would get what is meant for it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:  # what is meant for it would be printed among translations
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if os.getpid() == 1:  # of a container: the kernel ends it for no signal that it does not handle
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    hook = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        # Of several reads or writes that fail orbax raises one, and waits for none of the others.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = tell


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Let SIGTERM, or a terminal that is closed, end the block as an exception would.

    So nothing half-written is left. What `nohup` ignores stays ignored.
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


def say(text: str) -> None:
    """Print a line on standard error; it is no part of the result, and a full disk ends nothing."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """`say` what somebody may want to mend."""
    say(f"warning: {message}")


def drop_output() -> None:
    """Send what is still to be written nowhere, or Python would complain again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_argument(path: str | Path) -> str:
    """A path as it is given to a command in a shell."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def write_line(text: str) -> None:
    """Write a line to standard output, at once and whole: Ctrl-C waits until it is out."""
    try:
        descriptor = sys.stdout.fileno()
    except io.UnsupportedOperation:  # a stream of Python's own, as a notebook has
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
    """Counts lines and tokens; shows them if it has a terminal, and in the end says how fast."""

    def __init__(self, file: Any, *, quiet: bool = False) -> None:
        self._file = file
        self._quiet = quiet
        self._live = not quiet and file.isatty()
        self._began = self._shown = time.monotonic()
        self._lines = self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count a line of so many tokens."""
        self._lines += 1
        self._tokens += tokens
        now = time.monotonic()
        if self._live and now - self._shown > 0.5:
            self._shown = now
            self._write(f"\r{self._summary(now)}\x1b[K")

    def close(self) -> None:
        """Say the sums."""
        if not self._quiet:
            start = "\r" if self._live else ""
            end = "\x1b[K" if self._live else ""
            self._write(f"{start}{self._summary(time.monotonic())}{end}\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # it is no part of the result
            self._file.write(text)
            self._file.flush()

    def _summary(self, now: float) -> str:
        seconds = max(now - self._began, 1e-9)
        return (
            f"{self._lines:,} lines in {seconds:.1f} s, compilation included: "
            f"{self._lines / seconds:,.1f} lines/s, {self._tokens / seconds:,.0f} tokens/s"
        )
