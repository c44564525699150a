"""The position-wise feed-forward network (§3.3)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.config import Activation
from jaxformer.dropout import Dropout
from jaxformer.fields import check_choice
from jaxformer.linear import Linear
from jaxformer.sharding import constrain


def activation_function(name: Activation) -> tuple[Callable[[jax.Array], jax.Array], bool]:
    """Return the nonlinearity and whether it gates a second linear map (Shazeer 2020)."""
    check_choice("activation", name, Activation)
    match name:
        case "relu" | "reglu":
            function = jax.nn.relu
        case "gelu" | "geglu":
            function = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
        case "swish" | "swiglu":
            function = jax.nn.silu
        case "glu":
            function = jax.nn.sigmoid
    return function, name.endswith("glu")


class FeedForward(nn.Module):
    """Position-wise feed-forward network, FFN(x) = max(0, x W₁ + b₁) W₂ + b₂ (§3.3, equation 2).

    With a gated activation, FFN(x) = (act(x W_g + b_g) ⊙ (x W₁ + b₁)) W₂ + b₂.

    Attributes:
      d_ff: F, width of the hidden layer.
      activation: act, as `TransformerConfig.activation`.
      dropout_rate: on the hidden layer.
      output_gain: scale of the second kernel's initialisation, relative to Xavier's.
      dtype: of the computation; parameters are float32.
      quantized: whether the matrices are int8, see `Linear`.
    """

    d_ff: int
    activation: Activation = "relu"
    dropout_rate: float = 0.0
    output_gain: float = 1.0
    dtype: DTypeLike = jnp.float32
    quantized: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        """Apply the same two linear maps at every position."""

        def linear(features: int, name: str, gain: float = 1.0) -> Linear:
            return Linear(
                features, gain=gain, dtype=self.dtype, quantized=self.quantized, name=name
            )

        function, gated = activation_function(self.activation)
        hidden = linear(self.d_ff, "hidden")(x)
        hidden = function(linear(self.d_ff, "gate")(x)) * hidden if gated else function(hidden)
        hidden = constrain(hidden, "batch", None, "mlp")
        hidden = Dropout(self.dropout_rate)(hidden, deterministic=deterministic)
        return linear(x.shape[-1], "output", self.output_gain)(hidden)
