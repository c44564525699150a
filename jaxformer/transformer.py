"""The encoder-decoder Transformer (§3, Figure 1)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.attention import MultiHeadAttention
from jaxformer.cache import DecoderCache, LayerCache
from jaxformer.config import PAD_ID, TransformerConfig
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
from jaxformer.masks import Mask, SegmentMask, padding_mask


def _output_gain(num_sublayers: int) -> float:
    """How large the sub-layers of a stack start, so that together they add what comes in.

    With 1 for each, attention's averages outweigh the residual stream before they mean anything.
    Normalised after each sub-layer, the positions of a sentence then all look alike to the decoder
    (of the encoder's standard deviation, 0.33 is left inside a sentence, where 4 layers are tiny),
    its attention to them goes flat, and it takes thousands of steps to find out what it is for.
    """
    return num_sublayers**-0.5


def _attention(config: TransformerConfig, output_gain: float) -> MultiHeadAttention:
    return MultiHeadAttention(
        num_heads=config.num_heads,
        head_dim=config.query_key_dim,
        value_dim=config.head_value_dim,
        dropout_rate=config.attention_dropout,
        use_bias=config.attention_bias,
        output_gain=output_gain,
        dtype=config.dtype,
        quantized=config.quantized,
        flash=config.flash_attention,
    )


def _feed_forward(config: TransformerConfig, output_gain: float) -> FeedForward:
    return FeedForward(
        config.d_ff,
        config.activation,
        config.activation_dropout,
        output_gain=output_gain,
        dtype=config.dtype,
        quantized=config.quantized,
    )


def _residual(config: TransformerConfig) -> Residual:
    return Residual(config.norm, config.dropout, config.layer_norm_epsilon, config.dtype)


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward network, each inside its residual connection."""

    config: TransformerConfig

    def setup(self) -> None:
        gain = _output_gain(2 * self.config.encoder_layers)
        self.self_attention = _attention(self.config, gain)
        self.self_attention_residual = _residual(self.config)
        self.feed_forward = _feed_forward(self.config, gain)
        self.feed_forward_residual = _residual(self.config)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Mask | None = None,
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
        gain = _output_gain(3 * self.config.decoder_layers)
        self.self_attention = _attention(self.config, gain)
        self.self_attention_residual = _residual(self.config)
        self.cross_attention = _attention(self.config, gain)
        self.cross_attention_residual = _residual(self.config)
        self.feed_forward = _feed_forward(self.config, gain)
        self.feed_forward_residual = _residual(self.config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        self_mask: Mask | None = None,
        cross_mask: Mask | None = None,
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
        cache: LayerCache,
        slots: Int[Array, "B K"],
        self_mask: Bool[Array, "B 1 K P"],
        cross_mask: Bool[Array, "B 1 1 S"],
    ) -> tuple[Float[Array, "B K D"], LayerCache]:
        """One position of each sentence, K beams; returns its output and the cache, written.

        To both attentions the beams are K query positions of one row: they share the sentence,
        and among all that the beams have written the mask shows each its own past.
        """
        y = self.self_attention_residual.enter(x)
        cache = cache.write(*self.self_attention.project_key_value(y), slots)
        y = self.self_attention.attend(y, *cache.self_key_value(), self_mask)
        x = self.self_attention_residual.leave(x, y)
        x = self._cross_attend_and_feed(x, *cache.cross_key_value(), cross_mask, deterministic=True)
        return x, cache

    def _cross_attend_and_feed(self, x, key, value, cross_mask, deterministic):
        y = self.cross_attention_residual.enter(x)
        y = self.cross_attention.attend(y, key, value, cross_mask, deterministic=deterministic)
        x = self.cross_attention_residual.leave(x, y, deterministic=deterministic)
        y = self.feed_forward_residual.enter(x)
        y = self.feed_forward(y, deterministic=deterministic)
        return self.feed_forward_residual.leave(x, y, deterministic=deterministic)


def _run_stack(
    config: TransformerConfig, layers: nn.Module, num_layers: int, layer: Callable, x: Array
) -> Array:
    """Apply `layer(module, x) -> x` for l = 0 … L-1, with parameters stacked [L, …].

    Looped or unrolled, it is one `nn.scan`: only the length of the unrolling differs, so that the
    parameters are laid out alike and a checkpoint fits both. It is a loop while they are made, for
    to draw them is slow to compile: the state of `big` takes 3.6 s instead of 16.5.
    """
    loop = config.scan_layers or layers.is_initializing()
    if config.remat:
        # Inside a compiled loop nothing is left for XLA to merge with the forward pass.
        layer = nn.remat(layer, prevent_cse=not config.scan_layers)
    scanned = nn.scan(
        lambda module, x, _: (layer(module, x), None),
        # All there may be in a sub-module of somebody's own, which may stand in for one of ours.
        variable_axes={True: 0},
        split_rngs={True: True},
        length=num_layers,
        unroll=1 if loop else num_layers,
    )
    return scanned(layers, x, None)[0]


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
        mask: Mask | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B S D"]:
        """Map [B, S, D] to [B, S, D]."""

        def layer(module, x):
            return module(x, mask, deterministic=deterministic)

        x = _run_stack(self.config, self.layers, self.config.encoder_layers, layer, x)
        return self.layer_norm(x) if self.config.norm == "pre" else x


class Decoder(nn.Module):
    """A stack of decoder layers, with a final LayerNorm if they are pre-norm."""

    config: TransformerConfig

    def setup(self) -> None:
        self.layers = DecoderLayer(self.config)
        if self.config.norm == "pre":
            self.layer_norm = layer_norm(self.config.layer_norm_epsilon, self.config.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        self_mask: Mask | None = None,
        cross_mask: Mask | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Map [B, T, D] to [B, T, D], all positions at once."""

        def layer(module, x):
            return module(x, encoded, self_mask, cross_mask, deterministic=deterministic)

        x = _run_stack(self.config, self.layers, self.config.decoder_layers, layer, x)
        return self.layer_norm(x) if self.config.norm == "pre" else x

    def init_cache(
        self,
        encoded: Float[Array, "B S D"],
        cross_mask: Bool[Array, "B 1 1 S"],
        *,
        beam_size: int,
        num_slots: int,
    ) -> DecoderCache:
        """Project the encoder output to every layer's cross-attention keys and values, once."""

        def layer_cache(layer: DecoderLayer) -> LayerCache:
            key, value = layer.cross_attention.project_key_value(encoded)
            return LayerCache.init(key, value, num_slots=num_slots)

        layers: Any = tuple(
            layer.apply(params, method=layer_cache) for layer, params in self._each_layer()
        )
        return DecoderCache.init(layers, cross_mask, beam_size=beam_size)

    def decode_step(
        self, x: Float[Array, "B K D"], cache: DecoderCache
    ) -> tuple[Float[Array, "B K D"], DecoderCache]:
        """Decode position `cache.index` of each sentence, of all its beams.

        Sows, if asked, "cross_attention": the weights [B, N, K, S] of each layer.
        """
        cache, slots = cache.begin_position()
        self_mask, layers = cache.past[:, None], []
        for (layer, params), past in zip(self._each_layer(), cache.layers, strict=True):
            (x, past), sown = layer.apply(
                params,
                x,
                past,
                slots,
                self_mask,
                cache.cross_mask,
                method="decode_step",
                mutable="intermediates",
            )
            layers.append(past)
            (weights,) = sown["intermediates"]["cross_attention"]["attention_weights"]
            self.sow("intermediates", "cross_attention", weights)
        cache = dataclasses.replace(cache, layers=tuple(layers), index=cache.index + 1)
        return (self.layer_norm(x) if self.config.norm == "pre" else x), cache

    def _each_layer(self) -> Iterator[tuple[DecoderLayer, dict]]:
        """Each layer as a module of its own, with its variables.

        Decoding is a loop of its own, with a cache to update, and does not want the layers in
        another: it unrolls them.
        """
        stacked = self.variables["params"]["layers"]
        if not isinstance(stacked, tuple):
            stacked = _unstack(stacked)
        for params in stacked:
            yield DecoderLayer(self.config, parent=None), {"params": params}


def unstack_decoder(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a `Transformer` with those of each decoder layer apart.

    `init_cache` and `decode_step` take either form. Inside a compiled loop this one saves them
    from slicing [L, …] arrays at each step, as XLA does not move a slice out of a loop.
    """
    layers = params["decoder"]["layers"]
    return {**params, "decoder": {**params["decoder"], "layers": _unstack(layers)}}


def _unstack(layers: Any) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(layers)
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*leaves, strict=True))


def _not_padding(ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Segment ids of rows with one sentence each."""
    return (ids != PAD_ID).astype(jnp.int32)


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
        if config.output_bias:
            self.output_bias = self.param(
                "output_bias", nn.initializers.zeros, (config.vocab_size,), jnp.float32
            )
        self.source_positions = PositionalEncoding(config.positions, config.max_length)
        self.target_positions = PositionalEncoding(config.positions, config.max_length)
        self.dropout = Dropout(config.dropout)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @nn.nowrap
    def _embedding(self, vocab_size: int) -> Embedding:
        config = self.config
        return Embedding(vocab_size, config.d_model, config.dtype, config.quantized)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """What the softmax layer makes of `hidden`'s output, float32."""
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

        Raises:
          ValueError: the model is quantized, and so not to be trained.
        """
        if self.config.quantized:
            raise ValueError("a quantized model has no loss: train it with quantized=False")
        hidden = self.hidden(
            source_ids,
            target_ids,
            source_segment_ids=source_segment_ids,
            target_segment_ids=target_segment_ids,
            deterministic=deterministic,
        )
        embedding = self.output_embedding.embedding
        if self.config.output_bias:
            # h · e + b = [h, 1, 1] · [e, b, rest], as bfloat16 has but a part of b.
            bias = self.output_bias[:, None]
            rounded = bias.astype(hidden.dtype).astype(bias.dtype)
            ones = jnp.ones((*hidden.shape[:-1], 2), hidden.dtype)
            hidden = jnp.concatenate([hidden, ones], axis=-1)
            embedding = jnp.concatenate([embedding, rounded, bias - rounded], axis=-1)
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
        """Encoder output; at padding it is finite but means nothing."""
        if source_segment_ids is None:
            mask = SegmentMask(jnp.ones_like(source_ids), _not_padding(source_ids))
        else:
            mask = SegmentMask(source_segment_ids, source_segment_ids)
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
        if (source_segment_ids is None) != (target_segment_ids is None):
            raise ValueError("packed rows need segment ids on both sides: give both or neither")
        queries, keys = target_segment_ids, source_segment_ids
        if queries is None or keys is None:
            queries, keys = jnp.ones_like(target_ids), _not_padding(source_ids)
        self_mask = SegmentMask(queries, queries, causal=True)
        cross_mask = SegmentMask(queries, keys)
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
        num_slots: int | None = None,
    ) -> DecoderCache:
        """Cache for decoding `max_length` positions of `beam_size` beams a sentence.

        Take no more steps than that: what one more writes is lost without a word.

        Args:
          encoded, source_ids: what `encode` returned and was given.
          beam_size, max_length: K and T.
          num_slots: P, if not all K · T are to have room. Look at `DecoderCache.is_full` before
            each step then.
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

        The first call takes bos. Equal to the full forward pass at each sentence's position
        `cache.index`.
        """
        x = self.target_positions(self.embedding(tokens), cache.index[:, None])
        x, cache = self.decoder.decode_step(x, cache)
        return self.logits(x), cache
