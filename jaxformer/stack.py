"""What the stacks of encoder and decoder have in common (§3.1)."""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array

from jaxformer.attention import MultiHeadAttention
from jaxformer.config import TransformerConfig
from jaxformer.feed_forward import FeedForward
from jaxformer.residual import Residual


def run_stack(
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


def output_gain(num_sublayers: int) -> float:
    """How large the sub-layers of a stack start, so that together they add what comes in.

    With 1 for each, attention's averages outweigh the residual stream before they mean anything.
    Normalised after each sub-layer, the positions of a sentence then all look alike to the decoder
    (of the encoder's standard deviation, 0.33 is left inside a sentence, where 4 layers are tiny),
    its attention to them goes flat, and it takes thousands of steps to find out what it is for.
    """
    return num_sublayers**-0.5


def attention(config: TransformerConfig, output_gain: float) -> MultiHeadAttention:
    """The attention of a layer, as the configuration has it."""
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


def feed_forward(config: TransformerConfig, output_gain: float) -> FeedForward:
    """The feed-forward network of a layer, as the configuration has it."""
    return FeedForward(
        config.d_ff,
        config.activation,
        config.activation_dropout,
        output_gain=output_gain,
        dtype=config.dtype,
        quantized=config.quantized,
    )


def residual(config: TransformerConfig) -> Residual:
    """The residual connection around a sub-layer, as the configuration has it."""
    return Residual(config.norm, config.dropout, config.layer_norm_epsilon, config.dtype)
