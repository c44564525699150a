"""The learning rate of equation 3, counted as optax counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.schedules import cooldown, warmup_inverse_sqrt


def paper_rate(step, d_model, warmup_steps):
    return d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)


@pytest.mark.parametrize("count", [1, 2, 100, 3999, 4000, 4001, 10_000, 100_000])
def test_is_the_papers_formula(count):
    schedule = warmup_inverse_sqrt(d_model=512, warmup_steps=4000)
    assert float(schedule(count)) == pytest.approx(paper_rate(count, 512, 4000), rel=1e-6)


def test_the_first_update_has_the_rate_of_step_1():
    """The formula at 0 is 0/0, and a rate of 0 would waste the first batch."""
    schedule = warmup_inverse_sqrt(d_model=512, warmup_steps=4000)
    assert float(schedule(0)) == pytest.approx(paper_rate(1, 512, 4000), rel=1e-6)


def test_peak_is_the_highest_rate():
    schedule = warmup_inverse_sqrt(peak=5e-4, warmup_steps=30)
    rates = jax.vmap(schedule)(jnp.arange(200))
    assert int(jnp.argmax(rates)) == 30
    assert float(rates[30]) == pytest.approx(5e-4, rel=1e-6)
    assert np.all(np.diff(rates[1:31]) > 0) and np.all(np.diff(rates[30:]) < 0)
    # Both forms are the same curve at different heights.
    paper = jax.vmap(warmup_inverse_sqrt(d_model=7, warmup_steps=30))(jnp.arange(200))
    np.testing.assert_allclose(rates / 5e-4, paper * (7 * 30) ** 0.5, rtol=1e-5)


def test_takes_the_traced_counts_that_optax_gives():
    schedule = warmup_inverse_sqrt(d_model=512, warmup_steps=1)
    rate = jax.jit(schedule)(jnp.int32(9))
    assert rate.dtype == jnp.float32 and rate.shape == ()
    assert float(rate) == pytest.approx(paper_rate(9, 512, 1), rel=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"warmup_steps": 10}, "either d_model .* or peak"),
        ({"warmup_steps": 10, "d_model": 512, "peak": 1e-3}, "either d_model .* or peak"),
        ({"warmup_steps": 10, "d_model": 0}, "d_model is 0: give at least 1"),
        ({"warmup_steps": 0, "d_model": 512}, "warmup_steps is 0: give at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_inverse_sqrt(**arguments)


def test_cooldown():
    before = warmup_inverse_sqrt(peak=1e-3, warmup_steps=20)
    cooled = cooldown(before, steps=40, end=100)
    for count in (0, 20, 59, 60):
        assert float(cooled(count)) == float(before(count))
    for count in (61, 70, 99):
        share = (100 - count) / 40
        assert float(cooled(count)) == pytest.approx(share * float(before(count)), rel=1e-6)
    assert float(cooled(100)) == float(cooled(120)) == 0.0
    assert cooldown(before, steps=0, end=100) is before
