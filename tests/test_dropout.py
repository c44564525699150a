"""Dropout keeps the mean, follows its key, and disappears when it has nothing to do."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.dropout import Dropout, dropout
from jaxformer.errors import UserError

KEY = jax.random.key(3)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_rate_and_scale(rate):
    out = np.asarray(dropout(jnp.ones((1001, 97)), rate, KEY))
    # The rate that 16 bits can express is within half a step of the one asked for ...
    expressed = round(rate * 65536) / 65536
    assert abs(expressed - rate) <= 0.5 / 65536
    # ... what is kept carries exactly its scale, so that the mean is kept ...
    kept = out[out != 0]
    np.testing.assert_allclose(kept, 1 / (1 - expressed), rtol=2e-7)
    # ... and as many are dropped as should be, to 5 standard deviations.
    deviation = (rate * (1 - rate) / out.size) ** 0.5
    assert abs(np.mean(out == 0) - rate) < 5 * deviation


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_elements_are_dropped_independently(impl):
    """Even the two that share a random word, which lie half a row apart."""
    key = jax.random.key(3, impl=impl)
    dropped = np.asarray(dropout(jnp.ones((1000, 106)), 0.5, key) == 0)
    pairs = {
        "same word": (dropped[:, :53], dropped[:, 53:]),
        "next row": (dropped[:-1], dropped[1:]),
        "next column": (dropped[:, :-1], dropped[:, 1:]),
    }
    for name, (one, other) in pairs.items():
        assert abs(np.mean(one & other) - 0.25) < 5 * (0.25 * 0.75 / one.size) ** 0.5, name


def test_the_key_decides():
    x = jnp.arange(1.0, 36.0).reshape(5, 7)
    np.testing.assert_array_equal(dropout(x, 0.5, KEY), dropout(x, 0.5, KEY))
    np.testing.assert_array_equal(
        dropout(x, 0.5, KEY), jax.jit(dropout, static_argnums=1)(x, 0.5, KEY)
    )
    assert np.any(dropout(x, 0.5, KEY) != dropout(x, 0.5, jax.random.key(4)))


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 3), (5, 3), (4, 3), (3, 2, 5)])
def test_any_shape(shape):
    """An odd last axis leaves half a random word over."""
    x = jnp.ones(shape)
    keys = jax.random.split(KEY, 30)
    out = np.asarray(jax.jit(jax.vmap(lambda key: dropout(x, 0.5, key)))(keys))
    assert out.shape == (30, *shape)
    assert np.all((out == 0) | (out == 2))
    # Every element is dropped under some keys and kept under others.
    assert np.all(np.any(out == 0, axis=0) & np.any(out == 2, axis=0))


def test_gradients_are_dropped_where_values_are():
    x = jax.random.normal(jax.random.key(1), (11, 13))
    weights = jax.random.normal(jax.random.key(2), x.shape)
    gradient = jax.grad(lambda x: jnp.sum(weights * dropout(x, 0.25, KEY)))(x)
    np.testing.assert_allclose(gradient, weights * dropout(jnp.ones_like(x), 0.25, KEY), rtol=1e-6)


def test_bfloat16_stays_bfloat16():
    out = dropout(jnp.ones((5, 3), jnp.bfloat16), 0.5, KEY)
    assert out.dtype == jnp.bfloat16
    assert set(np.unique(out.astype(jnp.float32))) == {0.0, 2.0}


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_bfloat16_keeps_the_mean(rate):
    """Each element is rounded by itself; rounding the scale would shift all of them alike."""
    x = jax.random.uniform(KEY, (1000, 1000), jnp.float32, 1.0, 2.0).astype(jnp.bfloat16)
    out, given = (np.asarray(array, np.float64) for array in (dropout(x, rate, KEY), x))
    kept = out != 0
    assert out[kept].sum() / given[kept].sum() == pytest.approx(1 / (1 - rate), rel=1e-4)


def test_the_module_needs_a_key_only_to_drop():
    x = jnp.ones((3, 5))
    assert Dropout(0.5).apply({}, x, deterministic=True) is x
    assert Dropout(0.0).apply({}, x, deterministic=False) is x
    with pytest.raises(flax.errors.InvalidRngError):
        Dropout(0.5).apply({}, x, deterministic=False)
    out = Dropout(0.5).apply({}, x, deterministic=False, rngs={"dropout": KEY})
    assert np.any(out == 0) and np.any(out == 2)


def test_rates_at_the_ends():
    x = jnp.ones(1 << 18)
    assert np.array_equal(dropout(x, 0.0, jax.random.key(0)), x)
    assert set(np.unique(dropout(x, 0.999999, jax.random.key(0)))) == {0.0, 65536.0}
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"a dropout rate is .*: give 0 up to"):
            dropout(x, rate, jax.random.key(0))
