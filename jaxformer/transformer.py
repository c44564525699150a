"""The encoder-decoder Transformer (§3, Figure 1)."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.attention import MultiHeadAttention
from jaxformer.cache import DecoderCache, write
from jaxformer.config import TransformerConfig
from jaxformer.dropout import Dropout
from jaxformer.layers import (
    Embedding,
    FeedForward,
    PositionalEncoding,
    Residual,
    layer_norm,
    packed_positions,
)
from jaxformer.losses import LossSums, cross_entropy_sums
from jaxformer.masks import causal_mask, padding_mask, segment_mask


def _attention(config: TransformerConfig) -> MultiHeadAttention:
    return MultiHeadAttention(
        num_heads=config.num_heads,
        head_dim=config.query_key_dim,
        value_dim=config.head_value_dim,
        dropout_rate=config.attention_dropout,
        use_bias=config.attention_bias,
        dtype=config.dtype,
    )


def _feed_forward(config: TransformerConfig) -> FeedForward:
    return FeedForward(config.d_ff, config.activation, config.activation_dropout, config.dtype)


def _residual(config: TransformerConfig) -> Residual:
    return Residual(config.norm, config.dropout, config.layer_norm_epsilon, config.dtype)


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward network, each inside its residual connection."""

    config: TransformerConfig

    def setup(self) -> None:
        self.self_attention = _attention(self.config)
        self.self_attention_residual = _residual(self.config)
        self.feed_forward = _feed_forward(self.config)
        self.feed_forward_residual = _residual(self.config)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "#B #N #S S"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B S D"]:
        """Map [B, S, D] to [B, S, D]; `mask` says which positions see which."""
        y = self.self_attention_residual.enter(x)
        y = self.self_attention(y, y, mask, deterministic=deterministic)
        x = self.self_attention_residual.leave(x, y, deterministic=deterministic)
        y = self.feed_forward_residual.enter(x)
        y = self.feed_forward(y, deterministic=deterministic)
        return self.feed_forward_residual.leave(x, y, deterministic=deterministic)


class DecoderLayer(nn.Module):
    """Masked self-attention, encoder-decoder attention, then the feed-forward network."""

    config: TransformerConfig

    def setup(self) -> None:
        self.self_attention = _attention(self.config)
        self.self_attention_residual = _residual(self.config)
        self.cross_attention = _attention(self.config)
        self.cross_attention_residual = _residual(self.config)
        self.feed_forward = _feed_forward(self.config)
        self.feed_forward_residual = _residual(self.config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        self_mask: Bool[Array, "#B #N #T T"] | None = None,
        cross_mask: Bool[Array, "#B #N #T S"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Map [B, T, D] to [B, T, D] in view of the encoder's output [B, S, D]."""
        y = self.self_attention_residual.enter(x)
        y = self.self_attention(y, y, self_mask, deterministic=deterministic)
        x = self.self_attention_residual.leave(x, y, deterministic=deterministic)
        key, value = self.cross_attention.project_key_value(encoded)
        return self._cross_attend_and_feed(x, key, value, cross_mask, deterministic)

    def decode_step(
        self,
        x: Float[Array, "B K D"],
        layer_cache: dict[str, Array],
        index: Int[Array, ""],
        written: Bool[Array, "1 1 1 T"],
        cross_mask: Bool[Array, "B 1 1 S"],
    ) -> tuple[Float[Array, "B K D"], dict[str, Array]]:
        """One position of K beams a sentence; returns its output and the cache written at `index`.

        Beams are rows of their own to self-attention, where each has its own past, and query
        positions of one row to cross-attention, where they share the sentence.
        """
        y = self.self_attention_residual.enter(x)
        key, value = self.self_attention.project_key_value(y)
        layer_cache = layer_cache | {
            "self_key": write(layer_cache["self_key"], key, index),
            "self_value": write(layer_cache["self_value"], value, index),
        }

        def beams_as_rows(past: Array) -> Array:
            return past.reshape(-1, *past.shape[2:])

        y = self.self_attention.attend(
            beams_as_rows(y[:, :, None]),
            beams_as_rows(layer_cache["self_key"]),
            beams_as_rows(layer_cache["self_value"]),
            written,
        ).reshape(y.shape)
        x = self.self_attention_residual.leave(x, y)
        x = self._cross_attend_and_feed(
            x, layer_cache["cross_key"], layer_cache["cross_value"], cross_mask, deterministic=True
        )
        return x, layer_cache

    def _cross_attend_and_feed(self, x, key, value, cross_mask, deterministic):
        y = self.cross_attention_residual.enter(x)
        y = self.cross_attention.attend(y, key, value, cross_mask, deterministic=deterministic)
        x = self.cross_attention_residual.leave(x, y, deterministic=deterministic)
        y = self.feed_forward_residual.enter(x)
        y = self.feed_forward(y, deterministic=deterministic)
        return self.feed_forward_residual.leave(x, y, deterministic=deterministic)


def _run_stack(
    config: TransformerConfig,
    layers: nn.Module,
    num_layers: int,
    layer: Callable,
    x,
    per_layer=None,
):
    """Apply `layer(module, x, per_layer[l]) -> (x, out[l])` for l = 0 … L-1, parameters [L, …].

    Looped or unrolled, it is one `nn.scan`: only the length of the unrolling differs, so that the
    parameters are laid out alike and a checkpoint fits both.
    """
    if config.remat:
        # Inside a compiled loop nothing is left for XLA to merge with the forward pass.
        layer = nn.remat(layer, prevent_cse=not config.scan_layers)
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=num_layers,
        unroll=1 if config.scan_layers else num_layers,
    )
    return scanned(layers, x, per_layer)


class Encoder(nn.Module):
    """A stack of encoder layers, with a final LayerNorm if they are pre-norm.

    Works on vectors, not ids: embeddings and positions are the `Transformer`'s.
    """

    config: TransformerConfig

    def setup(self) -> None:
        self.layers = EncoderLayer(self.config)
        if self.config.norm == "pre":
            self.layer_norm = layer_norm(self.config.layer_norm_epsilon, self.config.dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Bool[Array, "#B #N #S S"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B S D"]:
        """Map [B, S, D] to [B, S, D]."""

        def layer(module, x, _):
            return module(x, mask, deterministic=deterministic), None

        x, _ = _run_stack(self.config, self.layers, self.config.encoder_layers, layer, x)
        return self.layer_norm(x) if self.config.norm == "pre" else x


class Decoder(nn.Module):
    """A stack of decoder layers, with a final LayerNorm if they are pre-norm."""

    config: TransformerConfig

    def setup(self) -> None:
        self.layers = DecoderLayer(self.config)
        if self.config.norm == "pre":
            self.layer_norm = layer_norm(self.config.layer_norm_epsilon, self.config.dtype)

    def _run(self, layer, x, per_layer=None):
        x, out = _run_stack(
            self.config, self.layers, self.config.decoder_layers, layer, x, per_layer
        )
        return (self.layer_norm(x) if self.config.norm == "pre" else x), out

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        self_mask: Bool[Array, "#B #N #T T"] | None = None,
        cross_mask: Bool[Array, "#B #N #T S"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Map [B, T, D] to [B, T, D], all positions at once."""

        def layer(module, x, _):
            return module(x, encoded, self_mask, cross_mask, deterministic=deterministic), None

        return self._run(layer, x)[0]

    def init_cache(
        self,
        encoded: Float[Array, "B S D"],
        cross_mask: Bool[Array, "B 1 1 S"],
        *,
        beam_size: int,
        max_length: int,
    ) -> DecoderCache:
        """Project the encoder output to every layer's cross-attention keys and values, once."""

        def layer(module, carry, _):
            return carry, module.cross_attention.project_key_value(encoded)

        num_layers = self.config.decoder_layers
        _, (key, value) = _run_stack(self.config, self.layers, num_layers, layer, None)
        return DecoderCache.init(key, value, cross_mask, beam_size=beam_size, max_length=max_length)

    def decode_step(
        self, x: Float[Array, "B K D"], cache: DecoderCache
    ) -> tuple[Float[Array, "B K D"], DecoderCache]:
        """Decode the position `cache.index` of every beam."""
        written = cache.written()

        def layer(module, x, layer_cache):
            return module.decode_step(x, layer_cache, cache.index, written, cache.cross_mask)

        per_layer = {
            name: getattr(cache, name)
            for name in ("self_key", "self_value", "cross_key", "cross_value")
        }
        x, per_layer = self._run(layer, x, per_layer)
        return x, dataclasses.replace(
            cache,
            self_key=per_layer["self_key"],
            self_value=per_layer["self_value"],
            index=cache.index + 1,
        )


class Transformer(nn.Module):
    """The whole model: ids in, logits out.

        model = Transformer(PRESETS["base"])
        params = model.init(rng, source_ids, target_ids)["params"]
        logits = model.apply({"params": params}, source_ids, target_ids)

    Ids are int32, [B, S] and [B, T]; 0 is padding. `target_ids` is the decoder's input: the target
    shifted right, beginning with bos. Rows may hold several sentence pairs ("packed") if segment
    ids say which token belongs to which pair: 1, 2, … and 0 for padding; positions then restart
    and no attention crosses from one pair to another. With `deterministic=False` dropout is on and
    `apply` needs `rngs={"dropout": key}`.
    """

    config: TransformerConfig

    def setup(self) -> None:
        config = self.config
        self.embedding = self._embedding(config.vocab_size)
        self.source_embedding = (
            self.embedding
            if config.embeddings == "shared"
            else self._embedding(config.source_vocab_size or config.vocab_size)
        )
        self.output_embedding = (
            self._embedding(config.vocab_size)
            if config.embeddings == "separate"
            else self.embedding
        )
        self.source_positions = PositionalEncoding(config.positions, config.max_length)
        self.target_positions = PositionalEncoding(config.positions, config.max_length)
        self.dropout = Dropout(config.dropout)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @nn.nowrap
    def _embedding(self, vocab_size: int) -> Embedding:
        return Embedding(vocab_size, self.config.d_model, self.config.dtype)

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
        return self.output_embedding.logits(hidden)

    def hidden(
        self,
        source_ids: Int[Array, "B S"],
        target_ids: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        target_segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """What the softmax layer sees: encoder, then decoder, without the logits."""
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
        """
        hidden = self.hidden(
            source_ids,
            target_ids,
            source_segment_ids=source_segment_ids,
            target_segment_ids=target_segment_ids,
            deterministic=deterministic,
        )
        return cross_entropy_sums(
            hidden,
            self.output_embedding.embedding,
            labels,
            label_smoothing=self.config.label_smoothing,
        )

    def encode(
        self,
        source_ids: Int[Array, "B S"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B S D"]:
        """Encoder output; at padding it is finite but means nothing."""
        if source_segment_ids is None:
            mask = padding_mask(source_ids)
        else:
            mask = segment_mask(source_segment_ids, source_segment_ids)
        x = self.source_embedding(source_ids)
        x = self.source_positions(x, packed_positions(source_segment_ids))
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
          ValueError: only one side has segment ids.
        """
        self_mask = causal_mask(target_ids.shape[1])
        cross_mask = padding_mask(source_ids)
        if source_segment_ids is not None and target_segment_ids is not None:
            self_mask = self_mask & segment_mask(target_segment_ids, target_segment_ids)
            cross_mask = segment_mask(target_segment_ids, source_segment_ids)
        elif source_segment_ids is not None or target_segment_ids is not None:
            raise ValueError("packed rows need segment ids on both sides: give both or neither")
        x = self.embedding(target_ids)
        x = self.target_positions(x, packed_positions(target_segment_ids))
        x = self.dropout(x, deterministic=deterministic)
        return self.decoder(x, encoded, self_mask, cross_mask, deterministic=deterministic)

    def init_cache(
        self,
        encoded: Float[Array, "B S D"],
        source_ids: Int[Array, "B S"],
        *,
        beam_size: int,
        max_length: int,
    ) -> DecoderCache:
        """Cache for decoding `max_length` positions of `beam_size` beams a sentence."""
        return self.decoder.init_cache(
            encoded, padding_mask(source_ids), beam_size=beam_size, max_length=max_length
        )

    def decode_step(
        self, tokens: Int[Array, "B K"], cache: DecoderCache
    ) -> tuple[Float[Array, "B K V"], DecoderCache]:
        """One step of auto-regressive decoding: the last token of each beam in, next logits out.

        The first call takes bos. Equal to the full forward pass at position `cache.index`.
        """
        x = self.target_positions(
            self.embedding(tokens), jnp.broadcast_to(cache.index, (1, tokens.shape[1]))
        )
        x, cache = self.decoder.decode_step(x, cache)
        return self.output_embedding.logits(x), cache
