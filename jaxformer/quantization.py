"""Matrix products in 8-bit integers, and the quantization of a model's matrices for them."""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxformer.errors import UserError
from jaxformer.matrices import map_matrices

#: With so few rows the kernel comes first, as in `kernel_first`: measured on a CPU to be faster,
#: and with integers it changes no bit.
_FEW_ROWS = 8


def int8_product(
    x: Float[Array, "..."],
    kernel: Int8[Array, "O I"],
    scale: Float[Array, "..."],
    input_axes: int = 1,
) -> Float[Array, "..."]:
    """Return x W, multiplied in 8-bit integers and summed in 32 bits.

    Row o of Wᵀ is kernel[o] · scale[o], the axes of *in and of *out each flattened to one. Each
    row of x is rounded to -127 … 127 steps of its own largest absolute value / 127, so that a row's
    result depends, to the last bit, on that row alone.

    Args:
      x: [..., *in], any floating dtype.
      kernel, scale: [out, in] and [*out], as `quantize_matrix` makes them.
      input_axes: the number of axes of *in.

    Returns:
      [..., *out], float32.
    """
    # Rows stay [..., in]: with [R, in], XLA would convert the table to 32 bits in every search.
    leading = x.shape[: x.ndim - input_axes]
    steps, unit = _round(x.reshape(*leading, kernel.shape[-1]))
    rows = prod(leading)
    if leading and isinstance(rows, int) and 0 < rows <= _FEW_ROWS:
        if rows == 1:
            # XLA has no fast code for one row on a CPU: two take a twentieth of the time.
            steps = jnp.concatenate([steps, jnp.zeros_like(steps)])
        product = jnp.einsum("OI,...I->O...", kernel, steps, preferred_element_type=jnp.int32)
        product = jnp.moveaxis(jax.lax.optimization_barrier(product), 0, -1)[: leading[0]]
    else:
        product = jnp.einsum("...I,OI->...O", steps, kernel, preferred_element_type=jnp.int32)
    return (product.astype(jnp.float32) * unit * scale.ravel()).reshape(*leading, *scale.shape)


def quantize_matrix(
    matrix: Float[Array, "..."], input_axes: int = 1
) -> tuple[Int8[Array, "O I"], Float[Array, "..."]]:
    """Return an int8 kernel [out, in] and its scale [*out] for a matrix [*in, *out] of floats.

    In this order all weights of an output are adjacent: most products take less time on a CPU. With
    more than two axes, XLA would copy the kernel for each product.
    """
    outputs = matrix.shape[input_axes:]
    steps, unit = _round(matrix.reshape(-1, prod(outputs)).T)
    return steps, unit.reshape(outputs)


def _round(x: Float[Array, "... I"]) -> tuple[Int8[Array, "... I"], Float[Array, "... 1"]]:
    """Round each row to steps of its largest absolute value / 127; return steps and that unit."""
    unit = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True) / 127
    return jnp.round(x / jnp.where(unit > 0, unit, 1.0)).astype(jnp.int8), unit


def quantize(params: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a `Transformer`'s parameters to those of the same model with `config.quantized`.

    Matrices become int8 with a float32 scale for each of their outputs; biases, LayerNorms, learned
    positions and any other parameters of a custom layer stay as they are. The matrices are renamed:
    a foreign module in place of one of ours then finds none, instead of ignoring the scale. Keep
    the trained parameters, not these, whose form may change from one version to the next.

        config, params = config.replace(quantized=True), quantize(params)

    Raises:
      UserError: the parameters are quantized already, or not those of a `Transformer`.
    """
    found = False

    def to_int8(node: dict[str, Any], name: str, axes: tuple[int, ...]) -> dict[str, Any]:
        nonlocal found
        found = True
        rest = {child: value for child, value in node.items() if child != name}
        matrix = jnp.asarray(node[name])
        if name == "embedding":  # [V, D] is [out, in] already
            kernel, unit = _round(matrix)
            scale = unit[:, 0]
        else:
            convert = partial(quantize_matrix, input_axes=len(axes))
            stacked = axes[0] == 1  # the first axis is the layers'
            kernel, scale = (jax.vmap(convert) if stacked else convert)(matrix)
        return {**rest, f"int8_{name}": kernel, "scale": scale}

    small = map_matrices(params, to_int8)
    if not found:
        if is_quantized(params):
            raise UserError("the parameters are int8 already: give those that were trained")
        raise UserError("these are not the parameters of a Transformer: give variables['params']")
    return small


def is_quantized(params: Any) -> bool:
    """Whether the parameters include a matrix made by `quantize`."""
    if isinstance(params, tuple):  # layers apart
        return any(map(is_quantized, params))
    if not isinstance(params, Mapping):
        return False
    return any(str(name).startswith("int8_") or is_quantized(params[name]) for name in params)


def check_quantized(wanted: bool, given: bool) -> None:
    """Raise `UserError` if the model is quantized and its parameters are not, or vice versa."""
    if wanted and not given:
        raise UserError(
            "the model is quantized and the parameters are not: give what `quantize` makes of "
            "them, or set config.quantized=False"
        )
    if given and not wanted:
        raise UserError(
            "the parameters are int8 and the model is not: set config.quantized=True, or give "
            "the parameters that were trained"
        )


def check_matrix(module: Any, name: str) -> None:
    """Raise `UserError` if a bound module is quantized and its matrix is not, or vice versa.

    `check_quantized` has passed by then, or was never called: the module may be in a custom part.
    """
    path = "/".join(module.path) or type(module).__name__
    if module.quantized and module.has_variable("params", name):
        raise UserError(
            f"{path} is quantized and its parameters are not: give what `quantize` makes of them, "
            "or set quantized=False, as for custom parts whose names `quantize` does not know"
        )
    if not module.quantized and module.has_variable("params", f"int8_{name}"):
        raise UserError(
            f"the parameters of {path} are int8 and it is not: set config.quantized=True (in a "
            "custom part quantized=config.quantized), or give the parameters that were trained"
        )
