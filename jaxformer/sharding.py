"""Names for the axes of activations, to say which device holds which part of them.

Under `jax.jit` over a mesh XLA decides how every array is split, and guesses badly where parameters
and batch compete for the same devices. So the modules name the axes of what they compute:

| name | axis |
|---|---|
| `batch` | B, sentences or packed rows |
| `heads` | N |
| `mlp` | F, the hidden layer of the feed-forward network |
| `vocab` | V |
| `vocab_batch` | B, where V is split: devices that share V between them see the same tokens |

Outside of `flax.linen.logical_axis_rules` and a mesh these names do nothing.
"""

from math import prod

import flax.linen as nn
import jax
from jaxtyping import Array


def constrain(x: Array, *names: str | None) -> Array:
    """Return `x`, laid out by the rules in force; the name None keeps an axis whole.

    Inside `jax.shard_map` the mesh axes that it handles manually are left alone.
    """
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    if manual:
        names = tuple(
            name if name and manual.isdisjoint(_mesh_axes(name)) else None for name in names
        )
        if not any(names):
            return x
    return nn.with_logical_constraint(x, names)


def num_shards(name: str) -> int:
    """How many parts the rules and the mesh in force split an axis into; 1 if there are none."""
    mesh = jax.sharding.get_abstract_mesh()
    split = [axis for axis in _mesh_axes(name) if axis not in mesh.manual_axes]
    return prod(mesh.shape.get(axis, 1) for axis in split)


def _mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes over which the rules in force split the named axis."""
    spec = nn.logical_to_mesh_axes((name,))
    axes = spec[0] if spec else None
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
