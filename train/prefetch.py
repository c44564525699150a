"""Batches made ahead, by a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


def prefetch(make: Callable[[int], Any], steps: range, depth: int = 4) -> Iterator[Any]:
    """Yield `make(step)` for each step, made ahead by a thread so that no device waits for it.

    Closing this generator ends the thread; an exception in `make` is raised here.
    """
    ready: queue.Queue = queue.Queue(depth)
    abandoned = threading.Event()

    def put(item: Any) -> bool:
        while not abandoned.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for step in steps:
                if not put((make(step), None)):
                    return
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        abandoned.set()
        thread.join()
