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
    `use_bias`. With `quantized` it has an int8_kernel instead and a scale [*out]; they start as
    zeros and ones, to be filled with what `quantize` makes of a trained model. Beside a kernel of
    floats there may be a copy, "transposed" [out, in], for the products that `kernel_first` is for.

    Attributes:
      features: *out, such as (N, H) to project to heads; an integer is one axis.
      input_axes: how many axes *in has: 2 to join heads.
      use_bias: whether to add b.
      gain: of the kernel's initialisation, over Xavier's.
      dtype: of the computation and of the result; parameters are float32.
      quantized: whether the product is one of int8, see `int8_product`.
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
          UserError: a width is below 1, or x has not so many axes.
        """
        outputs = tuple(np.atleast_1d(self.features).tolist())
        if min(outputs, default=1) < 1 or not 1 <= self.input_axes <= x.ndim:
            raise UserError(
                f"a linear map of {self.input_axes} axes of {list(x.shape)} to {list(outputs)} is "
                "none: give 1 axis or more, and widths of 1 or more"
            )
        shape = x.shape[x.ndim - self.input_axes :] + outputs
        check_matrix(self, "kernel")
        if self.quantized:
            kernel = self.param("int8_kernel", nn.initializers.zeros, shape, jnp.int8)
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
    # As one row after the other: the gradient of W is then a sum over one axis, and not over batch
    # and length apart, which takes XLA twice as long on CPU in float32.
    shape = x.shape[: x.ndim - input_axes]
    y = jnp.tensordot(x.reshape(-1, *x.shape[len(shape) :]), kernel, input_axes)
    return _add(y.reshape(*shape, *y.shape[1:]), bias)


def kernel_first_is_faster(x: Float[Array, "... I"]) -> bool:
    """Whether `kernel_first` is, on a CPU: few rows in float32, which fill its tiles of 32."""
    rows, inputs = prod(x.shape[:-1]), x.shape[-1]
    known = isinstance(rows, int)  # and not symbolic, as it may be in an export
    return known and x.dtype == jnp.float32 and rows % 32 == 0 and 0 < 8 * rows <= inputs


def kernel_first(
    x: Float[Array, "... I"], transposed: Float[Array, "O I"]
) -> Float[Array, "... O"]:
    """Return x W as (Wᵀ xᵀ)ᵀ, the same sums in another order: x [..., in], Wᵀ [out, in].

    On a CPU XLA rearranges the second operand of a product every time it multiplies. With few rows
    W is by far the larger, and this up to a quarter faster.
    """
    rows = x.reshape(-1, x.shape[-1])
    # Without the barrier XLA makes it x W again.
    y = jax.lax.optimization_barrier(jnp.einsum("OI,RI->OR", transposed, rows)).T
    return y.reshape(*x.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def bfloat16_affine(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    input_axes: int = 1,
) -> Float[Array, "..."]:
    """`affine` with gradients that a CPU computes at full speed in bfloat16, the same sums.

    JAX writes the gradient of W as (gᵀ x)ᵀ, which XLA makes a product of two transposed matrices,
    and has no fast code for: xᵀ g is up to eleven times as fast, a training step of the `base`
    model twice. The price is `jax.jvp`, which does not go through a `jax.custom_vjp`; gradients of
    gradients do.
    """
    return affine(x, kernel, bias, input_axes)


def _affine_forward(x, kernel, bias, input_axes):
    return affine(x, kernel, bias, input_axes), (x, kernel, bias)


def _affine_backward(input_axes, residuals, g):
    x, kernel, bias = residuals
    # Without the barrier what makes g is computed anew, in float32, for the sum over its rows.
    g = jax.lax.optimization_barrier(g)
    rows = tuple(range(x.ndim - input_axes))
    outputs = tuple(range(len(rows), g.ndim)), tuple(range(input_axes, kernel.ndim))
    d_bias = None if bias is None else jnp.sum(g, rows)
    return jnp.tensordot(g, kernel, outputs), jnp.tensordot(x, g, (rows, rows)), d_bias


bfloat16_affine.defvjp(_affine_forward, _affine_backward)


def _add(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
