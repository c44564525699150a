"""Attention masks: boolean, True = may attend, broadcastable to scores [B, N, T, S]."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxformer.config import PAD_ID


def padding_mask(ids: Int[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Every query may attend to every key that is not padding."""
    return (ids != PAD_ID)[:, None, None, :]


def causal_mask(length: int) -> Bool[Array, "1 1 T T"]:
    """Position t may attend to positions 0 … t: the mask of §3.2.3 that keeps decoding causal."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def segment_mask(
    query_segment_ids: Int[Array, "B T"], key_segment_ids: Int[Array, "B S"]
) -> Bool[Array, "B 1 T S"]:
    """Queries attend to keys of their own segment only; segment 0 is padding and sees nothing.

    With the target's ids on both sides it is the segment mask of packed self-attention; with the
    target's and the source's, of packed encoder-decoder attention.
    """
    query, key = query_segment_ids[:, None, :, None], key_segment_ids[:, None, None, :]
    return (query == key) & (key != PAD_ID)
