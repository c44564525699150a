"""What training changes: arrays only, so that any runner can place, donate and save it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxformer.transformer import Transformer


@flax.struct.dataclass
class TrainState:
    """Arrays only: no functions, no configuration.

    Attributes:
      step: int32 scalar, updates done so far.
      params: the model's parameters, float32.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def create_state(
    model: Transformer, optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
    """Return the state before the first step."""
    ids = jnp.ones((1, 2), jnp.int32)
    # Runners compile this, and XLA drops what the model would compute from these ids.
    params = model.init(rng, ids, ids)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
