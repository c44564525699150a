"""The decoder's memory while it writes one token at a time."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class DecoderCache:
    """Keys and values of all decoder layers, for B sentences of K beams each.

    The cross-attention part is computed once per sentence and shared by its beams, which attend
    to it as K query positions. Only the self-attention part differs between beams, and so only
    that part is reordered.

    Attributes:
      self_key, self_value: [L, B, K, T, N, H]; positions before `index` are filled.
      cross_key, cross_value: [L, B, S, N, H] projections of the encoder output.
      cross_mask: [B, 1, 1, S], True at real source tokens.
      index: int32 scalar, number of positions written so far, the same for every beam.
    """

    self_key: Float[Array, "L B K T N H"]
    self_value: Float[Array, "L B K T N Hv"]
    cross_key: Float[Array, "L B S N H"]
    cross_value: Float[Array, "L B S N Hv"]
    cross_mask: Bool[Array, "B 1 1 S"]
    index: Int[Array, ""]

    @classmethod
    def init(
        cls,
        cross_key: Float[Array, "L B S N H"],
        cross_value: Float[Array, "L B S N Hv"],
        cross_mask: Bool[Array, "B 1 1 S"],
        *,
        beam_size: int,
        max_length: int,
    ) -> DecoderCache:
        """Return a cache with room for `max_length` positions and none of them written."""

        def empty(cross):
            layers, batch, _, heads, width = cross.shape
            return jnp.zeros((layers, batch, beam_size, max_length, heads, width), cross.dtype)

        return cls(
            self_key=empty(cross_key),
            self_value=empty(cross_value),
            cross_key=cross_key,
            cross_value=cross_value,
            cross_mask=cross_mask,
            index=jnp.zeros((), jnp.int32),
        )

    def written(self) -> Bool[Array, "1 1 1 T"]:
        """Mask of the positions that the token being decoded may attend to, its own included."""
        return (jnp.arange(self.self_key.shape[3]) <= self.index)[None, None, None, :]

    def reorder(self, beams: Int[Array, "B K"]) -> DecoderCache:
        """Let beam k of sentence b go on from what was beam beams[b, k]."""

        def gather(leaf):
            return jax.vmap(jax.vmap(lambda rows, order: rows[order]), in_axes=(0, None))(
                leaf, beams
            )

        return dataclasses.replace(
            self, self_key=gather(self.self_key), self_value=gather(self.self_value)
        )


def write(
    layer: Float[Array, "B K T N H"], new: Float[Array, "B K N H"], index: Int[Array, ""]
) -> Float[Array, "B K T N H"]:
    """Write one layer's new keys or values at position `index`.

    An index past the end would be clamped by XLA and overwrite the last position without a word:
    callers size the cache by the longest sequence they decode.
    """
    return jax.lax.dynamic_update_slice_in_dim(layer, new[:, :, None], index, axis=2)
