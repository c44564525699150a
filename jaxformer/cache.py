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
      cross_key, cross_value: projections of the encoder output, the keys with the positions last,
        or a CPU would transpose them at every step.
    """

    self_key: Float[Array, "B N K T H"]
    self_value: Float[Array, "B N K T Hv"]
    cross_key: Float[Array, "B N H S"]
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
            cross_key=jnp.transpose(cross_key, (0, 2, 3, 1)),
            cross_value=jnp.swapaxes(cross_value, 1, 2),
        )

    def write(
        self, key: Float[Array, "B K N H"], value: Float[Array, "B K N Hv"], index: Int[Array, B]
    ) -> LayerCache:
        """Write the keys and values of each sentence's position `index`, each beam's into its slot.

        Past the end nothing is written: callers size the cache by the longest sequence they decode.
        """

        def update(past, new):
            new = jnp.swapaxes(new, 1, 2)
            return past.at[jnp.arange(index.shape[0]), :, :, index].set(new, mode="drop")

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
        return jnp.transpose(self.cross_key, (0, 3, 1, 2)), jnp.swapaxes(self.cross_value, 1, 2)


@flax.struct.dataclass
class DecoderCache:
    """The past of B sentences of K beams each, all beams of a sentence at the same position.

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
      index: int32 [B], number of positions written so far: sentences may have begun one after the
        other.
    """

    layers: tuple[LayerCache, ...]
    cross_mask: Bool[Array, "B 1 1 S"]
    ancestors: Int[Array, "B K T"]
    index: Int[Array, B]

    @classmethod
    def init(
        cls, layers: tuple[LayerCache, ...], cross_mask: Bool[Array, "B 1 1 S"]
    ) -> DecoderCache:
        """Return a cache of layers in which nothing is written yet."""
        batch, _, beams, length, _ = layers[0].self_key.shape
        ancestors = jnp.zeros((batch, beams, length), jnp.int32)
        return cls(layers, cross_mask, ancestors, jnp.zeros(batch, jnp.int32))

    @property
    def max_length(self) -> int:
        """T, the positions that there is room for."""
        return self.ancestors.shape[2]

    def begin_position(self) -> DecoderCache:
        """Note that every beam writes position `index` into its own slot."""
        batch, beams, _ = self.ancestors.shape
        own = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32), (batch, beams))
        ancestors = self.ancestors.at[jnp.arange(batch), :, self.index].set(own, mode="drop")
        return dataclasses.replace(self, ancestors=ancestors)

    def past(self) -> Bool[Array, "B 1 K KT"]:
        """Mask of the slots' positions that make up each beam's past, `index` included."""
        batch, beams, length = self.ancestors.shape
        slots = jnp.arange(beams, dtype=jnp.int32)[None, None, :, None]
        positions = jnp.arange(length, dtype=jnp.int32)[None, None, None]
        written = positions <= self.index[:, None, None, None]
        mask = (self.ancestors[:, :, None] == slots) & written
        return mask.reshape(batch, 1, beams, beams * length)

    def reorder(self, beams: Int[Array, "B K"]) -> DecoderCache:
        """Let beam k of sentence b go on from what was beam beams[b, k]."""
        ancestors = jnp.take_along_axis(self.ancestors, beams[:, :, None], axis=1)
        return dataclasses.replace(self, ancestors=ancestors)

    def put(self, rows: Int[Array, C], begun: DecoderCache) -> DecoderCache:
        """Let sentences of which nothing is written yet take the place of others.

        What these have written stays: no mask shows it until it is written anew.

        Args:
          rows: where each of the C sentences goes; past the end, it is left out.
          begun: their cache, with room for any number of positions, or none.
        """

        def put(old, new):
            return old.at[rows].set(new, mode="drop")

        def put_layer(old, new):
            return dataclasses.replace(
                old,
                cross_key=put(old.cross_key, new.cross_key),
                cross_value=put(old.cross_value, new.cross_value),
            )

        return dataclasses.replace(
            self,
            layers=tuple(map(put_layer, self.layers, begun.layers)),
            cross_mask=put(self.cross_mask, begun.cross_mask),
            index=put(self.index, begun.index),
        )
