"""The encoder-decoder Transformer (§3, Figure 1)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.cache import DecoderCache
from jaxformer.config import PAD_ID, TransformerConfig
from jaxformer.decoder import Decoder, DecoderLayer
from jaxformer.dropout import Dropout
from jaxformer.embedding import Embedding
from jaxformer.encoder import Encoder, EncoderLayer
from jaxformer.errors import UserError
from jaxformer.ids import as_ids
from jaxformer.losses import LossSums, cross_entropy_sums
from jaxformer.masks import SegmentMask, padding_mask
from jaxformer.positions import PositionalEncoding, segment_positions


def _not_padding(ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Segment ids of rows with one sentence each."""
    return (ids != PAD_ID).astype(jnp.int32)


def _positions(segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"] | None:
    """Positions that restart in each packed sentence; without packing None, for 0 … T-1."""
    return None if segment_ids is None else segment_positions(segment_ids)


def _as_rows(name: str, ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    ids = as_ids(ids, name)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise UserError(
            f"{name} are of shape {ids.shape}: give rows of ids, [B, length], none of them empty"
        )
    return ids


def parameter_shapes(config: TransformerConfig) -> dict[str, Any]:
    """The parameters of a `Transformer` as `jax.ShapeDtypeStruct`s; nothing is initialised."""
    key, ids = jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Transformer(config).init, key, ids, ids)["params"]


class Transformer(nn.Module):
    """The whole model: ids in, logits out.

        model = Transformer(PRESETS["base"])
        params = model.init(rng, source_ids, target_ids)["params"]
        logits = model.apply({"params": params}, source_ids, target_ids)

    Ids are int32, [B, S] and [B, T]; 0 is padding. `target_ids` is the decoder's input: the target
    shifted right, beginning with bos: see `shift_right`. Rows may hold several sentence pairs
    ("packed") if segment ids say which token belongs to which pair: 1, 2, … and 0 for padding;
    positions then restart and no attention crosses from one pair to another. With
    `deterministic=False` dropout is on and `apply` needs `rngs={"dropout": key}`.

    Attributes:
      config: the hyper-parameters.
      encoder_layer, decoder_layer: as `layer_type` of `Encoder` and `Decoder`.
    """

    config: TransformerConfig
    encoder_layer: type[EncoderLayer] = EncoderLayer
    decoder_layer: type[DecoderLayer] = DecoderLayer

    def setup(self) -> None:
        config = self.config
        if not isinstance(config, TransformerConfig):
            kind = type(config).__name__
            raise UserError(f"config is of type {kind}: give a TransformerConfig, as in PRESETS")
        self.embedding = self._embedding(config.vocab_size)
        self.source_embedding = (
            self.embedding
            if config.embeddings == "shared"
            else self._embedding(config.encoder_vocab_size)
        )
        self.output_embedding = (
            self._embedding(config.vocab_size)
            if config.embeddings == "separate"
            else self.embedding
        )
        if config.output_bias:
            self.output_bias = self.param(
                "output_bias", nn.initializers.zeros, (config.vocab_size,), jnp.float32
            )
        self.source_positions = PositionalEncoding(config.positions, config.max_length)
        self.target_positions = PositionalEncoding(config.positions, config.max_length)
        self.dropout = Dropout(config.dropout)
        self.encoder = Encoder(config, self.encoder_layer)
        self.decoder = Decoder(config, self.decoder_layer)

    @nn.nowrap
    def _embedding(self, vocab_size: int) -> Embedding:
        config = self.config
        return Embedding(vocab_size, config.d_model, config.dtype, config.quantized)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The softmax layer's logits, float32, for the output of `hidden`."""
        logits = self.output_embedding.logits(hidden)
        if not self.config.output_bias:
            return logits
        return logits + jnp.broadcast_to(self.output_bias, logits.shape)

    def __call__(
        self,
        source_ids: Int[Array, "B S"],
        target_ids: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        target_segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T V"]:
        """Logits, float32, of the token that follows each position of `target_ids`."""
        hidden = self.hidden(
            source_ids,
            target_ids,
            source_segment_ids=source_segment_ids,
            target_segment_ids=target_segment_ids,
            deterministic=deterministic,
        )
        return self.logits(hidden)

    def hidden(
        self,
        source_ids: Int[Array, "B S"],
        target_ids: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        target_segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """The input of the softmax layer: encoder, then decoder, without the logits."""
        encoded = self.encode(
            source_ids, source_segment_ids=source_segment_ids, deterministic=deterministic
        )
        return self.decode(
            target_ids,
            encoded,
            source_ids,
            source_segment_ids=source_segment_ids,
            target_segment_ids=target_segment_ids,
            deterministic=deterministic,
        )

    def loss(
        self,
        source_ids: Int[Array, "B S"],
        target_ids: Int[Array, "B T"],
        labels: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        target_segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> LossSums:
        """Training loss by teacher forcing, without ever holding the logits [B, T, V].

        `labels` is the target itself: the token after each position of `target_ids`, 0 = padding.

        Raises:
          UserError: the model is quantized, so it cannot be trained; or a subclass overrides
            `logits`, which is never called here.
        """
        if type(self).logits is not Transformer.logits:
            raise UserError(
                f"{type(self).__name__} overrides logits, which the loss does not call: override "
                "loss too"
            )
        if self.config.quantized:
            raise UserError("a quantized model has no loss: train it with quantized=False")
        hidden = self.hidden(
            source_ids,
            target_ids,
            source_segment_ids=source_segment_ids,
            target_segment_ids=target_segment_ids,
            deterministic=deterministic,
        )
        embedding = self.output_embedding.embedding
        if self.config.output_bias:
            # h · e + b = [h, 1, 1] · [e, high, low], high + low = b: one bfloat16 would round b.
            bias = self.output_bias[:, None].astype(jnp.float32)
            # A bias of -inf, for a token that is never generated, is the lowest number plus -inf.
            most = float(jnp.finfo(hidden.dtype).max)
            high = jnp.clip(bias, -most, most).astype(hidden.dtype).astype(bias.dtype)
            ones = jnp.ones((*hidden.shape[:-1], 2), hidden.dtype)
            hidden = jnp.concatenate([hidden, ones], axis=-1)
            columns = [embedding.astype(bias.dtype), high, bias - high]
            embedding = jnp.concatenate(columns, axis=-1)
        return cross_entropy_sums(
            hidden, embedding, labels, label_smoothing=self.config.label_smoothing
        )

    def encode(
        self,
        source_ids: Int[Array, "B S"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B S D"]:
        """Encoder output; at padding it is finite but means nothing.

        Raises:
          UserError: `source_ids` are not rows of ids, or are empty.
        """
        source_ids = _as_rows("source_ids", source_ids)
        if source_segment_ids is None:
            mask = SegmentMask(jnp.ones_like(source_ids), _not_padding(source_ids))
        else:
            mask = SegmentMask(source_segment_ids, source_segment_ids)
        x = self.source_embedding(source_ids)
        x = self.source_positions(x, _positions(source_segment_ids))
        x = self.dropout(x, deterministic=deterministic)
        return self.encoder(x, mask, deterministic=deterministic)

    def decode(
        self,
        target_ids: Int[Array, "B T"],
        encoded: Float[Array, "B S D"],
        source_ids: Int[Array, "B S"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        target_segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Decoder output at all positions at once; `source_ids` says where `encoded` is padding.

        Raises:
          UserError: `target_ids` are not rows of ids, are empty, or differ in number from
            `source_ids`; or only one side has segment ids.
        """
        target_ids = _as_rows("target_ids", target_ids)
        if (ours := target_ids.shape[0]) != (theirs := source_ids.shape[0]):
            raise UserError(
                f"there are {theirs} rows of source_ids and {ours} of target_ids: give equally many"
            )
        if (source_segment_ids is None) != (target_segment_ids is None):
            raise UserError("packed rows need segment ids on both sides: give both or neither")
        queries, keys = target_segment_ids, source_segment_ids
        if queries is None or keys is None:
            queries, keys = jnp.ones_like(target_ids), _not_padding(source_ids)
        self_mask = SegmentMask(queries, queries, causal=True)
        cross_mask = SegmentMask(queries, keys)
        x = self.embedding(target_ids)
        x = self.target_positions(x, _positions(target_segment_ids))
        x = self.dropout(x, deterministic=deterministic)
        return self.decoder(x, encoded, self_mask, cross_mask, deterministic=deterministic)

    def init_cache(
        self,
        encoded: Float[Array, "B S D"],
        source_ids: Int[Array, "B S"],
        *,
        beam_size: int,
        max_length: int,
        num_slots: int | None = None,
    ) -> DecoderCache:
        """Cache for decoding `max_length` positions of `beam_size` beams per sentence.

        Take no more steps than that: what a further step writes is lost silently.

        Args:
          encoded, source_ids: what `encode` returned and was given.
          beam_size, max_length: K and T.
          num_slots: P, if there is to be room for fewer than K · T. Then check
            `DecoderCache.is_full` before each step.
        """
        if num_slots is None:
            num_slots = beam_size * max_length
        return self.decoder.init_cache(
            encoded, padding_mask(source_ids), beam_size=beam_size, num_slots=num_slots
        )

    def decode_step(
        self, tokens: Int[Array, "B K"], cache: DecoderCache
    ) -> tuple[Float[Array, "B K V"], DecoderCache]:
        """One step of auto-regressive decoding: the last token of each beam in, next logits out.

        The first call takes bos. The logits are those of the full forward pass at each sentence's
        position `cache.index`.
        """
        x = self.target_positions(self.embedding(tokens), cache.index[:, None])
        x, cache = self.decoder.decode_step(x, cache)
        return self.logits(x), cache
