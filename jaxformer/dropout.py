"""Dropout that spends 16 random bits per element instead of a whole word."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from jaxformer.errors import UserError


def dropout(
    x: Float[Array, "..."], rate: float, rng: Key[Array, ""] | UInt32[Array, "2"]
) -> Float[Array, "..."]:
    """Set each element to zero with probability `rate`, and scale the rest to keep the mean.

    Random bits take a noticeable part of a training step. `jax.random.bernoulli` draws 32 of them
    per element; here one 32-bit word decides two elements, which lie half a row apart. The rate
    is rounded to the nearest multiple of 1/65536 below 1, and the scale is that of the rounded
    rate, which keeps the mean.

    Args:
      x: at least one axis, any floating dtype.
      rate: from 0 up to, not including, 1; static.
      rng: a JAX random key.

    Raises:
      UserError: the rate is out of range, or the dtype is not floating.
    """
    if not 0.0 <= rate < 1.0:
        raise UserError(f"a dropout rate is {rate}: give 0 up to, not including, 1")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"the input of dropout is {x.dtype}: give floating-point numbers")
    threshold = min(round(rate * 2**16), 2**16 - 1)
    *rows, width = x.shape
    words = jax.random.bits(rng, (*rows, -(-width // 2)), jnp.uint32)
    # Halves of a row rather than of the batch, of which a device may hold only a part.
    kept = jnp.concatenate([words >> 16 >= threshold, words & 0xFFFF >= threshold], axis=-1)
    kept = kept[..., :width]
    scale = 1.0 / (1.0 - threshold / 2**16)
    # In float32: as bfloat16, the scale would be off by up to 0.4 %, and so would every element.
    wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    return jnp.where(kept, (wide * scale).astype(x.dtype), jnp.zeros((), x.dtype))


class Dropout(nn.Module):
    """`dropout` with a key from the "dropout" rng stream; none is needed if it does nothing."""

    rate: float

    def __call__(self, x: Float[Array, "..."], *, deterministic: bool) -> Float[Array, "..."]:
        """Return `x` unchanged if deterministic or if the rate is 0."""
        if deterministic or self.rate == 0.0:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))
