"""Attention against equation 1 in float64, and what the equation leaves open: masks, dtypes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.attention import MultiHeadAttention, attention_weights, dot_product_attention

B, T, S, N, H, HV, D, DKV = 2, 3, 5, 7, 4, 11, 13, 17

MASKS = {
    "none": None,
    "padding": np.random.default_rng(1).random((B, 1, 1, S)) < 0.6,
    "causal": np.tril(np.ones((1, 1, T, S), bool)),
    "a head": np.random.default_rng(2).random((1, N, T, S)) < 0.5,
    "full": np.random.default_rng(3).random((B, N, T, S)) < 0.3,
}


def random(*shape, seed=0, dtype=jnp.float32):
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(values, dtype)


def reference_weights(query, key, mask=None):
    """softmax(Q Kᵀ / √d_k) in float64; rows of zeros where nothing may be attended to."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    allowed = np.broadcast_to(True if mask is None else mask, scores.shape)
    scores = np.where(allowed, scores, -1e9)
    unnormalized = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    total = unnormalized.sum(-1, keepdims=True)
    return np.divide(unnormalized, total, out=np.zeros_like(scores), where=total > 0)


def reference_attention(query, key, value, mask=None):
    weights = reference_weights(query, key, mask)
    return np.einsum("bnts,bsnh->btnh", weights, np.asarray(value, np.float64))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_is_equation_1(mask):
    query, key, value = random(B, T, N, H), random(B, S, N, H), random(B, S, N, HV)
    mask = None if mask is None else jnp.asarray(mask)
    out = dot_product_attention(query, key, value, mask)
    assert out.shape == (B, T, N, HV)
    np.testing.assert_allclose(out, reference_attention(query, key, value, mask), atol=1e-6)
    weights = attention_weights(query, key, mask)
    np.testing.assert_allclose(weights, reference_weights(query, key, mask), atol=1e-6)


def test_scores_may_be_large():
    query, key = 300 * random(1, T, 1, H), 300 * random(1, S, 1, H)
    mask = jnp.asarray(MASKS["causal"])
    assert np.ptp(np.einsum("btnh,bsnh->bnts", query, key)) > 1e5
    for m in (None, mask):
        np.testing.assert_allclose(
            attention_weights(query, key, m), reference_weights(query, key, m), atol=1e-6
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_with_nothing_to_attend_to_gives_zeros_and_no_gradient(dtype):
    query, key = random(B, T, N, H, dtype=dtype), random(B, S, N, H, dtype=dtype)
    value = random(B, S, N, HV, dtype=dtype)
    mask = jnp.ones((B, 1, T, S), bool).at[0, :, 1].set(False).at[1].set(False)

    def total(*inputs):
        out = dot_product_attention(*inputs, mask)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    out, *gradients = (np.asarray(leaf, np.float32) for leaf in (out, *gradients))
    assert not np.any(out[0, 1]) and not np.any(out[1])
    assert np.all(out[0, [0, 2]] != 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert not np.any(gradient[1])  # no query in example 1 may attend to anything
        assert np.any(gradient[0])
    assert not np.any(gradients[0][0, 1])


@pytest.mark.parametrize("head_dim", [16, 32])
def test_softmax_is_float32_when_the_rest_is_bfloat16(head_dim):
    # The reference has the same rounded inputs. Only low-precision scores or softmax, or a query
    # that is rounded again when it is scaled, could make a difference, in the third digit.
    query, key = (random(B, n, N, head_dim, dtype=jnp.bfloat16) for n in (T, S))
    mask = jnp.asarray(MASKS["causal"])
    for m in (None, mask):
        weights = attention_weights(query, key, m)
        assert weights.dtype == jnp.float32
        np.testing.assert_allclose(weights, reference_weights(query, key, m), atol=2e-6)
    value = random(B, S, N, HV, dtype=jnp.bfloat16)
    out = dot_product_attention(query, key, value, mask)
    assert out.dtype == jnp.bfloat16
    expected = reference_attention(query, key, value, mask)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)


def random_variables(module, *args, seed=0):
    """Parameters none of which is 0 or 1 merely because it is initialised so."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: 0.5 * random(*leaf.shape, seed=seed), shapes)


def reference_multi_head(params, query_input, key_value_input, mask=None):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def project(name, x):
        y = np.einsum("bld,dnh->blnh", np.asarray(x, np.float64), params[name]["kernel"])
        return y + params[name].get("bias", 0.0)

    heads = reference_attention(
        project("query", query_input),
        project("key", key_value_input),
        project("value", key_value_input),
        mask,
    )
    out = np.einsum("btnh,nhd->btd", heads, params["output"]["kernel"])
    return out + params["output"].get("bias", 0.0)


@pytest.mark.parametrize("use_bias", [False, True])
def test_multi_head_attention_is_concatenated_heads_times_w_o(use_bias):
    """Widths of model, encoder, queries and values all differ, as the paper's §3.2.2 allows."""
    module = MultiHeadAttention(num_heads=N, head_dim=H, value_dim=HV, use_bias=use_bias)
    query_input, key_value_input = random(B, T, D), random(B, S, DKV)
    variables = random_variables(module, query_input, key_value_input)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert {name: shape["kernel"] for name, shape in shapes.items()} == {
        "query": (D, N, H),
        "key": (DKV, N, H),
        "value": (DKV, N, HV),
        "output": (N, HV, D),
    }
    biases = {name: shape["bias"] for name, shape in shapes.items() if "bias" in shape}
    with_bias = {"query": (N, H), "key": (N, H), "value": (N, HV), "output": (D,)}
    assert biases == (with_bias if use_bias else {})

    mask = jnp.asarray(MASKS["padding"])
    out = module.apply(variables, query_input, key_value_input, mask)
    expected = reference_multi_head(variables["params"], query_input, key_value_input, mask)
    np.testing.assert_allclose(out, expected, atol=1e-4, rtol=1e-5)


def test_initialisation_is_xavier_uniform_over_all_heads():
    """The limit counts D inputs and N·H outputs: a head is a slice of one big matrix."""
    module = MultiHeadAttention(num_heads=8, head_dim=16, value_dim=24)
    params = jax.jit(module.init)(jax.random.key(0), random(1, 2, 64), random(1, 2, 64))["params"]
    for name, outputs in {"query": 128, "key": 128, "value": 192, "output": 192}.items():
        limit = (6 / (64 + outputs)) ** 0.5
        largest = np.max(np.abs(params[name]["kernel"]))
        assert 0.99 * limit < largest <= limit, name


def test_projecting_keys_and_values_first_changes_nothing():
    module = MultiHeadAttention(num_heads=2, head_dim=H, value_dim=HV)
    query_input, key_value_input = random(B, T, D), random(B, S, DKV)
    variables = random_variables(module, query_input, key_value_input)
    mask = jnp.asarray(MASKS["padding"])
    key, value = module.apply(variables, key_value_input, method="project_key_value")
    assert key.shape == (B, S, 2, H) and value.shape == (B, S, 2, HV)
    np.testing.assert_array_equal(
        module.apply(variables, query_input, key, value, mask, method="attend"),
        module.apply(variables, query_input, key_value_input, mask),
    )


def test_weights_are_shown_to_those_who_ask_and_cost_others_nothing(monkeypatch):
    module = MultiHeadAttention(num_heads=N, head_dim=H, use_bias=True)
    query_input, key_value_input = random(B, T, D), random(B, S, D)
    variables = random_variables(module, query_input, key_value_input)
    mask = jnp.asarray(MASKS["padding"])

    _, state = module.apply(
        variables, query_input, key_value_input, mask, mutable=["intermediates"]
    )
    (weights,) = state["intermediates"]["attention_weights"]
    assert weights.shape == (B, N, T, S)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    assert not np.any(weights * ~mask)

    def program():
        run = jax.jit(lambda *inputs: module.apply(*inputs, mask))  # a new function is traced anew
        return run.lower(variables, query_input, key_value_input).as_text()

    with_sow = program()
    monkeypatch.setattr(nn.Module, "sow", lambda *_: False)
    assert with_sow == program()


def test_dropout_differs_between_heads_and_examples():
    """Linen's own attention shares one dropout mask between all heads and examples by default."""
    module = MultiHeadAttention(num_heads=2, head_dim=H, dropout_rate=0.5)
    x = jnp.tile(random(1, S, D), (B, 1, 1))
    variables = random_variables(module, x, x)

    # Two heads with the same weights, whose difference W^O takes.
    def twin(name, kernel):
        if name == "output":
            return jnp.stack([kernel[0], -kernel[0]])
        return jnp.stack([kernel[:, 0], kernel[:, 0]], axis=1)

    twins = {
        name: {"kernel": twin(name, leaf["kernel"])} for name, leaf in variables["params"].items()
    }
    np.testing.assert_allclose(module.apply({"params": twins}, x, x), 0.0, atol=1e-5)

    @jax.jit
    def dropped(variables):
        rngs = {"dropout": jax.random.key(5)}
        return module.apply(variables, x, x, deterministic=False, rngs=rngs)

    assert np.mean(np.abs(dropped({"params": twins})) > 1e-3) > 0.5
    out = np.asarray(dropped(variables))
    assert np.mean(np.abs(out[0] - out[1]) > 1e-3) > 0.5


class OtherProject(nn.Module):
    """What another Flax project may do with the layer: learned queries that pool a sequence."""

    @nn.compact
    def __call__(self, x, mask):
        queries = self.param("queries", nn.initializers.normal(1.0), (T, D))
        queries = jnp.broadcast_to(queries, (x.shape[0], T, D))
        pooled = MultiHeadAttention(num_heads=3, head_dim=H, name="pool")(queries, x, mask)
        return nn.Dense(1)(pooled)


def test_works_inside_another_linen_project():
    module = OtherProject()
    x, mask = random(B, S, DKV), jnp.asarray(MASKS["padding"])
    variables = random_variables(module, x, mask)
    assert set(variables["params"]) == {"queries", "pool", "Dense_0"}
    gradients = jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, x, mask) ** 2)))(variables)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))
