"""The optimizer of §5.3: Adam, and the learning rate of every step."""

import optax

from jaxformer.schedules import cooldown, warmup_inverse_sqrt
from train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, d_model: int, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, for a run of `steps` steps."""
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
