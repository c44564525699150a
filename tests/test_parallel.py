"""Rows to hosts and devices."""

import jax
import numpy as np
import pytest

from jaxformer.config import TransformerConfig
from train.config import ParallelConfig
from train.mesh import make_mesh
from train.parallel import DataParallel, MeshParallel

ROWS = {"ids": np.arange(48 * 5).reshape(48, 5), "labels": np.arange(48 * 3).reshape(48, 3)}


def mine(rows):
    return {name: x[rows] for name, x in ROWS.items()}


def mesh():
    config = ParallelConfig(strategy="mesh", fsdp=2, tensor=2)
    return MeshParallel(make_mesh(config, TransformerConfig(vocab_size=32), jax.devices()))


def test_devices_take_consecutive_rows():
    devices = jax.local_device_count()
    placed = DataParallel().place(48, mine)
    assert placed["ids"].shape == (devices, 48 // devices, 5)
    assert placed["labels"].shape == (devices, 48 // devices, 3)
    for name, x in placed.items():
        assert np.array_equal(x.reshape(ROWS[name].shape), ROWS[name])


@pytest.mark.parametrize("processes", [1, 3])
def test_hosts_share_the_rows_among_them(monkeypatch, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    read = []

    def note(rows):
        read.extend(range(48)[rows])
        return mine(rows)

    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        DataParallel().place(48, note)
    assert read == list(range(48))


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
def test_over_a_mesh_devices_that_share_rows_are_given_the_same():
    placed = mesh().place(48, mine)
    for name, x in placed.items():
        assert np.array_equal(x, ROWS[name])
        rows = {shard.device.id: shard.index[0] for shard in x.addressable_shards}
        # data 2 x fsdp 2 take different rows, the two devices along tensor the same.
        assert len({(part.start, part.stop) for part in rows.values()}) == 4
        assert all(rows[device] == rows[device + 1] for device in (0, 2, 4, 6))


def test_replicated_arrays_lie_whole_on_every_device():
    tree = {"x": np.arange(7.0), "step": np.int32(3)}
    runner = DataParallel()
    state = runner.create(lambda: tree)
    for name, leaf in state.items():
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(jax.devices())
        assert np.array_equal(leaf, tree[name])
    for name, leaf in runner.whole(state).items():
        assert leaf.devices() == {jax.local_devices()[0]}
        assert np.array_equal(leaf, tree[name])
