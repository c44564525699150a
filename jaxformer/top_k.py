"""Top k over a vocabulary, and its normaliser, with no more sorting or reading than needed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.search import take


def top_k(
    values: Float[Array, "B K V"], k: int
) -> tuple[Float[Array, "B K k"], Int[Array, "B K k"]]:
    """`lax.top_k` over the last axis, bit for bit, several times faster on CPU."""
    chunks = in_chunks(values)
    batch_size, beam_size, num_chunks, chunk = chunks.shape
    if num_chunks < 2 * k:
        top, index = jax.lax.top_k(values, k)
        return top, index
    rows = chunks.reshape(batch_size * beam_size, num_chunks, chunk)
    maxima = chunk_maxima(chunks).reshape(batch_size * beam_size, num_chunks)
    found = best_of_chunks(rows, maxima, k)
    top, chosen, place = (x.reshape(batch_size, beam_size, k) for x in found)
    return top, chosen * chunk + place


def best_of_chunks(
    chunks: Float[Array, "R C c"],
    maxima: Float[Array, "R C"],
    k: int,
    score: Callable[[Float[Array, "R k c"], Int[Array, "R k"]], Float[Array, "R k c"]] = (
        lambda values, _: values
    ),
) -> tuple[Float[Array, "R k"], Int[Array, "R k"], Int[Array, "R k"]]:
    """The k best of each row, ties to the first, without scoring or sorting all the others.

    Only the k chunks of the largest maxima can hold the k largest: an element of any other chunk
    has k chunks before it, each with a value at least as large (and, if equal, at a lower index).

    Args:
      chunks, maxima: R rows of C chunks, and the largest value of each chunk.
      k: how many to find, at most C.
      score: (values, index of their chunk) -> what they are ranked by; it must not decrease as the
        value grows.

    Returns:
      The scores, best first, and for each its chunk and its place in the chunk.
    """
    num_rows, num_chunks, chunk = chunks.shape
    all_chunks = jnp.broadcast_to(jnp.arange(num_chunks, dtype=jnp.int32), (num_rows, num_chunks))
    _, best = jax.lax.top_k(score(maxima[:, :, None], all_chunks)[:, :, 0], k)
    best = jnp.sort(best, axis=-1)  # back in order of index, for the ties
    scores, flat = jax.lax.top_k(score(take(chunks, best), best).reshape(num_rows, k * chunk), k)
    return scores, take(best, flat // chunk), flat % chunk


def in_chunks(values: Float[Array, "B K V"]) -> Float[Array, "B K C c"]:
    """Split the last axis into chunks of 64 to 128 values, the last one padded with -inf."""
    size = values.shape[-1]
    # Whole chunks, if the vocabulary has a divisor of that size: padding copies all the logits.
    chunk = next((chunk for chunk in range(64, 129) if size % chunk == 0), 64)
    padding = [(0, 0), (0, 0), (0, -size % chunk)]
    padded = jnp.pad(values, padding, constant_values=-jnp.inf) if size % chunk else values
    return padded.reshape(*values.shape[:2], padded.shape[2] // chunk, chunk)


def chunk_maxima(chunks: Float[Array, "B K C c"]) -> Float[Array, "B K C"]:
    """The largest value of each chunk."""
    # The normaliser and the candidates both ask for these, and XLA computes them once. Without the
    # barrier it turns what each does with them into other maxima, over all logits again.
    return jax.lax.optimization_barrier(jnp.max(chunks, axis=-1))


def log_normalizer(logits: Float[Array, "B K V"]) -> Float[Array, "B K 1"]:
    """Log-sum-exp over the last axis, kept; 0 where all are -inf, so that log-probs stay -inf."""
    largest = jnp.max(chunk_maxima(in_chunks(logits)), axis=-1, keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)) + largest
    return jnp.where(jnp.isfinite(total), total, 0.0)
