"""The training and evaluation step: what is optimised, and that no runner changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compiles import count_compiles
from jaxformer.config import TransformerConfig
from jaxformer.transformer import Transformer
from train.config import OptimizerConfig
from train.parallel import data_parallel_eval, data_parallel_train, replicate, split_rows
from train.state import TrainState, create_state, make_optimizer, make_schedule
from train.step import make_eval_step, make_train_step

CONFIG = TransformerConfig(
    vocab_size=37,
    d_model=10,
    d_ff=14,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=1,
    dropout=0.0,
    label_smoothing=0.1,
)
ROWS, SOURCE, TARGET = 16, 11, 13
KEY = jax.random.key(5)
RATE = optax.constant_schedule(0.5)

several_devices = pytest.mark.skipif(
    jax.device_count() not in (2, 4, 8), reason="needs 2, 4 or 8 devices"
)


def packed_rows(lengths, seed=0):
    """Row r holds the pairs of `lengths[r]`, [(source, target), …] tokens with eos, at random."""
    draw = np.random.default_rng(seed)
    shapes = {"source_ids": SOURCE, "target_ids": TARGET, "labels": TARGET}
    shapes |= {"source_segment_ids": SOURCE, "target_segment_ids": TARGET}
    batch = {name: np.zeros((len(lengths), length), np.int32) for name, length in shapes.items()}
    for row, pairs in enumerate(lengths):
        s = t = 0
        for segment, (source, target) in enumerate(pairs, start=1):
            batch["source_ids"][row, s : s + source] = [*draw.integers(4, 37, source - 1), 2]
            batch["source_segment_ids"][row, s : s + source] = segment
            labels = [*draw.integers(4, 37, target - 1), 2]
            batch["labels"][row, t : t + target] = labels
            batch["target_ids"][row, t : t + target] = [1, *labels[:-1]]
            batch["target_segment_ids"][row, t : t + target] = segment
            s, t = s + source, t + target
    return batch


@pytest.fixture(scope="module")
def batch():
    """Rows of 0 to 13 target tokens; of 8 devices, three have nothing but padding."""
    lengths = [[(5, 6), (6, 7)], [(11, 13)], [], [], [(2, 2)], [], [(4, 9)], [(3, 3), (3, 3)]]
    lengths += [[], [], [(7, 12)], [(9, 2)], [], [], [(5, 4), (6, 9)], [(8, 8)]]
    return packed_rows(lengths)


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    # Larger than the initial ones, so that every sub-layer matters.
    params = create_state(model, optax.sgd(0.1), jax.random.key(1)).params
    return jax.tree.map(lambda x: 1.5 * x, params)


def copy(tree):
    return jax.tree.map(jnp.array, tree)


def state_of(params, optimizer):
    params = copy(params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def update(state, params):
    """How far a step moved each parameter."""
    return jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, params)


def assert_close(actual, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), actual, expected
    )


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# ---------------------------------------------------------------------------------------------
# The same update, however the batch is spread
# ---------------------------------------------------------------------------------------------

# Clips, so that clipping before the sum over devices or before the division would show.
CLIPPED_SGD = optax.chain(optax.clip_by_global_norm(0.7), optax.sgd(RATE))


def three_steps(step, state, batch):
    history = []
    for _ in range(3):
        state, metrics = step(state, batch, KEY)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@pytest.fixture(scope="module")
def one_device(model, params, batch):
    step = jax.jit(make_train_step(model, CLIPPED_SGD, RATE))
    return three_steps(step, state_of(params, CLIPPED_SGD), batch)


def assert_same_training(result, expected):
    (state, history), (expected_state, expected_history) = result, expected
    assert state.step == expected_state.step == 3
    # The update is what the tolerance must be small against.
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected_state.params)) < 10
    assert_close(state.params, expected_state.params, 1e-5)
    for metrics, wanted in zip(history, expected_history, strict=True):
        assert metrics.keys() == wanted.keys()
        for name in metrics:
            assert metrics[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), name


def test_three_steps_learn_something(one_device, params):
    state, history = one_device
    assert history[0]["gradient_norm"] > 0.7, "nothing is clipped"
    assert history[2]["loss"] < history[0]["loss"] - 0.3
    assert max(np.abs(x).max() for x in jax.tree.leaves(update(state, params))) > 0.05


@several_devices
@pytest.mark.parametrize("accumulate", [1, 2])
def test_devices_with_uneven_token_counts_equal_one_device(
    model, params, batch, one_device, accumulate
):
    if ROWS // jax.device_count() % accumulate:
        pytest.skip("fewer rows than parts")
    step = data_parallel_train(make_train_step(model, CLIPPED_SGD, RATE, accumulate=accumulate))
    state = replicate(state_of(params, CLIPPED_SGD))
    assert_same_training(three_steps(step, state, split_rows(batch)), one_device)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_does_not_change_the_update(model, params, batch, one_device, accumulate):
    step = jax.jit(make_train_step(model, CLIPPED_SGD, RATE, accumulate=accumulate))
    assert_same_training(three_steps(step, state_of(params, CLIPPED_SGD), batch), one_device)


def test_packed_pairs_train_like_pairs_in_rows_of_their_own(model, params, batch, one_device):
    segments = batch["target_segment_ids"]
    alone = {name: [] for name in batch}
    for row, number in [(r, n) for r in range(ROWS) for n in range(1, segments[r].max() + 1)]:
        for name, x in batch.items():
            side = "source" if name.startswith("source") else "target"
            ids = x[row][batch[f"{side}_segment_ids"][row] == number]
            alone[name].append(np.pad(ids, (0, x.shape[1] - len(ids))))
    alone = {name: np.array(rows) for name, rows in alone.items()}
    for side in ("source", "target"):
        alone[f"{side}_segment_ids"] = (alone[f"{side}_segment_ids"] > 0).astype(np.int32)
    step = jax.jit(make_train_step(model, CLIPPED_SGD, RATE))
    assert_same_training(three_steps(step, state_of(params, CLIPPED_SGD), alone), one_device)


# ---------------------------------------------------------------------------------------------
# What a step reports and does
# ---------------------------------------------------------------------------------------------


def test_loss_and_nll_are_means_over_the_real_tokens(model, params, batch, one_device):
    logits = model.apply(
        {"params": params},
        batch["source_ids"],
        batch["target_ids"],
        source_segment_ids=batch["source_segment_ids"],
        target_segment_ids=batch["target_segment_ids"],
    )
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    real = batch["labels"] != 0
    nll = -np.take_along_axis(log_probs, batch["labels"][..., None], axis=-1)[..., 0][real].mean()
    uniform = -log_probs.mean(axis=-1)[real].mean()
    first = one_device[1][0]
    assert first["tokens"] == real.sum()
    assert first["nll"] == pytest.approx(nll, abs=1e-5)
    assert first["loss"] == pytest.approx(0.9 * nll + 0.1 * uniform, abs=1e-5)
    assert abs(first["loss"] - first["nll"]) > 1e-3


def test_learning_rate_is_the_schedules_and_the_one_applied(model, params, batch):
    schedule = make_schedule(OptimizerConfig(warmup_steps=2, peak_learning_rate=0.08), 10)
    optimizer = optax.sgd(schedule)
    step = jax.jit(make_train_step(model, optimizer, schedule))
    state = state_of(params, optimizer)
    rates = []
    for _ in range(4):
        before = state.params
        state, metrics = step(state, batch, KEY)
        rates.append(float(metrics["learning_rate"]))
        moved = optax.global_norm(update(state, before))
        assert moved == pytest.approx(rates[-1] * metrics["gradient_norm"], rel=1e-3)
    # The formula counts steps from 1, optax from 0: 0 and 1 are both its first step.
    assert rates == pytest.approx([0.04, 0.04, 0.08, 0.08 * (2 / 3) ** 0.5])


def test_the_papers_peak_is_the_default():
    schedule = make_schedule(OptimizerConfig(warmup_steps=40), d_model=10)
    assert schedule(40) == pytest.approx((10 * 40) ** -0.5)


@pytest.mark.parametrize(("factor", "clips"), [(2.0, False), (0.5, True)])
def test_the_gradient_is_clipped_after_the_division(model, params, batch, factor, clips):
    """Twice the norm of the mean gradient is far below the norm of the sum over 80 tokens."""
    probe = jax.jit(make_train_step(model, optax.sgd(0.0), RATE))
    norm = float(probe(state_of(params, optax.sgd(0.0)), batch, KEY)[1]["gradient_norm"])
    optimizer = make_optimizer(OptimizerConfig(clip_norm=factor * norm), RATE)
    state, metrics = jax.jit(make_train_step(model, optimizer, RATE))(
        state_of(params, optimizer), batch, KEY
    )
    # After one step Adam's first moment is (1 - beta1) times the gradient it was given.
    first_moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    given = optax.global_norm(first_moment) / (1 - 0.9)
    assert given == pytest.approx(factor * norm if clips else norm, rel=1e-4)
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5), "it is reported unclipped"


def test_weight_decay_pulls_towards_zero_by_the_learning_rate(model, params, batch):
    moved = {}
    for decay in (0.0, 0.25):
        optimizer = make_optimizer(OptimizerConfig(weight_decay=decay), RATE)
        step = jax.jit(make_train_step(model, optimizer, RATE))
        moved[decay] = update(step(state_of(params, optimizer), batch, KEY)[0], params)
    difference = jax.tree.map(np.subtract, moved[0.25], moved[0.0])
    assert_close(difference, jax.tree.map(lambda x: -0.5 * 0.25 * np.asarray(x), params), 1e-5)


def test_a_batch_of_padding_changes_nothing(model, params, batch):
    step = jax.jit(make_train_step(model, CLIPPED_SGD, RATE))
    state, metrics = step(
        state_of(params, CLIPPED_SGD), jax.tree.map(np.zeros_like, batch), KEY
    )
    assert metrics["tokens"] == metrics["loss"] == metrics["nll"] == 0
    assert state.step == 1
    assert_same(state.params, params)


# ---------------------------------------------------------------------------------------------
# Dropout noise
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy():
    return Transformer(CONFIG.replace(dropout=0.3))


def test_each_step_and_part_has_noise_of_its_own_and_a_repetition_has_the_same(noisy, params):
    row = packed_rows([[(7, 9)]])
    empty = jax.tree.map(np.zeros_like, row)
    parts = [
        {name: np.concatenate(pair) for name, pair in zip(row, order, strict=True)}
        for order in (
            [(row[name], empty[name]) for name in row],
            [(empty[name], row[name]) for name in row],
        )
    ]
    frozen = optax.sgd(0.0)
    step = jax.jit(make_train_step(noisy, frozen, RATE, accumulate=2))

    def losses(part, key):
        state, seen = state_of(params, frozen), []
        for _ in range(3):
            state, metrics = step(state, part, key)
            seen.append(float(metrics["loss"]))
        return seen

    first, second = (losses(part, KEY) for part in parts)
    assert len({*first, *second, *losses(parts[0], jax.random.key(6))}) == 9
    assert losses(parts[0], KEY) == first


@several_devices
def test_each_device_has_noise_of_its_own(noisy, params):
    devices = jax.device_count()
    row = packed_rows([[(7, 9)]])
    frozen = optax.sgd(0.0)
    step = data_parallel_train(make_train_step(noisy, frozen, RATE))
    losses = []
    for device in range(devices):  # the same row, on one device after the other
        batch = {name: np.zeros((devices, *x.shape), np.int32) for name, x in row.items()}
        for name, x in row.items():
            batch[name][device] = x
        losses.append(float(step(replicate(state_of(params, frozen)), batch, KEY)[1]["loss"]))
    assert len(set(losses)) == devices


@several_devices
def test_evaluation_sums_over_devices_without_dropout(model, noisy, params, batch):
    expected = jax.jit(make_eval_step(model))(params, batch)
    assert expected.weight == np.count_nonzero(batch["labels"])
    sums = data_parallel_eval(make_eval_step(noisy))(replicate(params), split_rows(batch))
    assert np.allclose(sums, expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# Memory, placement and compilation
# ---------------------------------------------------------------------------------------------


def test_the_state_is_reused_stays_replicated_and_compiles_once(noisy, params, batch):
    optimizer = make_optimizer(OptimizerConfig(), RATE)
    step = data_parallel_train(make_train_step(noisy, optimizer, RATE))
    first = replicate(state_of(params, optimizer))
    shapes = jax.tree.map(jnp.shape, first)
    rows = split_rows(batch)
    second, metrics = step(first, rows, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first)), "not donated"
    assert jax.tree.map(jnp.shape, second) == shapes, "there is a device axis"
    for leaf in jax.tree.leaves((second, metrics)):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(jax.devices())
    with count_compiles() as compiled:
        third, _ = step(second, rows, KEY)
        step(third, rows, KEY)
    assert compiled == []
