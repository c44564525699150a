"""The learning-rate schedule of the paper, as `optax.Schedule`s."""

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike


def warmup_inverse_sqrt(
    *, warmup_steps: int, d_model: int | None = None, peak: float | None = None
) -> optax.Schedule:
    """Linear warm-up, then decay with the inverse square root of the step (§5.3, equation 3).

    lr(step) = d_model^-0.5 · min(step^-0.5, step · warmup_steps^-1.5)

    The formula counts steps from 1 and optax from 0: count 0 gets the rate of step 1, so that the
    first update already moves the parameters; every other count gets the formula as it stands.

    Args:
      warmup_steps: the step at which the rate peaks.
      d_model: D; the rate peaks at (D · warmup_steps)^-0.5, as in the paper.
      peak: the highest rate itself, given instead of `d_model` (fairseq's `--lr`).

    Raises:
      ValueError: not exactly one of `d_model` and `peak` is given, or warmup_steps < 1.

    >>> f"{warmup_inverse_sqrt(d_model=512, warmup_steps=4000)(4000):.3e}"
    '6.988e-04'
    """
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps is {warmup_steps}: give at least 1")
    if d_model is not None and peak is None:
        highest = (d_model * warmup_steps) ** -0.5
    elif peak is not None and d_model is None:
        highest = peak
    else:
        raise ValueError("give either d_model (the paper's formula) or peak (the highest rate)")

    def schedule(count: ArrayLike) -> Array:
        step = jnp.maximum(jnp.asarray(count, jnp.float32), 1.0)
        return highest * jnp.minimum((warmup_steps / step) ** 0.5, step / warmup_steps)

    return schedule
