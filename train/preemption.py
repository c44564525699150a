"""SIGTERM, sent to a machine that is about to be taken away: save, and go on elsewhere."""

import signal
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preempted(BaseException):
    """Training was told to stop and has saved what it did; it is not done.

    Like `KeyboardInterrupt`, it is not an `Exception`: it may be raised while a file is read, where
    an `Exception` is taken for damage.
    """


class Preemption:
    """Notices SIGTERM; use it in a `with` block, in the main thread.

    With several processes it is enough, while they train, that one gets the signal: JAX makes all
    agree on a step that none has passed.
    """

    def __init__(self) -> None:
        self._told = self._at_once = self._handling = False
        self._before: Any = None

    def __enter__(self) -> Self:
        # With several processes, JAX has its own handler, in place since they joined.
        if jax.process_count() == 1:
            self._handle()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handling:  # restore the old handler, or the default if it was not Python's
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def reached(self, step: int) -> bool:
        """Whether to stop now that `step` is done; all processes must ask at every step."""
        if jax.process_count() == 1:
            return self._told
        return multihost_utils.reached_preemption_sync_point(step)

    def stop_at_once(self) -> None:
        """From now on raise `Preempted` as soon as SIGTERM arrives: all steps are saved."""
        self._at_once = True
        if not self._handling:
            self._handle()
        if self._told:
            raise Preempted

    def _handle(self) -> None:
        self._handling = True
        self._before = signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        if self._at_once:
            raise Preempted
