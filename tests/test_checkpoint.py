import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from damage import flip_a_bit, leave_out, swap, truncate
from jaxformer import checkpoints, run_directory
from jaxformer.checkpoints import (
    best_step,
    checkpoint_steps,
    evaluations,
    find_checkpoint,
    load_params,
    save_params,
)
from jaxformer.config import PRESETS
from jaxformer.errors import UserError
from jaxformer.run_directory import load_tokenizers, read_config, read_model_config, write_config
from jaxformer.tokenizer import Tokenizer
from train.checkpoint import Checkpoints
from train.lock import only_trainer

ROOT = Path(__file__).parent.parent


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    rng: jax.Array | None = None
    old_rng: jax.Array | None = None


def make_state(step=0, value=None, width=5, optimizer=None):
    value = float(step) if value is None else value
    params = {
        "decoder": {"kernel": jnp.full((3, width), value)},
        "scale": jnp.full((7,), value, jnp.bfloat16),
    }
    return State(jnp.int32(step), params, (optimizer or optax.adam(1e-3)).init(params))


def random_params(seed):
    return {"decoder": {"kernel": jax.random.normal(jax.random.key(seed), (300, 50))}}


def save_all(run, states_and_metrics, **options):
    with Checkpoints(run, **options) as checkpoints:
        for state, metrics in states_and_metrics:
            checkpoints.save(state, metrics)


def bits(tree):
    def leaf_bits(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()

    return jax.tree.map(leaf_bits, tree)


def mesh_of_all_devices():
    return jax.make_mesh((jax.device_count(),), ("data",))


# ---------------------------------------------------------------------------------------------
# The training state
# ---------------------------------------------------------------------------------------------


def test_a_restored_state_is_bit_identical(tmp_path):
    odd = jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45, 1 / 3], jnp.float32)
    params = {"odd": odd, "half": {"kernel": jnp.linspace(-3, 3, 77, dtype=jnp.bfloat16)}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),  # an empty state
        optax.masked(optax.add_decayed_weights(0.1), {"odd": False, "half": True}),
        optax.adam(1e-3),
    )
    opt_state = jax.tree.map(lambda x: x + 1, optimizer.init(params))
    key = jax.random.key(13)
    state = State(jnp.int32(11), params, opt_state, key, jax.random.PRNGKey(17))
    blank = jax.tree.map(jnp.zeros_like, replace(state, rng=None))
    blank = replace(blank, rng=jax.random.key(0))
    save_all(tmp_path, [(state, None)])

    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(blank)

    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert restored.rng.dtype == key.dtype


def test_restore_takes_the_shardings_of_the_example(tmp_path):
    mesh = mesh_of_all_devices()
    split = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    here = SingleDeviceSharding(jax.devices()[-1])
    values = jnp.arange(5.0 * jax.device_count())
    state = State(
        jax.device_put(jnp.int32(1), everywhere),
        {"split": jax.device_put(values, split), "whole": jax.device_put(values, everywhere)},
        (),
    )
    save_all(tmp_path, [(state, None)])

    shardings = replace(state, step=here, params={"split": everywhere, "whole": here})
    example = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(example)

    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings
    assert bits(restored) == bits(state)


@pytest.mark.parametrize("replicated", [False, True])
def test_arrays_may_be_donated_while_they_are_saved(tmp_path, replicated):
    sharding = SingleDeviceSharding(jax.devices()[0])
    if replicated:
        sharding = NamedSharding(mesh_of_all_devices(), PartitionSpec())
    state = State(jnp.int32(1), {"kernel": jnp.ones((1009, 503)), "scale": jnp.ones(7)}, ())
    state = jax.device_put(state, sharding)
    increment = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for _ in range(3):
            state = increment(state)
        jax.block_until_ready(state)

    saved = load_params(tmp_path)
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(saved))


def test_a_step_is_saved_once(tmp_path):
    save_all(tmp_path, [(make_state(3, value=1.0), None), (make_state(3, value=2.0), None)])
    assert np.all(load_params(tmp_path)["scale"] == 1)


def test_the_last_is_restored(tmp_path):
    save_all(tmp_path, [(make_state(step), {"loss": 1.0}) for step in (2, 9, 11)])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [2, 9, 11]
        assert int(checkpoints.restore(make_state()).step) == checkpoints.all_steps()[-1] == 11


def test_another_model_or_optimizer_is_named_in_one_line(tmp_path):
    save_all(tmp_path, [(make_state(1), None)])
    deeper = make_state()
    deeper = replace(deeper, params=deeper.params | {"encoder": {"bias": jnp.zeros(3)}})
    half = make_state()
    half = replace(half, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), half.params))
    with Checkpoints(tmp_path) as checkpoints:
        for example, difference in [
            (make_state(width=11), r"decoder/kernel is float32\[3,5\] there and float32\[3,11\]"),
            (deeper, r"encoder/bias is missing there and float32\[3\] here"),
            (half, r"decoder/kernel is float32\[3,5\] there and bfloat16\[3,5\]"),
            (make_state(optimizer=optax.sgd(0.1)), r"opt_state/0/count is int32\[\] there and mi"),
        ]:
            with pytest.raises(UserError, match=difference) as raised:
                checkpoints.restore(example)
            assert "\n" not in str(raised.value)


def test_a_damaged_checkpoint_is_reported_in_one_line(tmp_path):
    save_all(tmp_path, [(make_state(1), None)])
    shutil.rmtree(tmp_path / "checkpoints/1/params/d")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"cannot read .*delete it") as raised,
    ):
        checkpoints.restore(make_state())
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(UserError, match="copy the checkpoint again"):
        load_params(tmp_path)


def test_a_directory_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory; choose another run directory"):
        Checkpoints(tmp_path / "file")


def test_a_full_disk_is_reported_and_the_last_checkpoint_survives(tmp_path, caplog):
    big = make_state(2, width=40_009)
    big = replace(big, params={"noise": jax.random.normal(jax.random.key(0), (40_009,))})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match=r"File too large; free disk space"):  # noqa: SIM117
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(make_state(1))
            checkpoints.wait()
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
                checkpoints.save(big)
                checkpoints.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.records == []  # the exception is enough
    assert checkpoint_steps(tmp_path) == [1]
    assert np.all(load_params(tmp_path)["scale"] == 1)


# ---------------------------------------------------------------------------------------------
# Which checkpoints stay, and which one is the best
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 1)])
def test_the_last_and_the_best_are_kept(tmp_path, mode, best):
    scores = {1: 3.0, 2: 9.0, 3: float("nan"), 4: None, 5: 5.0, 6: 4.0}
    save_all(
        tmp_path,
        [(make_state(n), None if s is None else {"bleu": s, "x": 0.0}) for n, s in scores.items()],
        keep_last=2,
        keep_best=1,
        metric="bleu",
        mode=mode,
    )
    assert checkpoint_steps(tmp_path) == [best, 5, 6]
    assert best_step(tmp_path) == best


def test_what_was_not_evaluated_goes_when_the_next_is_there(tmp_path):
    """Nor does it push out one that was evaluated, which may be averaged."""
    with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
        for step, metrics in ((1, True), (2, True), (3, False), (4, False)):
            checkpoints.save(make_state(step), {"loss": 1.0} if metrics else None)
        checkpoints.wait()
        assert checkpoints.all_steps() == [1, 2, 4]
        assert checkpoints.evaluated_steps() == [1, 2]
        checkpoints.save(make_state(5), {"loss": 1.0})
    assert checkpoint_steps(tmp_path) == [2, 5]


def test_of_equals_the_latest_is_the_best(tmp_path):
    save_all(tmp_path, [(make_state(step), {"loss": 2.5}) for step in (1, 2, 3)], keep_last=2)
    assert checkpoint_steps(tmp_path) == [2, 3]
    assert best_step(tmp_path) == 3


def test_without_evaluation_there_is_no_best(tmp_path):
    save_all(tmp_path, [(make_state(1), None), (make_state(2), {"loss": float("nan")})])
    assert best_step(tmp_path) is None


def test_a_metric_that_is_not_evaluated_is_refused(tmp_path):
    with (
        Checkpoints(tmp_path, metric="belu") as checkpoints,
        pytest.raises(UserError, match="'belu', which is not evaluated: choose one of loss, bleu"),
    ):
        checkpoints.save(make_state(1), {"loss": 1.0, "bleu": 2.0})


# ---------------------------------------------------------------------------------------------
# The average
# ---------------------------------------------------------------------------------------------


def test_average_is_the_float32_mean_in_the_saved_dtype(tmp_path):
    # From 256 on bfloat16 has only even numbers: summed or averaged in it, these give 256.
    values = {1: 256.0, 2: 258.0, 3: 258.0, 4: 260.0}
    save_all(tmp_path, [(make_state(n, value), {"loss": 1.0}) for n, value in values.items()])
    with Checkpoints(tmp_path) as checkpoints:
        mean, steps = checkpoints.average([1, 2, 3, 4])
    assert steps == [1, 2, 3, 4]
    assert mean["scale"].dtype == jnp.bfloat16
    assert mean["decoder"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(mean["decoder"]["kernel"], np.full((3, 5), 258.0, np.float32))
    np.testing.assert_array_equal(mean["scale"], np.full(7, 258.0, jnp.bfloat16))


def test_average_of_equal_checkpoints_is_exact(tmp_path):
    save_all(tmp_path, [(make_state(step, value=0.1), {"loss": 1.0}) for step in (1, 2, 3)])
    with Checkpoints(tmp_path) as checkpoints:
        assert bits(checkpoints.average([1, 2, 3])[0]) == bits(checkpoints.average([2])[0])


@pytest.mark.parametrize("steps", [[], [1, 1], [1, 3]])
def test_average_needs_distinct_steps_that_are_there(tmp_path, steps):
    save_all(tmp_path, [(make_state(1), None)])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"distinct|choose"):
        checkpoints.average(steps)


def test_a_damaged_checkpoint_is_left_out_of_the_average(tmp_path, capsys):
    save_all(tmp_path, [(make_state(step), {"loss": 1.0}) for step in (1, 2, 3, 5)])
    damaged = tmp_path / "checkpoints"
    for step in (1, 3):
        shutil.rmtree(damaged / str(step) / "params")
    with Checkpoints(tmp_path) as checkpoints:
        mean, steps = checkpoints.average([1, 2, 3, 5])
        assert steps == [2, 5] and np.all(mean["decoder"]["kernel"] == 3.5)
        lines = capsys.readouterr().err.splitlines()
        assert [line.endswith("the average leaves it out") for line in lines] == [True, True]
        with pytest.raises(UserError, match="cannot read"):
            checkpoints.average([1, 3])
        checkpoints.save_average(mean, steps)
        assert find_checkpoint(tmp_path).name == "average"
        checkpoints.remove_average()
        assert find_checkpoint(tmp_path).name == "5"
        checkpoints.remove_average()


def test_an_average_stays_until_the_next_is_whole(tmp_path, monkeypatch):
    """However the program ends in between."""
    save_all(tmp_path, [(make_state(step), {"loss": 1.0}) for step in (1, 2)])

    def save(checkpointer, path, **_):
        path.mkdir()
        raise KeyboardInterrupt

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_average(*checkpoints.average([1, 2]))
        with monkeypatch.context() as patch:
            patch.setattr(ocp.Checkpointer, "save", save)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save_average(*checkpoints.average([2, 1]))
        assert find_checkpoint(tmp_path).name == "average"
        assert np.all(load_params(tmp_path)["scale"] == 1.5)
        checkpoints.save_average(*checkpoints.average([1, 2]))
        assert {path.name for path in checkpoints.directory.iterdir()} == {"1", "2", "average"}


@pytest.mark.parametrize("text", ["", '{"metric": "lo', "3", '{"a": 1}'])
def test_metrics_that_cannot_be_read_are_set_aside(tmp_path, capsys, text):
    save_all(tmp_path, [(make_state(step), {"loss": 1.0}) for step in (1, 2)])
    directory = tmp_path / "checkpoints"
    (directory / "2/metrics/metrics").write_text(text)
    assert best_step(tmp_path) == 1
    with Checkpoints(tmp_path) as checkpoints:
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            "warning: the metrics of checkpoint 2 cannot be read: now damaged-metrics-2"
        )
        assert checkpoints.evaluated_steps() == [1]
        assert checkpoints.restore(make_state()).step == 2
        checkpoints.save(make_state(3), {"loss": 2.0})
    assert (directory / "damaged-metrics-2/metrics").read_text() == text
    assert checkpoint_steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, leave_out, swap])
def test_the_one_before_a_damaged_checkpoint_is_used(tmp_path, capsys, damage):
    """The same step may be damaged again."""
    for name in ("damaged-2", "damaged-2.2", "damaged-2.3"):
        states = [replace(make_state(step), params=random_params(step)) for step in (1, 2)]
        save_all(tmp_path, [(state, {"loss": 1.0}) for state in states])
        damage(tmp_path / "checkpoints/2")
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.restore(states[0]).step == 1
        assert f"it is now {name}, trying the one before" in capsys.readouterr().err
        assert (tmp_path / "checkpoints" / name).is_dir()


def test_of_parameters_alone_training_cannot_go_on(tmp_path, capsys):
    save_all(tmp_path, [(make_state(1), {"loss": 1.0})])
    save_params(tmp_path, 2, make_state(2).params)
    with pytest.raises(UserError, match="has a checkpoint 2 already: give another step"):
        save_params(tmp_path, 2, make_state(2).params)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state(1)).step == 1
    assert "2 has no optimizer that training could go on with" in capsys.readouterr().err


def test_whatever_orbax_raises_is_damage(tmp_path, monkeypatch, capsys):
    states = [make_state(step) for step in (1, 2)]
    save_all(tmp_path, [(state, {"loss": 1.0}) for state in states])
    restore = ocp.CheckpointManager.restore

    def failing(manager, step, **options):
        if step == 2:
            raise Exception("Encountered error while reading array index")
        return restore(manager, step, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", failing)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(states[0]).step == 1
    assert "error while reading array index" in capsys.readouterr().err


def test_a_run_that_was_moved_away_is_not_made_anew(tmp_path):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(make_state(1), {"loss": 1.0})
        checkpoints.wait()
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(UserError, match=r"run/checkpoints is gone: move it back"):
            checkpoints.save(make_state(2), {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_notes_of_another_kind(tmp_path):
    """JSON beside the arrays may be damaged too: of another form, it is not relied on."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), {"loss": float(step)})
        checkpoints.save_average(checkpoints.average([1, 2])[0], [1, 2])
    info = tmp_path / "checkpoints/average/info/metadata"
    info.write_text('{"latest": null}')
    assert find_checkpoint(tmp_path).name == "1"
    for record in ('{"metric": [1], "mode": "min", "values": {}}', "[" * 100_000):
        (tmp_path / "checkpoints/1/metrics/metrics").write_text(record)
        assert list(evaluations(tmp_path)) == [2]
    (tmp_path / "checkpoints/2/info/metadata").write_text('{"fingerprints": 3}')
    with pytest.raises(UserError, match="is damaged"):
        load_params(tmp_path, 2)


@pytest.mark.parametrize("name", ["exp[1]", "a\\b", "gs://bucket/run", "r\udcf6"])
def test_names_with_which_checkpoints_could_not_be_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    said = r"read: rename it|give a directory, for example where a bucket|is not UTF-8: rename it"
    with pytest.raises(UserError, match=said):
        save_params(name, 1, {"a": np.ones(2)})
    with pytest.raises(UserError, match=said):
        only_trainer(Path(name)).__enter__()
    assert not list(tmp_path.iterdir())
    if ":" not in name:  # renamed by other means
        save_params("run", 1, {"a": np.ones(2)})
        Path("run").rename(name)
        with pytest.raises(UserError, match=said):
            load_params(name, 1)


def test_what_training_removes_while_it_is_read_is_read_from_the_newer_one(tmp_path, monkeypatch):
    save_params(tmp_path, 1, {"a": np.ones(2)})
    read = checkpoints.read_arrays

    def too_late(path):
        if path.parent.name == "1":
            save_params(tmp_path, 2, {"a": np.zeros(2)})
            shutil.rmtree(path.parent)
        return read(path)

    monkeypatch.setattr(checkpoints, "read_arrays", too_late)
    np.testing.assert_array_equal(load_params(tmp_path, "last")["a"], [0, 0])
    with pytest.raises(UserError, match="has no checkpoint 1: choose"):
        load_params(tmp_path, 1)


def test_the_average_is_the_default_until_training_goes_on(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), {"loss": 2.0})
        checkpoints.save(make_state(2), {"loss": 3.0})
        assert find_checkpoint(tmp_path).name == "1"  # the best
        for _ in range(2):  # the second replaces the first
            checkpoints.save_average(checkpoints.average([1, 2])[0], [2, 1])
    average = find_checkpoint(tmp_path)
    assert average.name == "average"
    assert not list(average.parent.glob("average.*"))
    assert json.loads((average / "info/metadata").read_text())["steps"] == [1, 2]
    assert np.all(load_params(tmp_path)["scale"] == 1.5)

    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [1, 2]
        checkpoints.save(make_state(3), {"loss": 1.0})
    assert find_checkpoint(tmp_path).name == "3"
    assert find_checkpoint(tmp_path, "average") == average


# ---------------------------------------------------------------------------------------------
# Reading a run elsewhere
# ---------------------------------------------------------------------------------------------


def test_params_are_read_alone_on_another_machine_and_in_silence(tmp_path):
    state = make_state(1)
    sharding = NamedSharding(mesh_of_all_devices(), PartitionSpec())
    save_all(tmp_path / "there", [(jax.device_put(state, sharding), None)])
    shutil.move(tmp_path / "there", tmp_path / "here")
    shutil.rmtree(tmp_path / "here/checkpoints/1/optimizer")
    program = f"""
import jax, numpy
from jaxformer.checkpoints import load_params
params = load_params({str(tmp_path / "here")!r})
assert jax.device_count() == 1
print(*(type(x) is numpy.ndarray for x in jax.tree.leaves(params)))
print(jax.tree.map(lambda x: (x.dtype.name, x.tolist()), params))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    are_numpy, values = done.stdout.splitlines()
    assert are_numpy == "True True"
    expected = jax.tree.map(lambda x: (x.dtype.name, x.tolist()), state.params)
    assert values == str(expected)


def test_the_trainer_saves_in_silence(tmp_path, caplog, capfd):
    save_all(tmp_path, [(make_state(1), {"loss": 1.0}), (make_state(2), None)], keep_last=1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_average(*checkpoints.average([1, 2]))
        checkpoints.restore(make_state())
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_is_found_by_name_or_step(tmp_path):
    save_all(tmp_path, [(make_state(step), {"loss": abs(step - 20.0)}) for step in (10, 20, 30)])
    (tmp_path / "checkpoints/40.orbax-checkpoint-tmp").mkdir()  # a save that was interrupted
    for checkpoint, step in {"best": 20, "last": 30, "10": 10, 10: 10, None: 20}.items():
        assert find_checkpoint(tmp_path, checkpoint).name == str(step)
    for checkpoint in ("average", "bset", 15, "40"):
        with pytest.raises(UserError, match=r"no checkpoint .*one of the steps 10, 20, 30"):
            find_checkpoint(tmp_path, checkpoint)


def test_no_checkpoint_yet(tmp_path):
    for checkpoint in (None, "average", "best", "last", 1):
        with pytest.raises(UserError, match="no checkpoint yet"):
            load_params(tmp_path, checkpoint)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == []
        assert best_step(tmp_path) is None
        with pytest.raises(UserError, match="no checkpoint yet"):
            checkpoints.restore(make_state())


def test_config_comes_back(tmp_path):
    model = PRESETS["tiny"].replace(vocab_size=97, norm="pre")
    write_config(tmp_path / "run", {"model": model.to_dict(), "data": {"source": "한국어"}})
    assert read_model_config(tmp_path / "run") == model
    assert read_config(tmp_path / "run")["data"] == {"source": "한국어"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a run directory: it has no config.json"),
        ('{"version": 1,\n "model": {', r"config.json:2 is not valid JSON"),
        ("[]", "has version None, this jaxformer reads version 1"),
        ('{"version": 2, "model": {}}', "has version 2, this jaxformer reads version 1"),
        ('{"version": 1}', 'has no "model" section'),
        ('{"version": 1, "model": {"d_modle": 8}}', "config.json: .*no field 'd_modle'"),
        ('{"version": 1, "model": {"dropout": "a"}}', "config.json: "),
    ],
)
def test_a_bad_config_is_reported(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_model_config(tmp_path)


def test_a_run_that_is_not_there():
    with pytest.raises(UserError, match="nowhere is not a directory"):
        read_config("nowhere")


@pytest.mark.parametrize(
    ("files", "loaded"),
    [
        (["tokenizer.model"], ["tokenizer.model"]),
        (
            ["tokenizer.source.model", "tokenizer.target.model"],
            ["tokenizer.source.model", "tokenizer.target.model"],
        ),
        (["tokenizer.target.model"], "nor tokenizer.source.model"),
        ([], "no tokenizer"),
    ],
)
def test_tokenizers_are_joint_or_a_pair(tmp_path, monkeypatch, files, loaded):
    read = []

    def load(path):
        read.append(path.name)
        return object.__new__(Tokenizer)

    monkeypatch.setattr(run_directory.Tokenizer, "load", load)
    for name in files:
        (tmp_path / name).write_bytes(b"")
    if isinstance(loaded, str):
        with pytest.raises(UserError, match=loaded):
            load_tokenizers(tmp_path)
        return
    source, target = load_tokenizers(tmp_path)
    assert read == loaded
    assert (source is target) == (len(files) == 1)


@pytest.mark.parametrize("name", ["2", "average"])
def test_damaged_parameters_are_not_translated_with(tmp_path, name):
    states = [replace(make_state(step), params=random_params(step)) for step in (1, 2)]
    save_all(tmp_path, [(state, {"loss": 1.0}) for state in states])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_average(*checkpoints.average([1, 2]))
    load_params(tmp_path, name)
    directory = tmp_path / "checkpoints"
    shutil.rmtree(directory / name / "params")
    shutil.copytree(directory / "1/params", directory / name / "params")  # intact, but of step 1
    with pytest.raises(UserError, match="is damaged"):
        load_params(tmp_path, name)


def test_the_newest_says_by_which_metric(tmp_path):
    for step, metric, mode in ((1, "loss", "min"), (2, "bleu", "max")):
        with Checkpoints(tmp_path, metric=metric, mode=mode) as checkpoints:
            checkpoints.save(make_state(step), {"loss": float(step), "bleu": float(step)})
    assert best_step(tmp_path) == 2  # by loss it would be 1


def test_an_average_is_the_default_though_what_is_newer_is_not_in_it(tmp_path):
    save_all(
        tmp_path,
        [(make_state(1), {"loss": 1.0}), (make_state(2), {"loss": 1.0}), (make_state(3), None)],
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_average(*checkpoints.average([1, 2]))
    assert find_checkpoint(tmp_path).name == "average"


def test_an_average_is_saved_though_the_program_ended_while_one_took_the_others_place(tmp_path):
    save_all(tmp_path, [(make_state(step), {"loss": 1.0}) for step in (1, 2)])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_average(*checkpoints.average([1, 2]))
        shutil.copytree(checkpoints.directory / "average", checkpoints.directory / "average.old")
        checkpoints.save_average(*checkpoints.average([2]))
        assert np.all(load_params(tmp_path)["scale"] == 2)
        assert {path.name for path in checkpoints.directory.iterdir()} == {"1", "2", "average"}


def test_the_step_of_a_damaged_checkpoint_is_saved_again(tmp_path, capsys):
    save_all(tmp_path, [(make_state(step), {"loss": 1.0}) for step in (1, 2)])
    shutil.rmtree(tmp_path / "checkpoints/2/params")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state()).step == 1
        checkpoints.save(make_state(2), {"loss": 1.0})
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert np.all(load_params(tmp_path, 2)["scale"] == 2)


def test_what_is_being_saved_counts_among_the_evaluated(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), {"loss": 1.0})
        assert checkpoints.evaluated_steps() == [1]


def test_what_is_being_saved_is_restored(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step))
            assert checkpoints.restore(make_state()).step == step


def test_what_is_being_saved_is_averaged(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), {"loss": 1.0})
        checkpoints.save(make_state(2), {"loss": 1.0})
        assert checkpoints.average([1, 2])[1] == [1, 2]


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    save_all(tmp_path, [(make_state(1), {"loss": 1.0})])
    half = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    half.mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(3), {"loss": 1.0})
    assert not half.exists()
