"""Scaled dot-product attention and multi-head attention (§3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.config import FlashAttention
from jaxformer.dropout import Dropout
from jaxformer.flash import flash_kernel
from jaxformer.linear import Linear
from jaxformer.masks import Mask, dense_mask
from jaxformer.sharding import constrain


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    mask: Mask | None = None,
) -> Float[Array, "B N T S"]:
    """softmax(Q Kᵀ / √d_k) of equation 1, in float32 whatever the dtype of the inputs.

    A query that may attend to nothing gets weights of zero, not NaN and not uniform weights.

    Raises:
      UserError: `mask` is not a mask, as for `dense_mask`.
    """
    batch_size, length, num_heads, _ = query.shape
    mask = dense_mask(mask, (batch_size, num_heads, length, key.shape[1]))
    scale = query.shape[-1] ** -0.5
    if whole := query.dtype == jnp.float32:
        query = query * scale
    # Heads first: otherwise einsum would pick an operand order that XLA multiplies slowly on CPU.
    query, key = jnp.swapaxes(query, 1, 2), jnp.swapaxes(key, 1, 2)
    scores = jnp.einsum("BNTH,BNSH->BNTS", query, key, preferred_element_type=jnp.float32)
    if not whole:  # scaling a low-precision query would round it once more
        scores = scores * scale
    if mask is None or 0 in key.shape:
        return jax.nn.softmax(scores, axis=-1)
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    scores = scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    unnormalized = jnp.where(mask, jnp.exp(scores), 0.0)
    total = jnp.sum(unnormalized, axis=-1, keepdims=True)
    return unnormalized / jnp.where(total > 0.0, total, 1.0)


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N Hv"],
    mask: Mask | None = None,
    *,
    flash: FlashAttention = "auto",
) -> Float[Array, "B T N Hv"]:
    """Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V (§3.2.1, equation 1).

    Args:
      query, key, value: projected inputs, float32 or bfloat16.
      mask: True where a query may attend to a key, or segment ids that imply it; None allows all.
      flash: as `TransformerConfig.flash_attention`.

    Returns:
      Weighted sums of the values in `value`'s dtype; zeros for a query with nothing to attend to.

    Raises:
      UserError: `mask` is not a mask, as for `dense_mask`, or `flash` is not possible here.
    """
    kernel = flash_kernel(flash, query, key, value, mask)
    if kernel is not None:
        return kernel(query, key, value, mask)
    return weighted_sum(attention_weights(query, key, mask).astype(value.dtype), value)


def weighted_sum(
    weights: Float[Array, "B N T S"], value: Float[Array, "B S N Hv"]
) -> Float[Array, "B T N Hv"]:
    """The second half of equation 1: the values, weighted and summed for each query."""
    heads = jnp.einsum("BNTS,BNSH->BNTH", weights, jnp.swapaxes(value, 1, 2))
    return jnp.swapaxes(heads, 1, 2)


class MultiHeadAttention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, …, head_N) W^O (§3.2.2).

    Parameters: query and key kernels [D, N, H], value kernel [D, N, Hv], output kernel [N, Hv, D],
    and biases if `use_bias`; with `quantized` as in `Linear`. The weights of each call are sown as
    "attention_weights" [B, N, T, S] in the collection "intermediates", if that is mutable.

    Attributes:
      num_heads: N.
      head_dim: H, the paper's d_k.
      value_dim: Hv, the paper's d_v; None means H.
      dropout_rate: on the attention weights, drawn anew for every head and example.
      use_bias: whether the projections add a bias.
      output_gain: scale of the output kernel's initialisation, relative to Xavier's.
      dtype: of the computation; parameters are float32.
      quantized: whether the projections are int8, see `Linear`.
      flash: as `TransformerConfig.flash_attention`; unused where weights are dropped out or sown.
    """

    num_heads: int
    head_dim: int
    value_dim: int | None = None
    dropout_rate: float = 0.0
    use_bias: bool = False
    output_gain: float = 1.0
    dtype: DTypeLike = jnp.float32
    quantized: bool = False
    flash: FlashAttention = "auto"

    def setup(self) -> None:
        self.query = self._projection(self.head_dim)
        self.key = self._projection(self.head_dim)
        self.value = self._projection(self.value_dim or self.head_dim)

    @nn.nowrap
    def _projection(self, width: int) -> Linear:
        return Linear(
            (self.num_heads, width),
            use_bias=self.use_bias,
            dtype=self.dtype,
            quantized=self.quantized,
        )

    def __call__(
        self,
        query_input: Float[Array, "B T D"],
        key_value_input: Float[Array, "B S Dkv"],
        mask: Mask | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """Attend from each query position to the keys and values of another sequence, or its own.

        Args:
          query_input: what queries are projected from; the output has the same width.
          key_value_input: what keys and values are projected from, of width Dkv: the same array
            for self-attention, the encoder output for encoder-decoder attention.
          mask: True = may attend, or segment ids.
          deterministic: disables dropout; if False, a "dropout" rng is needed unless the rate is 0.
        """
        key, value = self.project_key_value(key_value_input)
        return self.attend(query_input, key, value, mask, deterministic=deterministic)

    def project_key_value(
        self, key_value_input: Float[Array, "B S Dkv"]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N Hv"]]:
        """Keys and values alone, to be computed once and attended to many times."""
        key, value = self.key(key_value_input), self.value(key_value_input)
        return _by_heads(key), _by_heads(value)

    @nn.compact
    def attend(
        self,
        query_input: Float[Array, "B T D"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N Hv"],
        mask: Mask | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B T D"]:
        """`__call__` on keys and values that are already projected."""
        query = _by_heads(self.query(query_input))
        dropping = self.dropout_rate != 0.0 and not deterministic
        if dropping or self.is_mutable_collection("intermediates"):
            weights = attention_weights(query, key, mask)
            self.sow("intermediates", "attention_weights", weights)
            weights = Dropout(self.dropout_rate)(
                weights.astype(value.dtype), deterministic=deterministic
            )
            heads = weighted_sum(weights, value)
        else:
            heads = dot_product_attention(query, key, value, mask, flash=self.flash)
        return Linear(
            query_input.shape[-1],
            input_axes=2,
            use_bias=self.use_bias,
            gain=self.output_gain,
            dtype=self.dtype,
            quantized=self.quantized,
            name="output",
        )(heads)


def _by_heads(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    return constrain(x, "batch", None, "heads", None)
