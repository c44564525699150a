"""Constraints on the next token: functions from logits [B, K, V] to logits, -inf = forbidden."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.errors import require


def delay_eos(
    logits: Float[Array, "B K V"],
    steps: Int[Array, "B"],
    min_lengths: Int[Array, "B"],
    eos_id: int,
) -> Float[Array, "B K V"]:
    """Forbid an end before `min_lengths` tokens, eos counted; `steps` tokens are written so far."""
    early = (steps + 1 < min_lengths)[:, None]
    return logits.at[:, :, eos_id].set(jnp.where(early, -jnp.inf, logits[:, :, eos_id]))


def forbid_repeated_ngrams(
    logits: Float[Array, "B K V"],
    sequences: Int[Array, "B K T"],
    steps: Int[Array, "B"],
    size: int,
) -> Float[Array, "B K V"]:
    """Forbid `size` tokens in a row that the hypothesis already has (Paulus et al. 2017, §2.5).

    With size 2, "a b c a" may go on with anything but b.

    Args:
      logits: of the next token.
      sequences: the hypotheses.
      steps: how many tokens are written so far, for each sentence.
      size: tokens in an n-gram, at least 1; static.
    """
    length = sequences.shape[2]
    if length < size:
        return logits
    ends = jnp.maximum(steps, size - 1)[:, None] + jnp.arange(1 - size, 0, dtype=jnp.int32)[None]
    last = jnp.take_along_axis(sequences, ends[:, None], axis=2)
    starts = length - size + 1  # n-grams that fit
    written = jnp.arange(starts, dtype=jnp.int32)[None, None] + size <= steps[:, None, None]
    repeats = jnp.broadcast_to(written, (*sequences.shape[:2], starts))
    for offset in range(size - 1):
        repeats &= sequences[:, :, offset : offset + starts] == last[:, :, offset, None]
    # The tokens that followed earlier; an index past the vocabulary is dropped.
    banned = jnp.where(repeats, sequences[:, :, size - 1 :], logits.shape[-1])
    ban = jax.vmap(jax.vmap(lambda row, ids: row.at[ids].set(-jnp.inf, mode="drop")))
    return ban(logits, banned)


def force_prefix(
    logits: Float[Array, "B K V"],
    free_logits: Float[Array, "B K V"],
    steps: Int[Array, "B"],
    prefix: Int[Array, "B P"],
    pad_id: int,
) -> Float[Array, "B K V"]:
    """Allow only the next token of each sentence's prefix; `free_logits` after the prefix."""
    index = jnp.minimum(steps, prefix.shape[1] - 1)[:, None]
    forced = jnp.take_along_axis(prefix, index, axis=1)  # [B, 1]
    free = (forced == pad_id) | (steps[:, None] >= prefix.shape[1])
    tokens = jnp.arange(logits.shape[-1], dtype=prefix.dtype)[None]
    forced_logits = jnp.where((tokens == forced)[:, None], logits, -jnp.inf)
    return jnp.where(free[:, :, None], free_logits, forced_logits)


def require_ngram_size(size: int) -> None:
    """Raise UserError if `size` is not a valid `no_repeat_ngram_size`."""
    require(size >= 0, "no_repeat_ngram_size", size, "give 1 or more, or 0 for no limit")
