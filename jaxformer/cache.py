"""The decoder's memory while it generates one token at a time."""

import dataclasses

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one decoder layer, heads first, as attention multiplies them.

    Attributes:
      self_key, self_value: of P slots, each for what one beam wrote at one position.
      cross_key, cross_value: projections of the encoder output. Positions come last in the keys,
        which a CPU would otherwise transpose at every step.
    """

    self_key: Float[Array, "B N P H"]
    self_value: Float[Array, "B N P Hv"]
    cross_key: Float[Array, "B N H S"]
    cross_value: Float[Array, "B N S Hv"]

    @classmethod
    def init(
        cls,
        cross_key: Float[Array, "B S N H"],
        cross_value: Float[Array, "B S N Hv"],
        *,
        num_slots: int,
    ) -> "LayerCache":
        """Return a cache that holds nothing yet but the projections of the encoder output."""

        def empty(cross):
            batch, _, heads, width = cross.shape
            return jnp.zeros((batch, heads, num_slots, width), cross.dtype)

        return cls(
            self_key=empty(cross_key),
            self_value=empty(cross_value),
            cross_key=jnp.transpose(cross_key, (0, 2, 3, 1)),
            cross_value=jnp.swapaxes(cross_value, 1, 2),
        )

    def write(
        self,
        key: Float[Array, "B K N H"],
        value: Float[Array, "B K N Hv"],
        slots: Int[Array, "B K"],
    ) -> "LayerCache":
        """Write each beam's keys and values into its slot, or nowhere if that is past the last."""

        def update(past, new):
            return past.at[jnp.arange(slots.shape[0])[:, None], :, slots].set(new, mode="drop")

        return dataclasses.replace(
            self, self_key=update(self.self_key, key), self_value=update(self.self_value, value)
        )

    def self_key_value(self) -> tuple[Float[Array, "B P N H"], Float[Array, "B P N Hv"]]:
        """All slots, whichever beams they belong to."""
        return jnp.swapaxes(self.self_key, 1, 2), jnp.swapaxes(self.self_value, 1, 2)

    def cross_key_value(self) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N Hv"]]:
        """The projections that `init` was given."""
        return jnp.transpose(self.cross_key, (0, 3, 1, 2)), jnp.swapaxes(self.cross_value, 1, 2)


@flax.struct.dataclass
class DecoderCache:
    """The past of B sentences of K beams each, all beams of a sentence at the same position.

    The cross-attention part is computed once per sentence and shared by its beams, which attend
    to it as K query positions of one row. The self-attention part is shared too: what a beam has
    written stays in its slot as long as some beam continues from it; then the slot is free again.
    Reordering changes only the table of which slots make up the past of each beam, and this table
    is the attention mask:

        two steps are written: beam 0 is "a b", beam 1 is "c d"     slots a c b d    1010  0101
        both go on from beam 1                                                       0101  0101
        e and f are written: beam 0 is "c d e", beam 1 is "c d f"   slots e c f d    1101  0111

    K beams of T positions never need more than K · T slots. Most of what they have written soon
    belongs to the past of all of them or of none, so T slots and a few more are nearly always
    enough.

    Attributes:
      layers: one LayerCache per layer rather than arrays [L, …]: a compiled loop updates separate
        arrays in place, with no need to slice them out of a larger one.
      cross_mask: [B, 1, 1, S], True at real source tokens.
      past: [B, K, P], True at the slots of each beam's past.
      index: int32 [B], positions written so far, per sentence: they may begin at different times.
    """

    layers: tuple[LayerCache, ...]
    cross_mask: Bool[Array, "B 1 1 S"]
    past: Bool[Array, "B K P"]
    index: Int[Array, "B"]

    @classmethod
    def init(
        cls, layers: tuple[LayerCache, ...], cross_mask: Bool[Array, "B 1 1 S"], *, beam_size: int
    ) -> "DecoderCache":
        """Return a cache of layers to which nothing has been written yet."""
        batch, _, num_slots, _ = layers[0].self_key.shape
        past = jnp.zeros((batch, beam_size, num_slots), bool)
        return cls(layers, cross_mask, past, jnp.zeros(batch, jnp.int32))

    @property
    def is_full(self) -> Bool[Array, "B"]:
        """Whether too few slots are free for another position of all beams."""
        _, beam_size, num_slots = self.past.shape
        return jnp.sum(jnp.any(self.past, axis=1), axis=1) > num_slots - beam_size

    def begin_position(self) -> tuple["DecoderCache", Int[Array, "B K"]]:
        """Give each beam a free slot for position `index`, lower beams the lower slots.

        Returns:
          The cache with those slots in the beams' past, and the slots; P for a beam that gets
          none.
        """
        _, beam_size, num_slots = self.past.shape
        free = ~jnp.any(self.past, axis=1)
        nth = jnp.cumsum(free, axis=1) - 1  # rank among the free slots
        beams = jnp.arange(beam_size)[None, :, None]
        own = (nth[:, None] == beams) & free[:, None]
        slots = jnp.where(jnp.any(own, axis=2), jnp.argmax(own, axis=2), num_slots)
        return dataclasses.replace(self, past=self.past | own), slots

    def reorder(self, beams: Int[Array, "B K"]) -> "DecoderCache":
        """Let beam k of sentence b continue what was beam beams[b, k]."""
        past = jnp.take_along_axis(self.past, beams[:, :, None], axis=1)
        return dataclasses.replace(self, past=past)

    def put(self, rows: Int[Array, "C"], begun: "DecoderCache") -> "DecoderCache":
        """Let sentences that have just begun take the place of others.

        What the replaced sentences have written stays, but their slots are free.

        Args:
          rows: the row for each of the C sentences; one whose row is past the end is left out.
          begun: the cache of the C sentences, with no more slots than they need so far.
        """
        num_slots = begun.past.shape[2]

        def put(old, new):
            return old.at[rows].set(new, mode="drop")

        def put_slots(old, new):
            return old.at[rows, :, :num_slots].set(new, mode="drop")

        def put_layer(old, new):
            return LayerCache(
                self_key=put_slots(old.self_key, new.self_key),
                self_value=put_slots(old.self_value, new.self_value),
                cross_key=put(old.cross_key, new.cross_key),
                cross_value=put(old.cross_value, new.cross_value),
            )

        return dataclasses.replace(
            self,
            layers=tuple(map(put_layer, self.layers, begun.layers)),
            cross_mask=put(self.cross_mask, begun.cross_mask),
            past=put_slots(put(self.past, False), begun.past),
            index=put(self.index, begun.index),
        )
