"""Rows to hosts and devices, and batches made ahead."""

import threading
import time

import jax
import numpy as np
import pytest

from train.parallel import host_rows, on_one_device, prefetch, replicate, split_rows


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def test_devices_take_consecutive_rows():
    devices = jax.local_device_count()
    ids = np.arange(devices * 3 * 5).reshape(devices * 3, 5)
    split = split_rows({"ids": ids, "labels": ids + 1})
    assert split["ids"].shape == split["labels"].shape == (devices, 3, 5)
    assert np.array_equal(split["ids"].reshape(-1, 5), ids)
    assert np.array_equal(split["labels"][0], ids[:3] + 1)


@pytest.mark.parametrize("processes", [1, 3])
def test_hosts_share_the_rows_among_them(monkeypatch, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    rows = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        rows += range(12)[host_rows(12)]
    assert rows == list(range(12))


def test_replicated_arrays_lie_whole_on_every_device():
    tree = {"x": np.arange(7.0), "step": np.int32(3)}
    for name, leaf in replicate(tree).items():
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(jax.devices())
        assert np.array_equal(leaf, tree[name])
    for name, leaf in on_one_device(replicate(tree)).items():
        assert leaf.devices() == {jax.local_devices()[0]}
        assert np.array_equal(leaf, tree[name])


# ---------------------------------------------------------------------------------------------
# Prefetching
# ---------------------------------------------------------------------------------------------


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
    time.sleep(0.3)
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
