"""Linear maps, in floating point or in 8-bit integers."""

from collections.abc import Sequence
from functools import partial
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxformer.errors import UserError
from jaxformer.quantization import check_matrix, int8_product


class Linear(nn.Module):
    """x W + b over the last axes of x.

    Parameters: kernel [*in, *out], Xavier-uniform as one matrix, and bias [*out], zeros, if
    `use_bias`. With `quantized` the kernel is replaced by int8_kernel [out, in], with its axes
    flattened to two, and scale [*out]; they start as zeros and ones, to be replaced by what
    `quantize` makes of a trained model. A floating-point kernel may have a copy beside it,
    "transposed" [out, in], which `kernel_first` multiplies by.

    Attributes:
      features: *out, such as (N, H) to project to heads; an integer means one axis.
      input_axes: the number of axes of *in; 2 to join heads.
      use_bias: whether to add b.
      gain: factor on the kernel's initial values, relative to Xavier's.
      dtype: of the computation and of the result; parameters are float32.
      quantized: whether the product is computed in int8, see `int8_product`.
    """

    features: int | Sequence[int]
    input_axes: int = 1
    use_bias: bool = True
    gain: float = 1.0
    dtype: DTypeLike = jnp.float32
    quantized: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Map [..., *in] to [..., *out].

        Raises:
          UserError: a width or `input_axes` is below 1, or x has fewer axes than `input_axes`.
        """
        outputs = tuple(np.atleast_1d(self.features).tolist())
        if min(outputs, default=1) < 1 or not 1 <= self.input_axes <= x.ndim:
            raise UserError(
                f"a linear map of {self.input_axes} axes of {list(x.shape)} to {list(outputs)} is "
                "impossible: give 1 axis or more, no more than there are, and widths of 1 or more"
            )
        shape = x.shape[x.ndim - self.input_axes :] + outputs
        check_matrix(self, "kernel")
        if self.quantized:
            transposed = prod(outputs), prod(shape[: self.input_axes])
            kernel = self.param("int8_kernel", nn.initializers.zeros, transposed, jnp.int8)
            scale = self.param("scale", nn.initializers.ones, outputs, jnp.float32)
        else:
            kernel = self.param("kernel", self._initial, shape, jnp.float32).astype(self.dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, outputs, jnp.float32)
            bias = bias.astype(self.dtype)
        if self.quantized:
            return _add(int8_product(x, kernel, scale, self.input_axes).astype(self.dtype), bias)
        if self.has_variable("params", "transposed"):
            leading = x.shape[: x.ndim - self.input_axes]
            joined = x.astype(self.dtype).reshape(*leading, -1)
            if kernel_first_is_faster(joined):
                y = kernel_first(joined, self.get_variable("params", "transposed"))
                return _add(y.reshape(*leading, *outputs), bias)
        function = bfloat16_affine if kernel.dtype == jnp.bfloat16 else affine
        return function(x.astype(self.dtype), kernel, bias, self.input_axes)

    @nn.nowrap
    def _initial(self, rng: Array, shape: Sequence[int], dtype: DTypeLike) -> Array:
        xavier = nn.initializers.variance_scaling(self.gain**2, "fan_avg", "uniform")
        inputs = prod(shape[: self.input_axes])
        return xavier(rng, (inputs, prod(shape) // inputs), dtype).reshape(shape)


def affine(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    input_axes: int = 1,
) -> Float[Array, "..."]:
    """Return x W + b: x [..., *in], kernel [*in, *out], bias [*out] -> [..., *out]."""
    # Leading axes are flattened to rows: the gradient of W is then a sum over one axis instead of
    # batch and length separately, which takes XLA twice as long on CPU in float32.
    shape = x.shape[: x.ndim - input_axes]
    y = jnp.tensordot(x.reshape(-1, *x.shape[len(shape) :]), kernel, input_axes)
    return _add(y.reshape(*shape, *y.shape[1:]), bias)


def kernel_first_is_faster(x: Float[Array, "... I"]) -> bool:
    """Whether `kernel_first` is faster on a CPU, as measured: few float32 rows that fill tiles."""
    rows, inputs = prod(x.shape[:-1]), x.shape[-1]
    if not isinstance(rows, int):  # but symbolic, as it may be in an export
        return False
    fill_tiles = rows % 32 == 0 or (rows in (4, 8, 16) and inputs >= 512)
    return x.dtype == jnp.float32 and fill_tiles and 0 < 8 * rows <= inputs


def kernel_first(
    x: Float[Array, "... I"], transposed: Float[Array, "O I"]
) -> Float[Array, "... O"]:
    """Return x W as (Wᵀ xᵀ)ᵀ, the same sums in another order: x [..., in], Wᵀ [out, in].

    On a CPU XLA rearranges the second operand of a product every time it multiplies. With few rows
    W is by far the larger operand, and this form is up to a quarter faster.
    """
    rows = x.reshape(-1, x.shape[-1])
    # Without the barrier XLA turns it back into x W.
    y = jax.lax.optimization_barrier(jnp.einsum("OI,RI->OR", transposed, rows)).T
    return y.reshape(*x.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def bfloat16_affine(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    input_axes: int = 1,
) -> Float[Array, "..."]:
    """`affine` with the same gradients, in a form that a CPU computes at full speed in bfloat16.

    JAX writes the gradient of W as (gᵀ x)ᵀ, which XLA turns into a product of two transposed
    matrices, and has no fast code for. xᵀ g is up to eleven times as fast, and a training step of
    the `base` model twice as fast. The price: `jax.jvp` does not work through a `jax.custom_vjp`;
    gradients of gradients do.
    """
    return affine(x, kernel, bias, input_axes)


def _affine_forward(x, kernel, bias, input_axes):
    return affine(x, kernel, bias, input_axes), (x, kernel, bias)


def _affine_backward(input_axes, residuals, g):
    x, kernel, bias = residuals
    # Without the barrier XLA recomputes g, in float32, for the sum over its rows.
    g = jax.lax.optimization_barrier(g)
    rows = tuple(range(x.ndim - input_axes))
    outputs = tuple(range(len(rows), g.ndim)), tuple(range(input_axes, kernel.ndim))
    d_bias = None if bias is None else jnp.sum(g, rows)
    return jnp.tensordot(g, kernel, outputs), jnp.tensordot(x, g, (rows, rows)), d_bias


bfloat16_affine.defvjp(_affine_forward, _affine_backward)


def _add(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
