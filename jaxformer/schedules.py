"""Learning rates as `optax.Schedule`s: the paper's, and a cool-down at its end."""

import math

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxformer.errors import UserError


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
      UserError: not exactly one of `d_model` and `peak` is given, d_model or
        warmup_steps is below 1, or peak below 0.

    >>> f"{warmup_inverse_sqrt(d_model=512, warmup_steps=4000)(4000):.3e}"
    '6.988e-04'
    """
    if not 1 <= warmup_steps < math.inf:
        raise UserError(f"warmup_steps is {warmup_steps}: give at least 1")
    if d_model is not None and d_model < 1:
        raise UserError(f"d_model is {d_model}: give at least 1")
    if d_model is not None and peak is None:
        highest = (d_model * warmup_steps) ** -0.5
    elif peak is not None and d_model is None:
        if not 0 <= peak < math.inf:
            raise UserError(f"peak is {peak}: give a rate of 0 or more")
        highest = peak
    else:
        raise UserError("give either d_model (the paper's formula) or peak (the highest rate)")

    def schedule(count: ArrayLike) -> Array:
        step = jnp.maximum(jnp.asarray(count, jnp.float32), 1.0)
        return highest * jnp.minimum((warmup_steps / step) ** 0.5, step / warmup_steps)

    return schedule


def cooldown(schedule: optax.Schedule, *, steps: int, end: int) -> optax.Schedule:
    """`schedule`, but scaled down to 0 in a straight line over the last `steps` before `end`.

    A rate that never falls to 0 leaves the parameters jittering around a minimum; a cool-down takes
    them there, at whatever step training is to stop (Hägele et al. 2024).

    Args:
      schedule: the rate before the cool-down, and the rate that is scaled down during it.
      steps: length of the cool-down; 0 means none.
      end: the count at which the rate is 0.

    Raises:
      UserError: `steps` is below 0.
    """
    if steps < 0:
        raise UserError(f"the cool-down has {steps} steps: give 0 or more")
    if steps == 0:
        return schedule

    def cooled(count: ArrayLike) -> Array:
        left = (end - jnp.asarray(count, jnp.float32)) / steps
        return jnp.asarray(schedule(count)) * jnp.clip(left, 0.0, 1.0)

    return cooled
