"""The matrices of a Transformer's parameters, wherever they are in the tree."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax.numpy as jnp

# How many axes *in and *out the kernels of a layer's parts have.
_ATTENTION = {"query": (1, 2), "key": (1, 2), "value": (1, 2), "output": (2, 1)}
_KERNELS = {
    "self_attention": _ATTENTION,
    "cross_attention": _ATTENTION,
    "feed_forward": {"hidden": (1, 1), "gate": (1, 1), "output": (1, 1)},
}
_EMBEDDINGS = ("embedding", "source_embedding", "output_embedding")


def map_matrices(
    params: Mapping[str, Any],
    change: Callable[[dict[str, Any], str, tuple[int, ...]], dict[str, Any]],
) -> dict[str, Any]:
    """Change the matrices of the `Linear`s and `Embedding`s of a Transformer or of one layer.

    Custom parts that a layer has in place of these are left as they are: how they use their
    matrices is unknown here.

    Args:
      params: those of a `Transformer`, with its layers stacked or apart, or of one layer.
      change: (the module's parameters, name of the matrix, axes *in) -> its new parameters.
    """

    def walk(path: tuple[str, ...], node: Any, leading: int) -> Any:
        if isinstance(node, tuple):  # layers apart
            return tuple(walk((*path, "layer"), layer, 0) for layer in node)
        if not isinstance(node, Mapping):
            return node
        if path[-1:] == ("layers",):
            leading = 1
        node = {child: walk((*path, child), value, leading) for child, value in node.items()}
        part, name = ("", "", *path)[-2:]
        if name in _EMBEDDINGS and jnp.ndim(node.get("embedding", 0)) == 2:
            return change(node, "embedding", (1,))
        inputs, outputs = _KERNELS.get(part, {}).get(name, (0, 0))
        if inputs and jnp.ndim(node.get("kernel", 0)) == leading + inputs + outputs:
            return change(node, "kernel", tuple(range(leading, leading + inputs)))
        return node

    return walk((), params, 0)


def transpose_kernels(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a layer with a transposed copy beside each kernel."""

    def transpose(node: dict[str, Any], name: str, axes: tuple[int, ...]) -> dict[str, Any]:
        inputs = prod(node[name].shape[axis] for axis in axes)
        return {**node, "transposed": node[name].reshape(inputs, -1).T}

    return map_matrices(params, transpose)
