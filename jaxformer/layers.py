"""What a Transformer layer is made of beside attention (§3.1, §3.3, §3.4)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.config import Activation, Norm, Positions, check_choice
from jaxformer.dropout import Dropout
from jaxformer.errors import UserError
from jaxformer.linear import Linear, int8_product, kernel_first, kernel_first_is_faster
from jaxformer.positions import segment_positions, sinusoid
from jaxformer.sharding import constrain


class Embedding(nn.Module):
    """Embedding times √d_model, and the softmax layer tied to it (§3.4).

    The table [V, D] starts as N(0, 1/D): times √D the inputs have unit variance, and as softmax
    weights it gives logits of unit variance. Scale and initialisation belong together.

    With `quantized` the table is int8 and has a scale [V], as `quantize` makes them. Beside a table
    of floats there may be a copy, "transposed" [D, V]: on CPU the logits of a few tokens take a
    third of the time with it, and those of more what `kernel_first` takes.
    """

    vocab_size: int
    d_model: int
    dtype: DTypeLike = jnp.float32
    quantized: bool = False

    def setup(self) -> None:
        shape = self.vocab_size, self.d_model
        if self.quantized:
            self.embedding = self.param("embedding", nn.initializers.zeros, shape, jnp.int8)
            self.scale = self.param("scale", nn.initializers.ones, (self.vocab_size,), jnp.float32)
        else:
            normal = nn.initializers.normal(self.d_model**-0.5)
            self.embedding = self.param("embedding", normal, shape, jnp.float32)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up ids; one below 0 or past the table gives NaN instead of another's vector."""
        ids = jnp.where(ids < 0, self.vocab_size, ids.astype(jnp.int32))
        ids = constrain(ids, "vocab_batch", None)
        vectors = jnp.take(self.embedding, ids, axis=0, mode="fill").astype(self.dtype)
        if self.quantized:
            scale = jnp.take(self.scale, ids, axis=0, mode="fill")
            vectors *= scale[..., None].astype(self.dtype)
        vectors = constrain(vectors, "vocab_batch", None, None)
        return constrain(vectors * self.d_model**0.5, "batch", None, None)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Multiply with the table, hidden · tableᵀ, accumulated and returned in float32."""
        if self.quantized:
            return int8_product(hidden, self.embedding.T, self.scale)
        equation, table = "...D,VD->...V", self.embedding
        if self.has_variable("params", "transposed"):
            if kernel_first_is_faster(hidden):
                return kernel_first(hidden, table.astype(self.dtype))
            equation, table = "...D,DV->...V", self.get_variable("params", "transposed")
        table = table.astype(self.dtype)
        return jnp.einsum(equation, hidden, table, preferred_element_type=jnp.float32)


class PositionalEncoding(nn.Module):
    """Adds the sinusoid of §3.5, or learned vectors (Table 3 (E)), to embeddings.

    Attributes:
      kind: as `TransformerConfig.positions`.
      max_length: positions that learned vectors exist for; sinusoids have no limit.
    """

    kind: Positions = "sinusoidal"
    max_length: int = 1024

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B #T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Add the encoding of `positions`, by default 0 … T-1; past `max_length` learned ones NaN.

        Raises:
          UserError: T is more than `max_length` learned positions, or `kind` is unknown.
        """
        check_choice("kind", self.kind, Positions)
        d_model = x.shape[-1]
        if positions is None:
            if self.kind == "learned" and x.shape[1] > self.max_length:
                raise UserError(
                    f"a sequence of {x.shape[1]} tokens is longer than max_length="
                    f"{self.max_length} learned positions: shorten it or raise max_length"
                )
            positions = jnp.arange(x.shape[1])[None]
        if self.kind == "learned":
            normal = nn.initializers.normal(d_model**-0.5)
            table = self.param("embedding", normal, (self.max_length, d_model), jnp.float32)
            positions = jnp.where(positions < 0, self.max_length, positions)
            encoding = jnp.take(table, positions, axis=0, mode="fill")
        else:
            encoding = sinusoid(positions, d_model, interleaved=self.kind == "sinusoidal")
        return x + encoding.astype(x.dtype)


def packed_positions(segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"] | None:
    """Positions that restart in each packed segment; None, the plain 0 … T-1, without packing."""
    return None if segment_ids is None else segment_positions(segment_ids)


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
      output_gain: of the second kernel's initialisation, over Xavier's.
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
                (features,), gain=gain, dtype=self.dtype, quantized=self.quantized, name=name
            )

        function, gated = activation_function(self.activation)
        hidden = linear(self.d_ff, "hidden")(x)
        hidden = function(linear(self.d_ff, "gate")(x)) * hidden if gated else function(hidden)
        hidden = constrain(hidden, "batch", None, "mlp")
        hidden = Dropout(self.dropout_rate)(hidden, deterministic=deterministic)
        return linear(x.shape[-1], "output", self.output_gain)(hidden)


class Residual(nn.Module):
    """Residual connection, dropout and layer normalization around a sub-layer (§3.1, §5.4).

    norm="post": LayerNorm(x + Dropout(Sublayer(x))), the paper's.
    norm="pre":  x + Dropout(Sublayer(LayerNorm(x))).

        y = sublayer(residual.enter(x))
        x = residual.leave(x, y)
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
        """What the sub-layer works on."""
        return self.layer_norm(x) if self.norm == "pre" else x

    def leave(
        self, x: Float[Array, "B T D"], y: Float[Array, "B T D"], *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        """Join the sub-layer's output `y` to its input's residual stream `x`."""
        x = constrain(x + self.dropout(y, deterministic=deterministic), "batch", None, None)
        return self.layer_norm(x) if self.norm == "post" else x


def layer_norm(epsilon: float, dtype: DTypeLike) -> nn.LayerNorm:
    """LayerNorm with float32 statistics, the variance taken in two passes for exactness."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False)
