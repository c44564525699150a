"""Batches are made ahead of time."""

import threading
import time

import pytest

from train.prefetch import prefetch


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_come_in_order_and_the_thread_ends_with_them():
    def make(step):
        time.sleep(0.002 * (step % 3))
        return step, threading.current_thread().name

    assert list(prefetch(make, range(5, 25))) == [(step, "prefetch") for step in range(5, 25)]
    assert not prefetch_threads()
    assert list(prefetch(make, range(7, 7))) == []


def test_no_more_than_depth_batches_are_made_ahead():
    made = []
    batches = prefetch(lambda step: made.append(step), range(100), depth=3)
    next(batches)
    deadline = time.monotonic() + 60
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # One taken, three waiting, and one that the thread holds until there is room.
    assert made == [0, 1, 2, 3, 4]
    batches.close()


def test_an_exception_comes_through_after_the_batches_before_it():
    def make(step):
        if step == 3:
            raise ZeroDivisionError("batch 3")
        return step

    seen = []
    with pytest.raises(ZeroDivisionError, match="batch 3"):
        for batch in prefetch(make, range(10)):
            seen.append(batch)
    assert seen == [0, 1, 2]
    assert not prefetch_threads()


def test_leaving_the_loop_ends_the_thread():
    for batch in prefetch(lambda step: step, range(1000), depth=1):
        if batch == 2:
            break
    assert not prefetch_threads()
