"""What several processes agree on; tests/test_resume.py starts real ones."""

import socket
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxformer.errors import UserError
from train import hosts
from train.config import ParallelConfig
from train.hosts import (
    ProcessLost,
    agreed,
    check_alike,
    check_shared,
    initialize_hosts,
    noticing_lost_processes,
    together,
)
from train.lock import only_process


@pytest.fixture
def two(monkeypatch):
    """Pretend to be process 1 of two; tests say what the other one sends."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(hosts, "meet", lambda name: None)
    return monkeypatch


def fails_elsewhere(patch, elsewhere):
    patch.setattr(
        hosts.multihost_utils, "process_allgather", lambda here: np.array([elsewhere, here])
    )


def test_all_go_by_the_numbers_of_the_first(two):
    mine, first = np.array([33.1, np.nan]), np.array([33.2, 0.1])

    def broadcast(as_bytes):
        assert np.array_equal(as_bytes.view(np.float64), mine, equal_nan=True)
        return first.view(np.uint8)

    two.setattr(hosts.multihost_utils, "broadcast_one_to_all", broadcast)
    assert np.array_equal(agreed(mine), first)


def test_alone_there_is_nobody_to_ask():
    mine = np.array([33.1, np.nan])
    assert agreed(mine) is mine
    check_alike({"seed": 1}, "…")
    with pytest.raises(KeyError), together():
        raise KeyError("as ever")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_one_that_fails_ends_all(two, elsewhere):
    fails_elsewhere(two, elsewhere)
    with pytest.raises(UserError, match="mine"), together():
        raise UserError("mine")
    if elsewhere:
        with pytest.raises(UserError, match="process 0 has failed: see its output"), together():
            pass
    else:
        with together():
            pass


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ('{"seed": 0, "names": ["a"]}', None),
        ('{"seed": 7, "names": ["a"]}', "process 1 has seed=0 and process 0 7: give all the same"),
        ('{"seed": 0}', r"process 1 has names=\['a'\] and process 0 None"),
        ('{"seed": 0, "names": ["a", "b"]}', r"process 0 \['a', 'b'\]"),
    ],
)
def test_what_processes_were_given_is_alike(two, first, message):
    sent = iter([np.array([len(first)]), np.frombuffer(first.encode(), np.uint8)])
    shapes = []

    def agreed(values):
        shapes.append(values.shape)
        return next(sent)

    two.setattr(hosts, "agreed", agreed)
    fails_elsewhere(two, False)
    given = {"seed": 0, "names": ("a",)}
    if message is None:
        check_alike(given, "give all the same")
    else:
        with pytest.raises(UserError, match=message):
            check_alike(given, "give all the same")
    assert shapes == [(1,), (len(first),)], "all send as much as the first"


@pytest.mark.parametrize("shared", [True, False])
def test_a_directory_is_the_same_for_all_or_refused(two, tmp_path, shared):
    def agreed(values):
        if shared:  # process 0 has left its marker file
            (tmp_path / f".shared-{int(values[0]):x}").touch()
        return values

    two.setattr(hosts, "agreed", agreed)
    fails_elsewhere(two, False)
    if shared:
        check_shared(tmp_path)
    else:
        with pytest.raises(UserError, match="of process 1 is not that of process 0: name one on"):
            check_shared(tmp_path)
    two.setattr(jax, "process_index", lambda: 0)
    two.setattr(hosts, "agreed", lambda values: values)
    before = list(tmp_path.iterdir())
    check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("place", "from_environment"),
    [
        ("[::1]:1", False),
        ("a..b:1 (no address is known for 'a..b': has it started, and is the name right?)", True),
    ],
)
def test_joining_says_that_it_waits_and_counts_devices(two, capsys, place, from_environment):
    said = threading.Event()
    two.setattr(hosts, "_PATIENCE_S", 0.0)
    two.setattr(hosts, "say", lambda text: (print(text), said.set()))
    two.setattr(jax.distributed, "initialize", lambda *_: said.wait(10))
    two.setattr(jax, "devices", lambda: [SimpleNamespace(process_index=i) for i in (0, 0, 1)])
    where, config = place.split()[0], ParallelConfig()
    if from_environment:
        two.setenv("JAX_COORDINATOR_ADDRESS", where)
    else:
        config = ParallelConfig(coordinator=where, processes=2, process=1)
    with pytest.raises(UserError, match="process 0 has 2 devices and process 1 1: give all the"):
        initialize_hosts(config)
    told = capsys.readouterr().out
    assert told == f"waiting for the other processes at {place}; JAX gives up after five minutes\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names without a file")
def test_of_a_number_at_an_address_one_process_runs():
    with socket.create_server(("", 0)) as server:
        used = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="is in use: give"), only_process(used, 0):
            pass
        with only_process(used, 1), only_process(used, 2), only_process(None, None):
            second = only_process(used, 1)
            with pytest.raises(UserError, match=r"process 1 at .* runs here already"), second:
                pass
        with only_process(used, 1):
            pass


@pytest.mark.parametrize(
    "said",
    [
        "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]",
        "UNAVAILABLE: failed to connect to all addresses",
        "INTERNAL: NCCL operation ncclAllReduce failed",
    ],
)
def test_a_process_that_is_lost_is_told_in_one_line(two, said):
    error = jax.errors.JaxRuntimeError(f"{said}\n  at some place")
    with pytest.raises(ProcessLost, match="another process") as told, noticing_lost_processes():
        raise error
    assert "\n" not in str(told.value)
    with pytest.raises(jax.errors.JaxRuntimeError, match="scatter"), noticing_lost_processes():
        raise jax.errors.JaxRuntimeError("INTERNAL: cannot lower a scatter")
    two.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(jax.errors.JaxRuntimeError), noticing_lost_processes():
        raise error
