"""Stopped, killed, damaged, moved to other devices: a run goes on as if nothing had happened."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from damage import flip_a_bit
from jaxformer.checkpoints import checkpoint_steps, load_params
from small_run import change, small_config, write_corpus
from train.log import Log
from train.loop import fit
from train.metrics import read_metrics
from train.preemption import Preempted

SCRIPT = Path(__file__).parent / "fit_small.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def config(folder):
    """Dropout and accumulation are on: repeated steps must have the same noise."""
    return small_config(folder, steps=6, evaluate__every=3, model__dropout=0.1, accumulate=2)


@pytest.fixture(scope="module")
def run(config):
    return fit(config)


def assert_same_run(run, other):
    assert checkpoint_steps(other) == checkpoint_steps(run)
    for checkpoint in (checkpoint_steps(run)[-1], "average"):
        jax.tree.map(
            np.testing.assert_array_equal,
            load_params(other, checkpoint),
            load_params(run, checkpoint),
        )


# ---------------------------------------------------------------------------------------------
# In one process
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(
    run, config, folder, monkeypatch, capsys, step
):
    """At an evaluation and after one; a checkpoint without an evaluation is not averaged."""
    told = change(config, run=str(folder / f"told{step}"), log_every=1)
    flush = Log.flush

    def flush_and_be_told(self, done):
        flush(self, done)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "flush", flush_and_be_told)
        with pytest.raises(Preempted):
            fit(told)
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"stopped by SIGTERM; step {step} is saved" in capsys.readouterr().out
    assert max(checkpoint_steps(told.run)) == step
    fit(told)
    assert_same_run(run, Path(told.run))


def test_sigterm_while_a_run_is_scored_ends_it_at_once(run, config, folder, monkeypatch, capsys):
    told = change(config, run=str(folder / "scored"))
    shutil.copytree(run, told.run)

    def score_and_be_told(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr("train.loop._evaluate", score_and_be_told)
        with pytest.raises(Preempted):
            fit(told)
    assert "stopped by SIGTERM; all steps are saved" in capsys.readouterr().out
    fit(told)
    assert_same_run(run, Path(told.run))


def test_a_finished_run_whose_metrics_are_damaged_is_scored(run, config, folder, capfd):
    """By the last checkpoint, as none is known to be the best."""
    damaged = folder / "unknown"
    shutil.copytree(run, damaged)
    for step in (3, 6):
        (damaged / f"checkpoints/{step}/metrics/metrics").write_text("")
    fit(change(config, run=str(damaged)))
    output, errors = capfd.readouterr()
    assert "scoring checkpoint 6\n" in output and errors.count("cannot be read: now") == 2


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(run, config, folder, capfd):
    damaged = folder / "damaged"
    shutil.copytree(run, damaged)
    flip_a_bit(damaged / "checkpoints" / "6")
    fit(change(config, run=str(damaged)))
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings) == 1 and "it is now damaged-6, trying the one before" in warnings[0]
    assert_same_run(run, damaged)


@pytest.mark.slow
def test_pmap_goes_on_over_a_mesh_and_back(folder):
    """The same examples, and without dropout the same losses."""
    plain = small_config(folder, run=str(folder / "pmap"), steps=6, log_every=1)
    fit(plain)
    moved = change(plain, run=str(folder / "moved"), steps=2)
    fit(moved)
    mesh = change(moved, parallel__strategy="mesh", parallel__fsdp=2, parallel__tensor=2)
    fit(change(mesh, steps=4))
    fit(change(moved, steps=6))
    assert_same_losses(folder / "moved", folder / "pmap")


def assert_same_losses(run, other, tolerance=1e-4):
    losses, expected = (
        {
            record["step"]: record["loss"]
            for record in read_metrics(path)
            if record["split"] == "train"
        }
        for path in (run, other)
    )
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, rel=tolerance)


# ---------------------------------------------------------------------------------------------
# In several
# ---------------------------------------------------------------------------------------------


def start(folder, run, *changes, processes=1, devices=8, of_last=()):
    """Start training in `processes` that see each other, with `devices` in all.

    The last process also gets the changes `of_last`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    each = f"--xla_force_host_platform_device_count={devices // processes}"
    # Of two such flags the last counts.
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {each}"}
    started = []
    for index in range(processes):
        hosts = [
            "distributed=True",
            f"parallel__coordinator='localhost:{port}'",
            f"parallel__processes={processes}",
            f"parallel__process={index}",
        ]
        started.append(
            subprocess.Popen(
                [
                    sys.executable, SCRIPT, folder, f"run={str(run)!r}", "log_every=1", *changes,
                    *(hosts if processes > 1 else []),
                    *(of_last if index == processes - 1 else []),
                ],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )  # fmt: skip
    return started


def finish(started, status=0):
    """Wait for all; if one ended with another status, fail with its output."""
    outputs = [process.communicate(timeout=500)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == status, output[-3000:]
    return outputs


@pytest.fixture(scope="module")
def losses_of_one(folder):
    """A run of 6 steps, in this process, on 8 devices."""
    return fit(small_config(folder, run=str(folder / "one"), log_every=1))


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one(folder, run, processes):
    """Each device has the noise that it has in a single process."""
    changes = ["model__dropout=0.1", "accumulate=2", "log_every=3", "evaluate__beam_size=1"]
    assert_trains_as(run, folder / f"pmap{processes}", processes, *changes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_of_a_mesh_train_as_one(folder, losses_of_one, processes):
    changes = ["parallel__strategy='mesh'", "parallel__fsdp=2", "parallel__tensor=2"]
    assert_trains_as(losses_of_one, folder / f"mesh{processes}", processes, *changes)


def assert_trains_as(expected, run, processes, *changes):
    outputs = finish(start(run.parent, run, *changes, processes=processes))
    assert "try it: jaxformer translate" in outputs[0]
    # Gloo, which carries the collectives, also prints, from several threads into one line.
    gloo = (
        r"\[Gloo\] Rank |\d| is connected to | peer ranks\. |"
        r"Expected number of connected peer ranks is : "
    )
    said = re.sub(gloo, "", "".join(outputs[1:])).strip()
    assert not said, "the first process speaks for all"
    assert_same_losses(run, expected, 1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        load_params(run, "average"),
        load_params(expected, "average"),
    )


@pytest.mark.slow
def test_one_of_two_processes_is_told_and_both_stop(folder):
    run = folder / "one_told"
    changes = ["steps=100000", "evaluate__every=100000"]
    started = start(folder, run, *changes, processes=2)
    while last_step(run) < 5 and started[0].poll() is None:
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    outputs = finish(started, 143)
    (step,) = checkpoint_steps(run)
    assert f"stopped by SIGTERM; step {step} is saved" in outputs[0]


@pytest.mark.slow
def test_of_two_processes_that_differ_neither_trains(folder):
    run, other = folder / "differ", write_corpus(folder / "other")
    lines = (other / "train.de").read_text().splitlines()
    (other / "train.de").write_text("".join(f"{line}\n" for line in reversed(lines)))
    for differs, told in (
        ("seed=1", "process 1 has seed=1 and process 0 0: give all the same command"),
        (f"data__path={str(other)!r}", "process 1 has data.train="),
        ("data__path='nowhere'", "there is no folder nowhere"),
    ):
        outputs = finish(start(folder, run, processes=2, of_last=[differs]), 1)
        assert told in outputs[1] and "process 1 has failed: see its output" in outputs[0]
        assert not last_step(run)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(folder):
    run = folder / "one_killed"
    changes = ["steps=100000", "evaluate__every=100000"]
    # One device each: of several, others would wait for the one that notices, until the heartbeat.
    started = start(folder, run, *changes, processes=2, devices=2)
    while last_step(run) < 5 and started[0].poll() is None:
        time.sleep(0.1)
    started[1].kill()
    started[1].communicate()
    assert "error: another process has ended" in finish(started[:1], 75)[0]


@pytest.mark.slow
def test_a_run_moves_to_fewer_devices_and_another_strategy(folder):
    finish(start(folder, folder / "stays", "steps=12"))
    moves = [
        (8, 3, []),
        (4, 6, []),
        (1, 9, []),
        (8, 12, ["parallel__strategy='mesh'", "parallel__fsdp=4"]),
    ]
    for devices, steps, more in moves:
        finish(start(folder, folder / "moves", f"steps={steps}", *more, devices=devices))
    assert_same_losses(folder / "moves", folder / "stays")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_ten_times_it_ends_with_the_same_bits(folder, processes):
    changes = ["model__dropout=0.1", "accumulate=2", "steps=200", "evaluate__every=8"]
    changes += ["checkpoint__keep_last=3", "checkpoint__average=3"]
    undisturbed, killed = folder / f"calm{processes}", folder / f"killed{processes}"
    finish(start(folder, undisturbed, *changes, processes=processes, devices=2))
    draw, kills = random.Random(processes), 0
    while kills < 10:
        started = start(folder, killed, *changes, processes=processes, devices=2)
        goal = last_step(killed) + draw.randint(1, 12)
        while last_step(killed) < goal and started[0].poll() is None:
            time.sleep(0.05)
        time.sleep(draw.random())
        victims = started if draw.random() < 0.5 else [draw.choice(started)]
        assert any(process.poll() is None for process in victims), "it ended before ten kills"
        # The survivors would wait for the others in vain.
        for process in dict.fromkeys([*victims, *started]):
            process.kill()
            process.communicate()
        kills += 1
    finish(start(folder, killed, *changes, processes=processes, devices=2))
    assert_same_run(undisturbed, killed)
    assert_same_losses(killed, undisturbed, 0)


def last_step(run):
    if not run.exists():
        return 0
    return max((record["step"] for record in read_metrics(run)), default=0)
