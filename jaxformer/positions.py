"""Positional encoding (§3.5) and the position of each token in a packed row."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.config import Positions
from jaxformer.errors import UserError
from jaxformer.fields import check_choice
from jaxformer.ids import as_ids


def sinusoid(
    positions: Int[Array, "..."], d_model: int, *, interleaved: bool = True
) -> Float[Array, "... D"]:
    """Sinusoidal positional encoding, float32.

    PE(pos, 2i) = sin(pos / 10000^(2i/D)),  PE(pos, 2i+1) = cos(pos / 10000^(2i/D))   (§3.5)

    Args:
      positions: integers counted from 0, of any shape.
      d_model: D, even.
      interleaved: sines at even and cosines at odd indices as in the paper; otherwise all sines,
        then all cosines, at the same frequencies (Marian's layout).

    Raises:
      UserError: D is odd.
    """
    if d_model % 2:
        raise UserError(f"sinusoidal positions are of width {d_model}: make it even")
    # In float64 on the host: float32 powers cost three digits of the angle at position 1000.
    inverse_wavelengths = 10_000.0 ** (-np.arange(0, d_model, 2, dtype=np.float64) / d_model)
    angles = jnp.multiply.outer(
        positions.astype(jnp.float32), inverse_wavelengths.astype(np.float32)
    )
    sines, cosines = jnp.sin(angles), jnp.cos(angles)
    if interleaved:
        return jnp.stack([sines, cosines], axis=-1).reshape(*positions.shape, d_model)
    return jnp.concatenate([sines, cosines], axis=-1)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token inside its own segment of a packed row.

    Raises:
      UserError: `segment_ids` is not an array of integers.

    >>> segment_positions(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    segment_ids = as_ids(segment_ids, "segment_ids")
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    previous = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    starts = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


class PositionalEncoding(nn.Module):
    """Adds the sinusoid of §3.5, or learned vectors (Table 3 (E)), to embeddings.

    Attributes:
      kind: as `TransformerConfig.positions`.
      max_length: how many positions have a learned vector; sinusoids have no limit.
    """

    kind: Positions = "sinusoidal"
    max_length: int = 1024

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B #T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Add the encoding of `positions`, by default 0 … T-1; learned ones past the end are NaN.

        Raises:
          UserError: T exceeds `max_length` and positions are learned, D is odd and they are not,
            or `kind` is unknown.
        """
        check_choice("kind", self.kind, Positions)
        d_model = x.shape[-1]
        if positions is None:
            if self.kind == "learned" and x.shape[1] > self.max_length:
                raise UserError(
                    f"a sequence of {x.shape[1]} tokens is longer than max_length="
                    f"{self.max_length} learned positions: shorten it or raise max_length"
                )
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        if self.kind == "learned":
            normal = nn.initializers.normal(d_model**-0.5)
            table = self.param("embedding", normal, (self.max_length, d_model), jnp.float32)
            positions = jnp.where(positions < 0, self.max_length, positions)
            encoding = jnp.take(table, positions, axis=0, mode="fill")
        else:
            encoding = sinusoid(positions, d_model, interleaved=self.kind == "sinusoidal")
        return x + encoding.astype(x.dtype)
