"""Attention masks: boolean, True = may attend, broadcastable to scores [B, N, T, S]."""

from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxformer.config import PAD_ID
from jaxformer.errors import UserError
from jaxformer.ids import as_ids


def padding_mask(ids: Int[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Every query may attend to every key that is not padding.

    Raises:
      UserError: `ids` is not an array of integers.
    """
    return (as_ids(ids) != PAD_ID)[:, None, None, :]


def causal_mask(length: int) -> Bool[Array, "1 1 T T"]:
    """Position t may attend to positions 0 … t: the mask of §3.2.3 that keeps decoding causal."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def segment_mask(
    query_segment_ids: Int[Array, "B T"], key_segment_ids: Int[Array, "B S"]
) -> Bool[Array, "B 1 T S"]:
    """Queries attend to keys of their own segment only; segment 0 is padding and sees nothing.

    With the target's ids on both sides it is the segment mask of packed self-attention; with the
    target's and the source's, of packed encoder-decoder attention.

    Raises:
      UserError: the ids are not arrays of integers.
    """
    query = as_ids(query_segment_ids, "query_segment_ids")[:, None, :, None]
    key = as_ids(key_segment_ids, "key_segment_ids")[:, None, None, :]
    return (query == key) & (key != PAD_ID)


@struct.dataclass
class SegmentMask:
    """`segment_mask`, combined with `causal_mask` if `causal`, in compact form.

    The attention kernel of TPUs takes the ids as they are, not the dense [B, 1, T, S].

    Attributes:
      query: segment ids of the queries, int32 [B, T].
      key: segment ids of the keys, int32 [B, S]; 0 = padding.
      causal: whether a query sees no later key.
    """

    # Any: tree transformations put shapes or shardings in place of the arrays.
    query: Any
    key: Any
    causal: bool = struct.field(pytree_node=False, default=False)

    def dense(self) -> Bool[Array, "B 1 T S"]:
        """Return the mask as a boolean array."""
        mask = segment_mask(self.query, self.key)
        return mask & causal_mask(self.query.shape[1]) if self.causal else mask


Mask: TypeAlias = Bool[Array, "#B #N #T #S"] | SegmentMask


def dense_mask(
    mask: Mask | None, scores: tuple[Any, Any, Any, Any]
) -> Bool[Array, "#B #N #T #S"] | None:
    """Return a mask of either form as a boolean array, for scores of the shape `scores`.

    Raises:
      UserError: the mask is of neither form, such as numbers to add to the scores, or of a shape
        that does not broadcast to the scores', though the scores might broadcast to it.
    """
    if isinstance(mask, SegmentMask):
        mask = mask.dense()
    if mask is None:
        return None
    if not hasattr(mask, "dtype") or mask.dtype != bool or mask.ndim != 4:
        kind = f"{mask.dtype}{list(mask.shape)}" if hasattr(mask, "dtype") else repr(mask)
        raise UserError(
            f"a mask is {kind}: give booleans [B, N, T, S], True where a query may attend to a "
            "key; B, N, T and S may be 1"
        )
    if not all(size in (1, whole) for size, whole in zip(mask.shape, scores, strict=True)):
        raise UserError(
            f"a mask is {list(mask.shape)} and the scores are {list(scores)}, [B, N, T, S]: make "
            "each size 1 or that of the scores"
        )
    return mask
