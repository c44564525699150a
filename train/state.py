"""What training changes: arrays only, so that any runner can place, donate and save it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxformer.schedules import cooldown, warmup_inverse_sqrt
from jaxformer.transformer import Transformer
from train.config import OptimizerConfig


@flax.struct.dataclass
class TrainState:
    """Arrays only: no functions, no configuration.

    Attributes:
      step: int32 scalar, updates done so far.
      params: the model's parameters, float32.
      opt_state: the optimizer's.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def make_schedule(config: OptimizerConfig, d_model: int, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, of which there are `steps`."""
    if config.peak_learning_rate is None:
        schedule = warmup_inverse_sqrt(warmup_steps=config.warmup_steps, d_model=d_model)
    else:
        schedule = warmup_inverse_sqrt(
            warmup_steps=config.warmup_steps, peak=config.peak_learning_rate
        )
    return cooldown(schedule, steps=config.cooldown_steps, end=steps)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Return Adam as in §5.3, with clipping and decoupled weight decay if asked for."""
    adam = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm == 0.0:
        return adam
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def create_state(
    model: Transformer, optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
    """Return the state before the first step."""
    ids = jnp.ones((1, 2), jnp.int32)
    # Runners compile this: what the model would compute of these ids falls away.
    params = model.init(rng, ids, ids)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
