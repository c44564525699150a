"""The encoder (§3.1, left half of Figure 1)."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxformer.config import TransformerConfig
from jaxformer.masks import Mask
from jaxformer.residual import layer_norm
from jaxformer.stack import Layer, each_layer, is_unstacked, output_gain, run_stack


class EncoderLayer(Layer):
    """Self-attention, then the feed-forward network, each inside its residual connection."""

    def setup(self) -> None:
        gain = output_gain(2 * self.config.encoder_layers)
        self.self_attention = self.make_attention(gain)
        self.self_attention_residual = self.make_residual()
        self.feed_forward = self.make_feed_forward(gain)
        self.feed_forward_residual = self.make_residual()

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


class Encoder(nn.Module):
    """A stack of encoder layers, with a final LayerNorm if they are pre-norm.

    Works on vectors, not ids: embeddings and positions are the `Transformer`'s.

    Attributes:
      config: of the model.
      layer_type: class of the layers; a subclass may replace their parts, see `stack.Layer`.
    """

    config: TransformerConfig
    layer_type: type[EncoderLayer] = EncoderLayer

    def setup(self) -> None:
        self.layers = self.layer_type(self.config)
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

        def apply_layer(layer, x):
            return layer(x, mask, deterministic=deterministic)

        if is_unstacked(self):
            for layer, params in each_layer(self):
                x = layer.apply(params, x, mask, deterministic=deterministic)
        else:
            x = run_stack(self.config, self.layers, self.config.encoder_layers, apply_layer, x)
        return self.layer_norm(x) if self.config.norm == "pre" else x
