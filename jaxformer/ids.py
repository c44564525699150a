"""Token ids as int32, which models take, and shifted right, which the decoder reads."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxformer.config import BOS_ID, PAD_ID
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


def shift_right(
    labels: Int[Array | np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
) -> Int[Array, "B T"]:
    """The decoder's input: bos, then the target without its last token.

    Args:
      labels: the target, with eos.
      segment_ids: of packed rows, where every segment begins with bos and 0 is padding.

    Raises:
      UserError: one of them is not an array of integers, or they differ in shape.

    >>> labels, segments = jnp.array([[7, 8, 2, 9, 2, 0]]), jnp.array([[1, 1, 1, 2, 2, 0]])
    >>> shift_right(labels, segments).tolist()
    [[1, 7, 8, 1, 9, 0]]
    """
    shifted = _shift(as_ids(labels, "labels"), BOS_ID)
    if segment_ids is None:
        return shifted
    if labels.shape != segment_ids.shape:
        raise UserError(
            f"labels are {labels.shape} and segment_ids {segment_ids.shape}: give one id per label"
        )
    segments = as_ids(segment_ids, "segment_ids")
    shifted = jnp.where(segments == _shift(segments, -1), shifted, BOS_ID)
    return jnp.where(segments == PAD_ID, PAD_ID, shifted)


def _shift(ids: Int[Array | np.ndarray, "B T"], first: int) -> Int[Array, "B T"]:
    return jnp.pad(ids, ((0, 0), (1, 0)), constant_values=first)[:, :-1]
