"""The decoder's memory while it writes one token at a time."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one decoder layer, heads first, as attention multiplies them.

    Attributes:
      self_key, self_value: [B, N, K, T, H], a slot of T positions for each beam.
      cross_key, cross_value: [B, N, S, H], projections of the encoder output.
    """

    self_key: Float[Array, "B N K T H"]
    self_value: Float[Array, "B N K T Hv"]
    cross_key: Float[Array, "B N S H"]
    cross_value: Float[Array, "B N S Hv"]

    @classmethod
    def init(
        cls,
        cross_key: Float[Array, "B S N H"],
        cross_value: Float[Array, "B S N Hv"],
        *,
        beam_size: int,
        max_length: int,
    ) -> LayerCache:
        """Return a cache with nothing written but the projections of the encoder output."""

        def empty(cross):
            batch, _, heads, width = cross.shape
            return jnp.zeros((batch, heads, beam_size, max_length, width), cross.dtype)

        return cls(
            self_key=empty(cross_key),
            self_value=empty(cross_value),
            cross_key=jnp.swapaxes(cross_key, 1, 2),
            cross_value=jnp.swapaxes(cross_value, 1, 2),
        )

    def write(
        self, key: Float[Array, "B K N H"], value: Float[Array, "B K N Hv"], index: Int[Array, ""]
    ) -> LayerCache:
        """Write the keys and values of position `index`, each beam's into its slot.

        An index past the end would be clamped by XLA and overwrite the last position without a
        word: callers size the cache by the longest sequence they decode.
        """

        def update(past, new):
            new = jnp.swapaxes(new, 1, 2)[:, :, :, None]
            return jax.lax.dynamic_update_slice_in_dim(past, new, index, axis=3)

        # The barrier keeps XLA from fusing the update into what reads it and then, as both the
        # old and the new array are wanted, copying the cache at every step.
        self_key, self_value = jax.lax.optimization_barrier(
            (update(self.self_key, key), update(self.self_value, value))
        )
        return dataclasses.replace(self, self_key=self_key, self_value=self_value)

    def self_key_value(
        self,
    ) -> tuple[Float[Array, "B KT N H"], Float[Array, "B KT N Hv"]]:
        """All slots of a sentence in one row of K · T positions."""

        def one_row(past):
            batch, heads, _, _, width = past.shape
            return jnp.swapaxes(past.reshape(batch, heads, -1, width), 1, 2)

        return one_row(self.self_key), one_row(self.self_value)

    def cross_key_value(self) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N Hv"]]:
        """What `init` was given."""
        return jnp.swapaxes(self.cross_key, 1, 2), jnp.swapaxes(self.cross_value, 1, 2)


@flax.struct.dataclass
class DecoderCache:
    """The past of B sentences of K beams each, all beams at the same position.

    The cross-attention part is computed once per sentence and shared by its beams, which attend
    to it as K query positions of one row. So is the self-attention part: what a beam has written
    stays in its slot. Reordering moves only the table that says in which slot each position of a
    beam's past was written, and the attention mask is made from that table:

        two steps are written: beam 0 is "a b", beam 1 is "c d"   ancestors [[0 0], [1 1]]
        both go on from beam 1                                    ancestors [[1 1], [1 1]]
        e and f are written: beam 0 is "c d e", beam 1 "c d f"    ancestors [[1 1 0], [1 1 1]]

    Attributes:
      layers: one LayerCache a layer, rather than arrays [L, …], for a compiled loop writes an
        array of its own in place and need not slice it out of another.
      cross_mask: [B, 1, 1, S], True at real source tokens.
      ancestors: int32 [B, K, T], the slot of each position of each beam.
      index: int32 scalar, number of positions written so far, the same for every beam.
    """

    layers: tuple[LayerCache, ...]
    cross_mask: Bool[Array, "B 1 1 S"]
    ancestors: Int[Array, "B K T"]
    index: Int[Array, ""]

    @classmethod
    def init(
        cls, layers: tuple[LayerCache, ...], cross_mask: Bool[Array, "B 1 1 S"]
    ) -> DecoderCache:
        """Return a cache of layers in which nothing is written yet."""
        batch, _, beams, length, _ = layers[0].self_key.shape
        ancestors = jnp.zeros((batch, beams, length), jnp.int32)
        return cls(layers, cross_mask, ancestors, jnp.zeros((), jnp.int32))

    @property
    def max_length(self) -> int:
        """T, the positions that there is room for."""
        return self.ancestors.shape[2]

    def begin_position(self) -> DecoderCache:
        """Note that every beam writes position `index` into its own slot."""
        batch, beams, _ = self.ancestors.shape
        own = jnp.arange(beams, dtype=jnp.int32)[None, :, None]
        own = jnp.broadcast_to(own, (batch, beams, 1))
        ancestors = jax.lax.dynamic_update_slice_in_dim(self.ancestors, own, self.index, axis=2)
        return dataclasses.replace(self, ancestors=ancestors)

    def past(self) -> Bool[Array, "B 1 K KT"]:
        """Mask of the slots' positions that make up each beam's past, `index` included."""
        batch, beams, length = self.ancestors.shape
        slots = jnp.arange(beams, dtype=jnp.int32)[None, None, :, None]
        written = jnp.arange(length, dtype=jnp.int32)[None, None, None, :] <= self.index
        mask = (self.ancestors[:, :, None] == slots) & written
        return mask.reshape(batch, 1, beams, beams * length)

    def reorder(self, beams: Int[Array, "B K"]) -> DecoderCache:
        """Let beam k of sentence b go on from what was beam beams[b, k]."""
        ancestors = jnp.take_along_axis(self.ancestors, beams[:, :, None], axis=1)
        return dataclasses.replace(self, ancestors=ancestors)

    def take(self, rows: Int[Array, Kept], max_length: int) -> DecoderCache:
        """Keep some sentences, and make room for `max_length` positions, no fewer than now."""
        room = max_length - self.max_length

        def pad(array, axis):
            return jnp.pad(array, [(0, room if i == axis else 0) for i in range(array.ndim)])

        def keep(layer):
            layer = jax.tree.map(lambda array: array[rows], layer)
            return dataclasses.replace(
                layer, self_key=pad(layer.self_key, 3), self_value=pad(layer.self_value, 3)
            )

        return DecoderCache(
            layers=tuple(map(keep, self.layers)),
            cross_mask=self.cross_mask[rows],
            ancestors=pad(self.ancestors[rows], 2),
            index=self.index,
        )
