"""Token ids as int32, which models take, and shifted right, which the decoder reads."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxformer.config import BOS_ID
from jaxformer.errors import UserError


def as_ids(ids: Any, name: str = "ids") -> Any:
    """Return ids of any integer dtype as int32; one that int32 cannot hold becomes -1: no token.

    A cast alone would wrap 2^32 + 5 to 5. Narrower dtypes are widened, too: a vocabulary's size,
    say 40,000, which models put in place of an invalid id, would wrap in int16.

    Raises:
      UserError: `ids` is not an array of integers.
    """
    if not hasattr(ids, "dtype"):
        raise UserError(f"{name} are a {type(ids).__name__}: give an array of integers")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(f"{name} are {ids.dtype}: give integers")
    narrow, most = ids.astype(np.int32), np.iinfo(np.int32).max
    if jnp.iinfo(ids.dtype).max <= most:
        return narrow
    where = np.where if isinstance(ids, np.ndarray | np.generic) else jnp.where
    return where((ids >= 0) & (ids <= most), narrow, -1)


def shift_right(labels: Int[Array | np.ndarray, "B T"]) -> Int[Array, "B T"]:
    """The decoder's input: bos, then the target without its last token."""
    return jnp.pad(as_ids(labels, "labels"), ((0, 0), (1, 0)), constant_values=BOS_ID)[:, :-1]
