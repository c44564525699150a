"""Training over a mesh: the same updates, a part on each device, and no needless collective."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxformer.errors import UserError
from jaxformer.schedules import warmup_inverse_sqrt
from jaxformer.sharding import num_shards
from jaxformer.transformer import Transformer
from packed_rows import BATCH, KEY, SPLITTABLE, assert_same_training, run_steps
from train.benchmark.compiles import count_compiles
from train.config import OptimizerConfig, ParallelConfig
from train.mesh import in_mesh, make_mesh
from train.optimizer import make_optimizer
from train.parallel import DataParallel, MeshParallel
from train.state import create_state
from train.step import make_eval_step, make_train_step

CONFIG = SPLITTABLE.replace(vocab_size=4096, label_smoothing=0.1)
MODEL = Transformer(CONFIG)
SCHEDULE = warmup_inverse_sqrt(warmup_steps=2, peak=0.8)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.7), optax.sgd(SCHEDULE, momentum=0.9))
MESHES = [(8, 1, 1), pytest.param(2, 4, 1, marks=pytest.mark.slow), (2, 2, 2)]

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")


def mesh_runner(fsdp, tensor, devices=None, config=CONFIG):
    parallel = ParallelConfig(strategy="mesh", fsdp=fsdp, tensor=tensor)
    return MeshParallel(make_mesh(parallel, config, devices or jax.devices()))


def place(runner, batch=BATCH):
    return runner.place(
        len(batch["labels"]), lambda rows: {name: x[rows] for name, x in batch.items()}
    )


def create(runner, model=MODEL, optimizer=OPTIMIZER):
    return runner.create(lambda: create_state(model, optimizer, jax.random.key(3)))


def five_steps(runner, accumulate=1, model=MODEL):
    step = make_train_step(model, OPTIMIZER, SCHEDULE, accumulate=accumulate)
    return run_steps(runner.parallel_train_step(step), create(runner, model), place(runner), 5)


@pytest.fixture(scope="module")
def one_device():
    return five_steps(DataParallel((jax.devices()[0],)))


@pytest.mark.parametrize(("data", "fsdp", "tensor"), MESHES)
def test_every_mesh_trains_as_one_device_and_gathers_no_embedding(
    one_device, capfd, data, fsdp, tensor
):
    runner = mesh_runner(fsdp, tensor)
    assert runner.mesh.devices.shape == (data, fsdp, tensor)
    step = make_train_step(MODEL, OPTIMIZER, SCHEDULE)
    state, batch = create(runner), place(runner)
    compiled = runner.parallel_train_step(step).lower(state, batch, KEY).compile()
    # XLA's term for an array that it gathers whole only to lay it out anew.
    assert "rematerialization" not in capfd.readouterr().err
    assert one_device[0][1]["loss"] - one_device[-1][1]["loss"] > 0.1
    assert_same_training(run_steps(compiled, state, batch, 5), one_device)
    # No collective is larger than the gradient of a device's own part of the embedding.
    part = CONFIG.vocab_size // (fsdp * tensor) * CONFIG.d_model
    found = list(collectives(compiled.as_text()))
    assert found
    for size, line in found:
        assert size <= part, line


def collectives(text):
    """Yield for each collective the number of elements in its largest result, and the line."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for line in text.splitlines():
        if found := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            shapes = re.findall(r"\[([\d,]*)\]", found[1])
            yield max(np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes), line


def test_accumulation_over_a_mesh_trains_as_one_device(one_device):
    runner = mesh_runner(2, 1, jax.devices()[:4])
    assert_same_training(five_steps(runner, accumulate=2), one_device)


@pytest.mark.slow
def test_the_noise_of_dropout_does_not_depend_on_the_mesh():
    model = Transformer(CONFIG.replace(dropout=0.3))
    one = five_steps(mesh_runner(1, 1, jax.devices()[:1]), model=model)
    assert_same_training(five_steps(mesh_runner(2, 2), model=model), one)


@pytest.mark.parametrize(
    ("path", "shape", "part"),
    [
        # V over fsdp × tensor = 4.
        ("embedding/embedding", (4096, 16), (1024, 16)),
        # L; D over fsdp, N over tensor.
        ("decoder/layers/cross_attention/key/kernel", (2, 16, 4, 4), (2, 8, 2, 4)),
        ("decoder/layers/self_attention/output/kernel", (2, 4, 4, 16), (2, 2, 4, 8)),
        ("encoder/layers/feed_forward/hidden/kernel", (1, 16, 24), (1, 8, 12)),
        ("encoder/layers/feed_forward/hidden/bias", (1, 24), (1, 12)),
        ("encoder/layers/feed_forward/output/kernel", (1, 24, 16), (1, 12, 8)),
        ("encoder/layers/feed_forward/output/bias", (1, 16), (1, 16)),
        ("encoder/layers/feed_forward_residual/layer_norm/scale", (1, 16), (1, 16)),
    ],
)
def test_state_is_born_and_stays_in_parts(path, shape, part):
    runner = mesh_runner(2, 2)
    state = create(runner, optimizer=make_optimizer(OptimizerConfig(), SCHEDULE))
    adam = state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        leaf = tree
        for key in path.split("/"):
            leaf = leaf[key]
        assert leaf.shape == shape
        assert leaf.sharding.shard_shape(leaf.shape) == part


def test_a_step_keeps_the_layout_donates_and_compiles_once():
    runner = mesh_runner(2, 2)
    step = runner.parallel_train_step(make_train_step(MODEL, OPTIMIZER, SCHEDULE))
    state, batch = create(runner), place(runner)
    before = jax.tree.map(lambda x: x.sharding, state)
    with count_compiles() as first:
        new, _ = step(state, batch, KEY)
    assert len([name for name in first if "step" in name]) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "not donated"
    jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim) or pytest.fail(), new, before)
    with count_compiles() as compiled:
        step(new, batch, KEY)
    assert compiled == []


def test_evaluation_and_decoding_see_the_whole_model():
    runner, alike = mesh_runner(2, 2), DataParallel()
    state, plain = create(runner), create(alike)
    eval_step = make_eval_step(MODEL)
    sums = runner.parallel_eval_step(eval_step)(state.params, place(runner))
    expected = alike.parallel_eval_step(eval_step)(plain.params, place(alike))
    np.testing.assert_allclose(np.array(sums), np.array(expected), rtol=1e-5)
    for leaf, other in zip(
        jax.tree.leaves(runner.whole(state.params)), jax.tree.leaves(plain.params), strict=True
    ):
        assert leaf.devices() == {jax.devices()[0]}
        np.testing.assert_allclose(leaf, other, rtol=1e-6)
    with count_compiles() as compiled:
        runner.whole(state.params)
    assert compiled == []


@pytest.mark.parametrize(
    ("fsdp", "tensor", "changes", "message"),
    [
        (3, 1, {}, "3 x 1 = 3 does not divide 8"),
        (1, 8, {}, "model.num_heads=4 cannot be split by parallel.tensor=8"),
        (1, 4, {"d_ff": 22}, "model.d_ff=22 .* the next multiple of 4 is 24"),
        (4, 2, {"vocab_size": 37}, r"vocab_size=37 .* 4 x 2: the next multiple of 8 is 40"),
    ],
)
def test_impossible_splits_are_refused_with_the_arithmetic(fsdp, tensor, changes, message):
    with pytest.raises(UserError, match=message):
        mesh_runner(fsdp, tensor, config=CONFIG.replace(**changes))


def test_names_do_nothing_without_rules_and_a_mesh():
    assert num_shards("batch") == 1
    with nn.logical_axis_rules((("batch", None),)):
        assert num_shards("batch") == 1
    runner = mesh_runner(2, 2)
    with in_mesh(runner.mesh):
        assert num_shards("batch") == 4
        assert num_shards("vocab_batch") == 2


def test_rules_without_a_mesh_split_nothing():
    with nn.logical_axis_rules([("vocab_batch", "data")]):
        assert num_shards("vocab_batch") == 1


def test_inside_shard_map_rules_are_for_the_axes_that_it_leaves():
    """Each device works on its sentences by itself; the rules name the same axis."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    model, (source, target) = Transformer(CONFIG), jnp.full((2, 8, 5), 7)
    params = model.init(KEY, source[:1], target[:1])

    def loss(params, source, target):
        return model.apply(params, source, target, target, method="loss").loss

    def summed(*arguments):
        return jax.lax.psum(loss(*arguments), "data")

    by_hand = jax.shard_map(
        summed,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    expected = jax.value_and_grad(loss)(params, source, target)
    with nn.logical_axis_rules([("batch", "data"), ("vocab_batch", "data")]):
        found = jax.jit(jax.value_and_grad(by_hand))(params, source, target)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, expected)


def test_gates_lie_in_parts_as_what_they_gate():
    runner = mesh_runner(2, 2)
    params = create(runner, Transformer(CONFIG.replace(activation="swiglu"))).params
    feed_forward = params["encoder"]["layers"]["feed_forward"]
    for name in ("hidden", "gate"):
        kernel = feed_forward[name]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (1, 8, 12), name
