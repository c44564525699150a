"""What the stacks of encoder and decoder have in common (§3.1)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from jaxformer.attention import MultiHeadAttention
from jaxformer.config import TransformerConfig
from jaxformer.feed_forward import FeedForward
from jaxformer.residual import Residual


def run_stack(
    config: TransformerConfig, layer: nn.Module, num_layers: int, apply_layer: Callable, x: Array
) -> Array:
    """Apply `apply_layer(layer, x) -> x` for l = 0 … L-1, with parameters stacked [L, …].

    Looped or unrolled, it is one `nn.scan`: only its `unroll` differs, so that the parameters are
    laid out alike and a checkpoint fits both. Parameters are always initialised in a loop, which is
    faster to compile: the state of `big` takes 3.6 s instead of 16.5.
    """
    loop = config.scan_layers or layer.is_initializing()
    if config.remat:
        # Inside a compiled loop XLA cannot merge the recomputation with the forward pass anyway.
        apply_layer = nn.remat(apply_layer, prevent_cse=not config.scan_layers)
    scanned = nn.scan(
        lambda layer, x, _: (apply_layer(layer, x), None),
        # All collections and all streams of random numbers: a user's custom part may add its own.
        variable_axes={True: 0},
        split_rngs={True: True},
        length=num_layers,
        unroll=1 if loop else num_layers,
        # For parts whose parameters carry partitioning metadata: no mesh axis splits the layers.
        metadata_params={nn.PARTITION_NAME: None},
    )
    return scanned(layer, x, None)[0]


def each_layer(stack: Any) -> Iterator[tuple[Any, dict]]:
    """Yield each layer of a bound stack as a module of its own, with its parameters.

    Decoding is a compiled loop already: its layers are unrolled, not looped over inside it.
    """
    layers = stack.variables["params"]["layers"]
    for params in layers if isinstance(layers, tuple) else _unstack(layers):
        yield stack.layers.clone(parent=None, name=None), {"params": params}


def is_unstacked(stack: nn.Module) -> bool:
    """Whether the parameters of a bound stack are those of `unstack_layers`."""
    return isinstance(stack.variables.get("params", {}).get("layers"), tuple)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a `Transformer` with those of each layer apart.

    `encode`, `init_cache` and `decode_step` take either form. This one saves them from slicing
    [L, …] arrays. Each slice is a copy, and inside a compiled loop it is made at every step, as
    XLA does not move it out of the loop.
    """
    apart = {
        stack: {**params[stack], "layers": _unstack(params[stack]["layers"])}
        for stack in ("encoder", "decoder")
    }
    return {**params, **apart}


def _unstack(layers: Any) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(layers)
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*leaves, strict=True))


def output_gain(num_sublayers: int) -> float:
    """The initial gain of a stack's sub-layers, so that together they add as much as comes in.

    With a gain of 1, the averages that attention takes outweigh the residual stream at first. In
    `tiny`, after 4 post-norm layers, only a third of the encoder output's variation is then between
    the positions of a sentence; the decoder's attention to them becomes flat, and stays so for
    thousands of steps.
    """
    return num_sublayers**-0.5


class Layer(nn.Module):
    """The parts that layers of both stacks are made of; a subclass may override how one is made.

    Attributes:
      config: of the model.
    """

    config: TransformerConfig

    @nn.nowrap
    def make_attention(self, output_gain: float) -> MultiHeadAttention:
        """Return one of the layer's attentions; an override's needs the same methods."""
        config = self.config
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

    @nn.nowrap
    def make_feed_forward(self, output_gain: float) -> nn.Module:
        """The feed-forward network: (x [B, T, D], deterministic=) -> [B, T, D]."""
        config = self.config
        return FeedForward(
            config.d_ff,
            config.activation,
            config.activation_dropout,
            output_gain=output_gain,
            dtype=config.dtype,
            quantized=config.quantized,
        )

    @nn.nowrap
    def make_residual(self) -> Residual:
        """The residual connection around a sub-layer."""
        config = self.config
        return Residual(config.norm, config.dropout, config.layer_norm_epsilon, config.dtype)
