"""Embedding, positions, feed-forward network and residual connection, against their formulae."""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxformer.embedding import Embedding
from jaxformer.errors import UserError
from jaxformer.feed_forward import FeedForward
from jaxformer.positions import PositionalEncoding
from jaxformer.residual import Residual, layer_norm

B, T, D, F, V = 2, 5, 6, 11, 13


def random(*shape, seed=0, dtype=jnp.float32):
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(values, dtype)


def random_variables(module, *args, **kwargs):
    shapes = jax.eval_shape(lambda rng: module.init(rng, *args, **kwargs), jax.random.key(0))
    return jax.tree.map(lambda leaf: random(*leaf.shape), shapes)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    """x Φ(x), exactly."""
    return x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)


NONLINEARITIES = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "swish": lambda x: x * sigmoid(x),
    "glu": sigmoid,
    "reglu": lambda x: np.maximum(x, 0),
    "geglu": gelu,
    "swiglu": lambda x: x * sigmoid(x),
}


@pytest.mark.parametrize("activation", NONLINEARITIES)
def test_feed_forward_is_its_formula(activation):
    module = FeedForward(F, activation)
    x = random(B, T, D)
    variables = random_variables(module, x)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    act = NONLINEARITIES[activation]
    wide = dense("hidden", np.asarray(x, np.float64))
    if activation.endswith("glu"):
        wide = act(dense("gate", np.asarray(x, np.float64))) * wide
    else:
        wide = act(wide)
    assert set(params) == {"hidden", "output"} | ({"gate"} if activation.endswith("glu") else set())
    np.testing.assert_allclose(
        module.apply(variables, x), dense("output", wide), rtol=3e-5, atol=3e-5
    )


def test_feed_forward_is_position_wise():
    module = FeedForward(F)
    x = random(B, T, D)
    variables = random_variables(module, x)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(
        module.apply(variables, x[:, order]), module.apply(variables, x)[:, order], rtol=1e-5
    )
    # A change at one position affects no other.
    changed = module.apply(variables, x.at[:, 2].add(1.0)) - module.apply(variables, x)
    np.testing.assert_array_equal(np.any(changed != 0, axis=(0, 2)), np.arange(T) == 2)


def test_feed_forward_dropout_is_on_the_hidden_layer():
    module = FeedForward(F, dropout_rate=0.5)
    x = random(B, T, D)
    variables = random_variables(module, x)
    params = variables["params"]
    dropped = module.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    hidden = np.maximum(x @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    # Some choice of kept units, each doubled, must give the output: all are tried at one position.
    choices = np.array(np.meshgrid(*[[0.0, 2.0]] * F)).reshape(F, -1).T
    outputs = (choices * hidden[1, 3]) @ params["output"]["kernel"] + params["output"]["bias"]
    assert np.min(np.max(np.abs(outputs - dropped[1, 3]), axis=-1)) < 1e-4
    assert np.any(np.abs(dropped - module.apply(variables, x)) > 1e-3)


def reference_layer_norm(x, scale, bias, epsilon):
    x = np.asarray(x, np.float64)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * np.asarray(scale) + np.asarray(bias)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_residual_is_its_formula(norm):
    """The epsilon is large, so that one in the wrong place shows."""
    module = Residual(norm, epsilon=0.1)
    x = random(B, T, D)

    def sublayer(y):
        return y**3 + 1

    def run(residual, x):
        return residual.leave(x, sublayer(residual.enter(x)))

    shapes = jax.eval_shape(lambda rng: module.init(rng, x, method=run), jax.random.key(0))
    variables = jax.tree.map(lambda leaf: random(*leaf.shape, seed=4), shapes)
    scale, bias = (variables["params"]["layer_norm"][name] for name in ("scale", "bias"))
    wide = np.asarray(x, np.float64)
    if norm == "post":
        expected = reference_layer_norm(wide + sublayer(wide), scale, bias, 0.1)
    else:
        expected = wide + sublayer(reference_layer_norm(wide, scale, bias, 0.1))
    np.testing.assert_allclose(
        module.apply(variables, x, method=run), expected, rtol=1e-4, atol=1e-5
    )


def test_residual_drops_the_sublayer_and_not_the_stream():
    module = Residual("pre", dropout_rate=0.5)
    x, y = jnp.full((B, T, D), 64.0), jnp.ones((B, T, D))
    rngs = {"dropout": jax.random.key(1)}
    out = module.apply({}, x, y, deterministic=False, rngs=rngs, method="leave")
    assert set(np.unique(out)) == {64.0, 66.0}


def test_layer_norm_is_exact_where_the_mean_is_large():
    """E[x²] - E[x]² in float32 has no correct digit here, nor has any statistic in bfloat16."""
    x = 4096 + random(3, 64)
    module = layer_norm(1e-6, jnp.float32)
    variables = {"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}
    expected = reference_layer_norm(x, 1.0, 0.0, 1e-6)
    np.testing.assert_allclose(module.apply(variables, x), expected, atol=5e-3)

    x = (256 + 8 * random(3, 64)).astype(jnp.bfloat16)
    out = layer_norm(1e-6, jnp.bfloat16).apply(variables, x)
    assert out.dtype == jnp.bfloat16
    expected = reference_layer_norm(x.astype(jnp.float32), 1.0, 0.0, 1e-6)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("kind", ["sinusoidal", "sinusoidal_concat", "learned"])
def test_positional_encoding_adds_and_restarts(kind):
    module = PositionalEncoding(kind, max_length=T)
    x = random(B, T, D)
    variables = random_variables(module, x)
    assert bool(variables) == (kind == "learned")
    encoding = module.apply(variables, jnp.zeros_like(x))
    np.testing.assert_array_equal(encoding[0], encoding[1])
    assert len(np.unique(encoding[0], axis=0)) == T
    np.testing.assert_allclose(module.apply(variables, x), x + encoding, rtol=1e-6)
    positions = jnp.array([[0, 1, 0, 1, 2], [3, 4, 0, 1, 2]])
    moved = module.apply(variables, jnp.zeros_like(x), positions)
    np.testing.assert_array_equal(moved, np.asarray(encoding[0])[positions])


def test_learned_positions_end_at_max_length():
    module = PositionalEncoding("learned", max_length=T)
    variables = random_variables(module, random(B, T, D))
    assert variables["params"]["embedding"].shape == (T, D)
    with pytest.raises(UserError, match=r"6 tokens is longer than max_length=5 .*raise max_length"):
        module.apply(variables, random(B, T + 1, D))
    # Packed rows may be longer than any position in them; a position past the table gives NaN.
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6]])
    out = module.apply(variables, random(B, T + 2, D), positions)
    np.testing.assert_array_equal(np.isnan(out).any(-1), positions >= T)


def test_sinusoids_come_in_pairs():
    with pytest.raises(UserError, match="sinusoidal positions are of width 5: make it even"):
        PositionalEncoding().init(jax.random.key(0), random(B, T, 5))


def test_sinusoids_have_no_end():
    out = PositionalEncoding("sinusoidal", max_length=T).apply({}, random(1, 29, D))
    assert np.all(np.isfinite(out))


def test_embedding_scale_and_initialisation_belong_together():
    """√D times N(0, 1/D): inputs of unit variance, and logits of unit variance."""
    module = Embedding(1009, 32)
    ids = jnp.arange(1009)[None]
    variables = module.init(jax.random.key(0), ids)
    assert np.std(module.apply(variables, ids)) == pytest.approx(1.0, abs=0.03)
    assert np.std(module.apply(variables, random(5, 32), method="logits")) == pytest.approx(
        1.0, abs=0.1
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embedding_and_logits_use_one_table(dtype):
    module = Embedding(V, D, dtype)
    ids = jnp.array([[3, 0, 12], [7, 7, 1]])
    variables = random_variables(module, ids)
    table = variables["params"]["embedding"]
    assert table.dtype == jnp.float32 and table.shape == (V, D)
    vectors = module.apply(variables, ids)
    assert vectors.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
    expected = np.asarray(table)[ids] * math.sqrt(D)
    np.testing.assert_allclose(vectors.astype(jnp.float32), expected, rtol=tolerance)

    hidden = random(B, T, D, dtype=dtype)
    logits = module.apply(variables, hidden, method="logits")
    assert logits.shape == (B, T, V) and logits.dtype == jnp.float32
    # Exact products of the rounded inputs: accumulating in bfloat16 would show in the third digit.
    rounded = np.asarray(table.astype(dtype), np.float64)
    np.testing.assert_allclose(logits, np.asarray(hidden, np.float64) @ rounded.T, atol=1e-5)


def test_logits_by_a_transposed_copy_of_the_table():
    table = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    hidden = jax.random.normal(jax.random.key(1), (2, 3, 4))
    params = {"embedding": jnp.full_like(table, jnp.nan), "transposed": jnp.asarray(table.T)}
    logits = Embedding(7, 4).apply({"params": params}, hidden, method="logits")
    np.testing.assert_allclose(logits, hidden @ table.T, rtol=1e-5, atol=1e-6)


def test_logits_of_more_tokens_than_that():
    table = np.random.default_rng(0).normal(size=(7, 256)).astype(np.float32)
    hidden = jax.random.normal(jax.random.key(1), (8, 4, 256))
    params = {"embedding": jnp.asarray(table), "transposed": jnp.full(table.T.shape, jnp.nan)}
    logits = Embedding(7, 256).apply({"params": params}, hidden, method="logits")
    np.testing.assert_allclose(logits, hidden @ table.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32])
def test_an_id_outside_the_vocabulary_is_no_number(dtype, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it allows no unsigned ids
    module = Embedding(V, D)
    ids = jnp.array([[V - 1, V, 0, 10 * V, -1]]).astype(dtype)
    out = module.apply(random_variables(module, ids), ids)
    np.testing.assert_array_equal(np.isnan(out).all(-1), [[False, True, False, True, True]])
    np.testing.assert_array_equal(np.isnan(out).any(-1), [[False, True, False, True, True]])


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (PositionalEncoding, ["sinusoid"], "kind is 'sinusoid': choose one of sinusoidal, "),
        (Residual, ["Post"], "norm is 'Post': choose one of post, pre"),
        (FeedForward, [8, "tanh"], "activation is 'tanh': choose one of relu, gelu, "),
    ],
)
def test_names_that_nothing_has_are_refused(monkeypatch, module, arguments, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    method = "enter" if module is Residual else "__call__"
    with pytest.raises(UserError, match=message):
        module(*arguments).init(jax.random.key(0), jnp.ones((1, 2, 4)), method=method)


def test_learned_positions_below_0_are_no_numbers():
    module, x = PositionalEncoding("learned", 4), jnp.ones((1, 3, 2))
    y = module.apply(module.init(jax.random.key(0), x), x, jnp.array([[3, -1, 0]]))
    assert np.isnan(y[0, :, 0]).tolist() == [False, True, False]
