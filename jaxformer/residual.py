"""The residual connection with its dropout and layer normalization (§3.1, §5.4)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.config import Norm
from jaxformer.dropout import Dropout
from jaxformer.fields import check_choice
from jaxformer.sharding import constrain


class Residual(nn.Module):
    """Residual connection, dropout and layer normalization around a sub-layer (§3.1, §5.4).

    norm="post": LayerNorm(x + Dropout(Sublayer(x))), the paper's.
    norm="pre":  x + Dropout(Sublayer(LayerNorm(x))).

        y = sublayer(residual.enter(x))
        x = residual.leave(x, y)

    Attributes:
      norm: where the LayerNorm stands, see above.
      dropout_rate: on the sub-layer's output.
      epsilon: added to the variance.
      dtype: of the result; statistics are float32.
    """

    norm: Norm = "post"
    dropout_rate: float = 0.0
    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        check_choice("norm", self.norm, Norm)
        self.layer_norm = layer_norm(self.epsilon, self.dtype)
        self.dropout = Dropout(self.dropout_rate)

    def enter(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the sub-layer's input."""
        return self.layer_norm(x) if self.norm == "pre" else x

    def leave(
        self, x: Float[Array, "B T D"], y: Float[Array, "B T D"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        """Add the sub-layer's output `y` to the residual stream `x`; "post" normalises the sum."""
        x = constrain(x + self.dropout(y, deterministic=deterministic), "batch", None, None)
        return self.layer_norm(x) if self.norm == "post" else x


def layer_norm(epsilon: float, dtype: DTypeLike) -> nn.LayerNorm:
    """LayerNorm with float32 statistics, the variance taken in two passes for exactness."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False)
