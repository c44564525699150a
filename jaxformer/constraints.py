"""What a hypothesis may go on with: functions from logits [B, K, V] to logits, -inf = never."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def delay_eos(
    logits: Float[Array, "B K V"],
    step: Int[Array, ""],
    min_lengths: Int[Array, "B"],
    eos_id: int,
) -> Float[Array, "B K V"]:
    """No end before `min_lengths` tokens, eos among them; `step` tokens are there already."""
    early = (step + 1 < min_lengths)[:, None]
    return logits.at[:, :, eos_id].set(jnp.where(early, -jnp.inf, logits[:, :, eos_id]))


def forbid_repeated_ngrams(
    logits: Float[Array, "B K V"],
    sequences: Int[Array, "B K T"],
    step: Int[Array, ""],
    size: int,
) -> Float[Array, "B K V"]:
    """No `size` tokens in a row that the hypothesis has had before (Paulus et al. 2017, §2.5).

    With size 2, "a b c a" may go on with anything but b.

    Args:
      logits: of the next token.
      sequences: the hypotheses; their first `step` tokens are there.
      step: number of tokens so far.
      size: tokens of an n-gram, from 1; static.
    """
    length = sequences.shape[2]
    if length < size:
        return logits
    last = jax.lax.dynamic_slice_in_dim(sequences, jnp.maximum(step - size + 1, 0), size - 1, 2)
    starts = length - size + 1  # n-grams that fit
    repeats = jnp.broadcast_to(jnp.arange(starts) + size <= step, (*sequences.shape[:2], starts))
    for offset in range(size - 1):
        repeats &= sequences[:, :, offset : offset + starts] == last[:, :, offset, None]
    # The tokens that followed; an index past the vocabulary is dropped.
    banned = jnp.where(repeats, sequences[:, :, size - 1 :], logits.shape[-1])
    ban = jax.vmap(jax.vmap(lambda row, ids: row.at[ids].set(-jnp.inf, mode="drop")))
    return ban(logits, banned)


def force_prefix(
    logits: Float[Array, "B K V"],
    free_logits: Float[Array, "B K V"],
    step: Int[Array, ""],
    prefix: Int[Array, "B P"],
    pad_id: int,
) -> Float[Array, "B K V"]:
    """Token `step` of the sentence's prefix alone, or `free_logits` if it has none there."""
    index = jnp.minimum(step, prefix.shape[1] - 1)
    forced = jax.lax.dynamic_index_in_dim(prefix, index, axis=1)  # [B, 1]
    free = (forced == pad_id) | (step >= prefix.shape[1])
    tokens = jnp.arange(logits.shape[-1], dtype=prefix.dtype)[None]
    forced_logits = jnp.where((tokens == forced)[:, None], logits, -jnp.inf)
    return jnp.where(free[:, :, None], free_logits, forced_logits)
