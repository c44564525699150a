"""Every bit counts; where the bits lie does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer.fingerprint import fingerprint

DRAW = np.random.default_rng(0)
TREE = {
    "kernel": DRAW.standard_normal((5, 3, 7)).astype(np.float32),
    "half": jnp.asarray(DRAW.standard_normal(11), jnp.bfloat16),
    "int8": DRAW.integers(-128, 128, 13, dtype=np.int8),
    "flag": np.array([True, False]),
    "step": np.int32(3),
}


@pytest.mark.parametrize("name", TREE)
def test_a_flipped_bit_shows(name):
    leaf = np.asarray(TREE[name])
    before = fingerprint(TREE)
    bits = 1 if leaf.dtype == bool else 8
    for place in {0, leaf.nbytes // 2, leaf.nbytes - 1}:
        for bit in range(bits):
            data = bytearray(leaf.tobytes())
            data[place] ^= 1 << bit
            changed = np.frombuffer(bytes(data), leaf.dtype).reshape(leaf.shape)
            assert fingerprint(TREE | {name: changed}) != before


def test_elements_and_arrays_that_change_places_show():
    kernel = TREE["kernel"]
    assert len({fingerprint(k) for k in (kernel, kernel[::-1], kernel[:, ::-1])}) == 3
    one, other = kernel[0], kernel[1]
    assert fingerprint([one, other]) != fingerprint([other, one])
    assert fingerprint([np.float32(0.0)]) != fingerprint([np.float32(-0.0)])


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
def test_it_does_not_matter_which_device_holds_what():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    array = DRAW.standard_normal((8, 6)).astype(np.float32)
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec("a", "b")))
    assert fingerprint(array) == fingerprint(jnp.asarray(array)) == fingerprint(sharded)


def test_random_keys_count():
    one, other = jax.random.key(0), jax.random.key(1)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(jax.random.key_data(one))
