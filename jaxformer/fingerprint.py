"""A number that changes with any bit of any array, to know a damaged checkpoint by."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def fingerprint(tree: Any) -> int:
    """Return 32 bits made of all bits of the arrays in `tree`.

    Every word of an array is multiplied by an odd number of its own and all products are summed
    modulo 2³². A change of one word always shows, one of several almost always; and as integers
    have no rounding, it does not matter which device holds which part.

    Args:
      tree: arrays of any dtype up to 32 bits, numpy's or JAX's, sharded or not. Only their order
        counts, no names.
    """
    # Array by array, for they need not lie on the same devices, and each to its end: on CPUs the
    # collectives of programs under way at once can meet in another order in another process.
    leaves = jax.block_until_ready(jax.tree.leaves(tree))
    return sum(int(_sum(leaf, number)) for number, leaf in enumerate(leaves)) % 2**32


@jax.jit
def _sum(leaf: Array, number: Array) -> UInt32[Array, ""]:
    words = _words(leaf)
    # 0, 1, 2, … over the array, each array beginning elsewhere.
    position = jnp.full(words.shape, number).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    stride = 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
        stride = stride * words.shape[axis] % 2**32
    return jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)


def _words(leaf: Array) -> UInt32[Array, "..."]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
