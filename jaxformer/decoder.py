"""The decoder (§3.1, right half of Figure 1), for all positions at once or one by one."""

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxformer.cache import DecoderCache, LayerCache
from jaxformer.config import TransformerConfig
from jaxformer.errors import UserError
from jaxformer.masks import Mask
from jaxformer.residual import layer_norm
from jaxformer.stack import Layer, each_layer, output_gain, run_stack


class DecoderLayer(Layer):
    """Masked self-attention, encoder-decoder attention, then the feed-forward network."""

    def setup(self) -> None:
        gain = output_gain(3 * self.config.decoder_layers)
        self.self_attention = self.make_attention(gain)
        self.self_attention_residual = self.make_residual()
        self.cross_attention = self.make_attention(gain)
        self.cross_attention_residual = self.make_residual()
        self.feed_forward = self.make_feed_forward(gain)
        self.feed_forward_residual = self.make_residual()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        self_mask: Mask | None = None,
        cross_mask: Mask | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Map [B, T, D] to [B, T, D], attending to the encoder's output [B, S, D]."""
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
        """Decode one position of K beams per sentence; returns its output and the updated cache.

        Both attentions see the beams as K query positions of one row: they share the sentence,
        and of all that the beams have written, the mask shows each only its own past.
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


class Decoder(nn.Module):
    """A stack of decoder layers, with a final LayerNorm if they are pre-norm.

    Attributes:
      config: of the model.
      layer_type: class of the layers; a subclass may replace their parts, see `stack.Layer`.
    """

    config: TransformerConfig
    layer_type: type[DecoderLayer] = DecoderLayer

    def setup(self) -> None:
        self.layers = self.layer_type(self.config)
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

        def apply_layer(layer, x):
            return layer(x, encoded, self_mask, cross_mask, deterministic=deterministic)

        x = run_stack(self.config, self.layers, self.config.decoder_layers, apply_layer, x)
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
            layer.apply(params, method=layer_cache) for layer, params in each_layer(self)
        )
        return DecoderCache.init(layers, cross_mask, beam_size=beam_size)

    def decode_step(
        self, x: Float[Array, "B K D"], cache: DecoderCache
    ) -> tuple[Float[Array, "B K D"], DecoderCache]:
        """Decode position `cache.index` of each sentence, for all its beams.

        Sows "cross_attention", the weights [B, N, K, S] of each layer, if that is asked for.

        Raises:
          UserError: the layers are custom ones that would not decode as they train.
        """
        own = self.layer_type
        if own.__call__ is not DecoderLayer.__call__ and (
            own.decode_step is DecoderLayer.decode_step
        ):
            raise UserError(
                f"{own.__name__} has a __call__ of its own, or is wrapped in nn.jit or nn.remat: "
                "give it a decode_step too, or wrap the whole model instead"
            )
        cache, slots = cache.begin_position()
        self_mask, layers = cache.past[:, None], []
        for (layer, params), past in zip(each_layer(self), cache.layers, strict=True):
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
            # A custom attention may sow no weights.
            attended = sown.get("intermediates", {}).get("cross_attention", {})
            for weights in attended.get("attention_weights", ()):
                self.sow("intermediates", "cross_attention", weights)
        cache = dataclasses.replace(cache, layers=tuple(layers), index=cache.index + 1)
        return (self.layer_norm(x) if self.config.norm == "pre" else x), cache
