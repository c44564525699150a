"""Embeddings and the softmax layer tied to them (§3.4)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxformer.ids import as_ids
from jaxformer.linear import kernel_first, kernel_first_is_faster
from jaxformer.quantization import check_matrix, int8_product
from jaxformer.sharding import constrain


class Embedding(nn.Module):
    """Embedding times √d_model, and the softmax layer tied to it (§3.4).

    The table [V, D] starts as N(0, 1/D): times √D the inputs have unit variance, and as softmax
    weights it gives logits of unit variance. Scale and initialisation belong together.

    Attributes:
      vocab_size, d_model: V and D.
      dtype: of the vectors and of the product that makes logits; the table is float32.
      quantized: whether the table is int8.

    With `quantized` the table is int8 and has a scale [V], as `quantize` makes them. A float table
    may have a copy beside it, "transposed" [D, V]: on CPU the logits of a few tokens then take a
    third of the time. Where `kernel_first` is faster still, they use that.
    """

    vocab_size: int
    d_model: int
    dtype: DTypeLike = jnp.float32
    quantized: bool = False

    def setup(self) -> None:
        shape = self.vocab_size, self.d_model
        check_matrix(self, "embedding")
        if self.quantized:
            self.embedding = self.param("int8_embedding", nn.initializers.zeros, shape, jnp.int8)
            self.scale = self.param("scale", nn.initializers.ones, (self.vocab_size,), jnp.float32)
        else:
            normal = nn.initializers.normal(self.d_model**-0.5)
            self.embedding = self.param("embedding", normal, shape, jnp.float32)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up ids; one below 0 or past the table gives NaN, not the vector of another id.

        Raises:
          UserError: `ids` is not an array of integers.
        """
        ids = as_ids(ids)
        ids = jnp.where(ids < 0, self.vocab_size, ids)
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
            return int8_product(hidden, self.embedding, self.scale)
        equation, table = "...D,VD->...V", self.embedding
        if self.has_variable("params", "transposed"):
            if kernel_first_is_faster(hidden):
                return kernel_first(hidden, table.astype(self.dtype))
            equation, table = "...D,DV->...V", self.get_variable("params", "transposed")
        table = table.astype(self.dtype)
        return jnp.einsum(equation, hidden, table, preferred_element_type=jnp.float32)
