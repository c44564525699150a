"""A number that changes with any bit of any array, to recognise a damaged checkpoint by."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def fingerprint(tree: Any) -> int:
    """Return a 32-bit number computed from all bits of the arrays in `tree`.

    Every word of an array is multiplied by an odd number of its own, and all products are summed
    modulo 2³². A change of one word always shows, a change of several almost always. As integer
    sums are not rounded, it does not matter which device holds which part.

    Args:
      tree: arrays of any dtype up to 32 bits, numpy's or JAX's, sharded or not. Their order
        counts, their names do not.
    """
    # Array by array, as they need not be on the same devices, and each awaited before the next: on
    # CPUs, the collectives of concurrent programs can meet in a different order in each process.
    leaves = jax.block_until_ready(jax.tree.leaves(tree))
    return sum(int(_sum(leaf, number)) for number, leaf in enumerate(leaves)) % 2**32


@jax.jit
def _sum(leaf: Array, number: Array) -> UInt32[Array, ""]:
    words = _words(leaf)
    # 0, 1, 2, … over the array, with a different start for each array.
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
