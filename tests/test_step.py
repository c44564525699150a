"""The training and evaluation step: what is optimised, and that no runner changes it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.config import TransformerConfig
from jaxformer.schedules import warmup_inverse_sqrt
from jaxformer.transformer import Transformer
from packed_rows import (
    BATCH,
    KEY,
    PAIRS,
    TOKENS,
    VOCABULARY,
    assert_close,
    assert_same_training,
    largest_difference,
    packed_rows,
    run_steps,
)
from train.benchmark.compiles import count_compiles
from train.config import OptimizerConfig
from train.optimizer import make_optimizer, make_schedule
from train.parallel import DataParallel
from train.state import TrainState, create_state
from train.step import make_eval_step, make_train_step

CONFIG = TransformerConfig(
    vocab_size=VOCABULARY,
    d_model=10,
    d_ff=14,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=1,
    dropout=0.0,
    label_smoothing=0.1,
)
DEVICES = jax.local_device_count()

# Plain gradient descent: what moves the parameters is the gradient itself. It is clipped, so that
# clipping before the division, or before the sum over devices and parts, would show.
CLIP_NORM = 0.7
SCHEDULE = warmup_inverse_sqrt(warmup_steps=2, peak=0.8)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.sgd(SCHEDULE))

RUNNER = DataParallel()


def placed(state, batch):
    """The arguments of a step over all devices."""
    rows = len(batch["labels"])
    place = RUNNER.place(rows, lambda mine: {name: x[mine] for name, x in batch.items()})
    return RUNNER.create(lambda: state), place


several_devices = pytest.mark.skipif(DEVICES not in (2, 4, 8), reason="needs 2, 4 or 8 devices")


def test_memory_of_a_step_does_not_grow_with_tokens_times_vocabulary():
    vocab_size = 20_000
    model = Transformer(CONFIG.replace(vocab_size=vocab_size))
    state = jax.eval_shape(lambda: create_state(model, OPTIMIZER, KEY))
    step = jax.jit(make_train_step(model, OPTIMIZER, SCHEDULE), donate_argnums=0)

    def temporary_bytes(rows):
        batch = {name: jax.ShapeDtypeStruct((rows, 32), x.dtype) for name, x in BATCH.items()}
        memory = step.lower(state, batch, KEY).compile().memory_analysis()
        return memory.temp_size_in_bytes

    growth = temporary_bytes(128) - temporary_bytes(64)
    assert growth < 0.2 * (64 * 32 * vocab_size * 4)


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    shapes = jax.eval_shape(lambda: create_state(model, OPTIMIZER, KEY)).params
    draw = np.random.default_rng(1)

    def leaf(path, like):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.4 * draw.standard_normal(like.shape), like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def state_of(params):
    params = jax.tree.map(jnp.array, params)  # copied: a step may reuse the memory
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))


# ---------------------------------------------------------------------------------------------
# The same updates, however the batch is spread
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_step(model):
    return jax.jit(make_train_step(model, OPTIMIZER, SCHEDULE))


@pytest.fixture(scope="module")
def one_device(one_step, params):
    return run_steps(one_step, state_of(params), BATCH)


def test_three_steps_learn(one_device, params):
    """The tolerance of the comparisons must be small against these changes."""
    losses = [metrics["loss"] for _, metrics in one_device]
    assert losses[0] - 0.1 > losses[1] > losses[2] + 0.1
    assert largest_difference(one_device[0][0].params, params) > 0.03


@several_devices
@pytest.mark.parametrize("accumulate", [1, 2])
def test_devices_with_uneven_token_counts_equal_one_device(model, params, one_device, accumulate):
    step = make_train_step(model, OPTIMIZER, SCHEDULE, accumulate=accumulate)
    history = run_steps(RUNNER.parallel_train_step(step), *placed(state_of(params), BATCH))
    assert_same_training(history, one_device)


def test_accumulation_does_not_change_the_update(model, params, one_device):
    step = jax.jit(make_train_step(model, OPTIMIZER, SCHEDULE, accumulate=4))
    assert_same_training(run_steps(step, state_of(params), BATCH), one_device)


def test_a_pair_counts_the_same_alone_in_its_row(model, params):
    alone = {name: [] for name in BATCH}
    for row, pairs in enumerate(PAIRS):
        for segment in range(1, len(pairs) + 1):
            for name, ids in BATCH.items():
                side = "source" if name.startswith("source") else "target"
                own = ids[row][BATCH[f"{side}_segment_ids"][row] == segment]
                own = np.minimum(own, 1) if name.endswith("segment_ids") else own
                alone[name].append(np.pad(own, (0, ids.shape[1] - len(own))))
    packed, unpacked = (
        jax.jit(make_eval_step(model))(params, rows)
        for rows in (BATCH, jax.tree.map(np.array, alone, is_leaf=lambda x: isinstance(x, list)))
    )
    assert packed.weight == unpacked.weight == TOKENS
    assert np.allclose(packed, unpacked, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# What a step does and reports
# ---------------------------------------------------------------------------------------------


def test_loss_and_nll_are_means_over_the_real_tokens(model, params, one_device):
    inputs = {name: ids for name, ids in BATCH.items() if name != "labels"}
    logits = jax.jit(model.apply)({"params": params}, **inputs)
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    real = BATCH["labels"] != 0
    nll = -np.take_along_axis(log_probs, BATCH["labels"][..., None], axis=-1)[..., 0][real].mean()
    uniform = -log_probs.mean(axis=-1)[real].mean()
    _, metrics = one_device[0]
    assert metrics["tokens"] == TOKENS
    assert metrics["nll"] == pytest.approx(nll, abs=1e-5)
    assert metrics["loss"] == pytest.approx(0.9 * nll + 0.1 * uniform, abs=1e-5)
    assert abs(metrics["loss"] - metrics["nll"]) > 1e-3


def test_the_reported_learning_rate_is_the_schedules_and_the_one_applied(one_device, params):
    """And the gradient is clipped after the division, else the update would be far shorter."""
    # The formula counts steps from 1, optax from 0: counts 0 and 1 both have the rate of step 1.
    assert [metrics["learning_rate"] for _, metrics in one_device] == pytest.approx([0.4, 0.4, 0.8])
    for state, metrics in one_device:
        assert metrics["gradient_norm"] > 1.2 * CLIP_NORM, "it is reported unclipped"
        moved = optax.global_norm(jax.tree.map(np.subtract, state.params, params))
        assert float(moved) == pytest.approx(metrics["learning_rate"] * CLIP_NORM, rel=1e-3)
        params = state.params


def test_a_batch_of_padding_changes_nothing(one_step, params):
    state, metrics = one_step(state_of(params), jax.tree.map(np.zeros_like, BATCH), KEY)
    assert metrics["tokens"] == metrics["loss"] == metrics["nll"] == 0
    assert state.step == 1
    assert largest_difference(state.params, params) == 0


# ---------------------------------------------------------------------------------------------
# Many devices: noise, memory, placement, compilation
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy_step():
    """With dropout, on all devices, the batch of each device in two parts."""
    model = Transformer(CONFIG.replace(dropout=0.3))
    return RUNNER.parallel_train_step(make_train_step(model, OPTIMIZER, SCHEDULE, accumulate=2))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_every_device_part_and_step_has_its_own_noise_and_a_repetition_the_same(
    noisy_step, params, impl
):
    row = {name: ids[0] for name, ids in packed_rows([[(7, 9)]]).items()}

    def loss(device, part, step=0, seed=5):
        """Loss of the same row in different places."""
        batch = {name: np.zeros((DEVICES, 2, *ids.shape), np.int32) for name, ids in row.items()}
        for name, ids in row.items():
            batch[name][device, part] = ids
        state = state_of(params).replace(step=jnp.int32(step))
        state = RUNNER.create(lambda: state)
        return float(noisy_step(state, batch, jax.random.key(seed, impl=impl))[1]["loss"])

    places = [loss(device, part) for device in range(DEVICES) for part in range(2)]
    others = [loss(0, 0, step=1), loss(0, 0, step=2), loss(0, 0, seed=6)]
    assert len({*places, *others}) == 2 * DEVICES + 3
    assert loss(0, 0) == places[0]


def test_the_state_is_reused_stays_replicated_and_compiles_once(noisy_step, params):
    first, rows = placed(
        state_of(params),
        {name: np.tile(ids, (DEVICES, 1))[: 2 * DEVICES] for name, ids in BATCH.items()},
    )
    shapes = jax.tree.map(jnp.shape, first)
    second, metrics = noisy_step(first, rows, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first)), "not donated"
    assert jax.tree.map(jnp.shape, second) == shapes, "there is a device axis"
    for leaf in jax.tree.leaves((second, metrics)):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(jax.devices())
    with count_compiles() as compiled:
        third, _ = noisy_step(second, rows, KEY)
        noisy_step(third, rows, KEY)
    assert compiled == []


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=several_devices)])
def test_one_device_has_nothing_to_sum(model, params, devices):
    """On a CPU it would copy every gradient; two devices are there to show the operation."""
    runner = DataParallel(tuple(jax.devices("cpu")[:devices]))
    place = runner.place(len(BATCH["labels"]), lambda mine: {k: x[mine] for k, x in BATCH.items()})
    state = runner.create(lambda: state_of(params))
    step = runner.parallel_train_step(make_train_step(model, OPTIMIZER, SCHEDULE))
    assert ("all_reduce" in step.lower(state, place, KEY).as_text()) == (devices > 1)


@several_devices
def test_evaluation_sums_over_devices_without_dropout(params, one_device):
    model = Transformer(CONFIG.replace(dropout=0.3))
    sums = RUNNER.parallel_eval_step(make_eval_step(model))(*placed(params, BATCH))
    _, metrics = one_device[0]
    assert sums.weight == TOKENS
    assert float(sums.loss) / TOKENS == pytest.approx(metrics["loss"], rel=1e-5)
    assert float(sums.nll) / TOKENS == pytest.approx(metrics["nll"], rel=1e-5)


# ---------------------------------------------------------------------------------------------
# The optimizer
# ---------------------------------------------------------------------------------------------

GRADIENT = {"a": np.array([3.0, 0.0, -4.0], np.float32), "b": np.float32(12.0)}  # of norm 13
WEIGHTS = {"a": np.array([1.0, -2.0, 5.0], np.float32), "b": np.float32(-3.0)}


def first_update(**fields):
    optimizer = make_optimizer(OptimizerConfig(**fields), optax.constant_schedule(0.5))
    return optimizer.update(GRADIENT, optimizer.init(WEIGHTS), WEIGHTS)


@pytest.mark.parametrize(("clip_norm", "norm"), [(0.0, 13.0), (26.0, 13.0), (6.5, 6.5)])
def test_adam_is_given_the_clipped_gradient(clip_norm, norm):
    _, state = first_update(clip_norm=clip_norm)
    # After one step Adam's first moment is (1 - beta1) times the gradient that it was given.
    moment = optax.tree_utils.tree_get(state, "mu")
    assert_close(moment, jax.tree.map(lambda g: (1 - 0.9) * g * norm / 13, GRADIENT))


def test_weight_decay_is_apart_from_the_gradient_and_times_the_learning_rate():
    plain, decayed = first_update()[0], first_update(weight_decay=0.25)[0]
    difference = jax.tree.map(np.subtract, decayed, plain)
    assert_close(difference, jax.tree.map(lambda x: -0.5 * 0.25 * x, WEIGHTS))


def test_the_papers_peak_is_the_default():
    assert make_schedule(OptimizerConfig(warmup_steps=40), 10, 99)(40) == pytest.approx(
        1 / math.sqrt(400)
    )
    own = make_schedule(OptimizerConfig(warmup_steps=40, peak_learning_rate=0.3), 10, 99)
    assert own(40) == pytest.approx(0.3)


def test_the_rate_has_fallen_to_0_when_the_steps_are_done():
    rate = make_schedule(OptimizerConfig(warmup_steps=4, cooldown_steps=10), 10, 99)
    assert rate(99) == 0.0 < rate(98)


def test_adams_moments_decay_as_configured():
    _, state = first_update(beta1=0.7, beta2=0.6)
    moments = (optax.tree_utils.tree_get(state, name) for name in ("mu", "nu"))
    for moment, expected in zip(moments, (lambda g: 0.3 * g, lambda g: 0.4 * g**2), strict=True):
        assert_close(moment, jax.tree.map(expected, GRADIENT))


def test_adams_epsilon_is_the_one_configured():
    updates, _ = first_update(epsilon=12.0)  # as large as the gradient: half a step
    assert updates["b"] == pytest.approx(-0.5 / 2)


def test_the_reported_norm_is_that_of_the_gradient_that_moves_the_parameters(model, params):
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_train_step(model, optimizer, optax.constant_schedule(1.0)))
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    new, metrics = step(state, BATCH, KEY)
    moved = optax.global_norm(jax.tree.map(np.subtract, params, new.params))
    assert metrics["gradient_norm"] == pytest.approx(float(moved), rel=1e-3)
