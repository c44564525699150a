"""What every search is made of: its state, the loop that advances it, and a step's first half."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.constraints import delay_eos, forbid_repeated_ngrams, force_prefix
from jaxformer.errors import UserError

State = Any
StepFn = Callable[[Int[Array, "B K"], State], tuple[Float[Array, "B K V"], State]]


class BeamResult(NamedTuple):
    """M hypotheses for each of B sentences.

    A slot for which no hypothesis exists (there are fewer than M of non-zero probability) has
    scores and log_probs -inf, length 0 and nothing but padding.
    """

    sequences: Int[Array, "B M T"]  # without bos; eos last if finished, then padding
    scores: Float[Array, "B M"]  # log_probs / length penalty + bonus, float32
    log_probs: Float[Array, "B M"]  # summed over the tokens with eos, natural logarithm, float32
    lengths: Int[Array, "B M"]  # tokens, eos counted


class Request(NamedTuple):
    """What is asked of each sentence, beside the model's state."""

    max_lengths: Int[Array, "B"]  # of 0 costs no step: its one hypothesis is the empty one
    min_lengths: Int[Array, "B"] | None = None
    prefix: Int[Array, "B P"] | None = None  # first tokens of every hypothesis, then padding
    keys: Array | None = None  # [B] keys of the noise, if hypotheses are drawn


class Search(NamedTuple):
    """Where a search stands, of each sentence on its own. All but `state` is [B, …]."""

    done: Bool[Array, "B"]
    steps: Int[Array, "B"]  # tokens so far, or until it was done
    tokens: Int[Array, "B K"]  # the last ones
    hypotheses: Any  # what the method keeps of them
    request: Request
    state: State


@runtime_checkable
class Method(Protocol):
    """A way to choose the next tokens: `BeamSearch` or `Sampling`."""

    @property
    def num_beams(self) -> int:
        """K, the hypotheses that a step goes on with."""

    @property
    def no_repeat_ngram_size(self) -> int:
        """Tokens in a row that occur once at most; 0 is no limit."""

    @property
    def eos_id(self) -> int:
        """The token that ends a hypothesis."""

    @property
    def pad_id(self) -> int:
        """The filling of sequences."""

    def start(self, request: Request, max_length: int, state: State) -> Search:
        """Nothing generated yet, room for `max_length` tokens."""

    def advance(self, step_fn: StepFn, search: Search) -> Search:
        """One token more."""

    def result(self, search: Search) -> BeamResult:
        """The hypotheses as they stand."""


def run(
    method: Method,
    step_fn: StepFn,
    search: Search,
) -> Search:
    """Advance until every sentence is done."""
    return jax.lax.while_loop(
        lambda search: jnp.any(~search.done),
        lambda search: method.advance(step_fn, search),
        search,
    )


def next_logits(step_fn: StepFn, search: Search) -> tuple[Array, State]:
    """Logits [B, K, V] of the next tokens, float32, and the new state."""
    logits, state = step_fn(search.tokens, search.state)
    shape = search.tokens.shape
    fits = logits.ndim == 3 and logits.shape[:2] == shape
    require(fits, "the shape of the logits", logits.shape, f"make step_fn return {[*shape, 'V']}")
    return logits.astype(jnp.float32), state


def apply_constraints(method: Method, logits: Array, search: Search, sequences: Array) -> Array:
    """What is asked of the sentences. A prefix goes before the rest."""
    _, min_lengths, prefix, _ = search.request
    constrained = logits
    if min_lengths is not None:
        constrained = delay_eos(constrained, search.steps, min_lengths, method.eos_id)
    if size := method.no_repeat_ngram_size:
        constrained = forbid_repeated_ngrams(constrained, sequences, search.steps, size)
    if prefix is not None:
        constrained = force_prefix(logits, constrained, search.steps, prefix, method.pad_id)
    return constrained


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
    """The k best of each row, of equal ones the first, without scoring or sorting the others.

    Only the k chunks of the largest maxima can hold the k largest: an element of any other chunk
    has k chunks before it, each with a value at least as large (and, if equal, at a lower index).

    Args:
      chunks, maxima: R rows of C chunks, and the largest of each.
      k: how many, C at most.
      score: (values, chunk of each) -> what they are ranked by, never falling with the value.

    Returns:
      Their scores, best first, chunks, and places in these.
    """
    num_rows, num_chunks, chunk = chunks.shape
    all_chunks = jnp.broadcast_to(jnp.arange(num_chunks, dtype=jnp.int32), (num_rows, num_chunks))
    _, best = jax.lax.top_k(score(maxima[:, :, None], all_chunks)[:, :, 0], k)
    best = jnp.sort(best, axis=-1)  # back in order of index, for the ties
    scores, flat = jax.lax.top_k(score(take(chunks, best), best).reshape(num_rows, k * chunk), k)
    return scores, take(best, flat // chunk), flat % chunk


def in_chunks(values: Float[Array, "B K V"]) -> Float[Array, "B K C c"]:
    """The last axis in pieces of 64 to 128, the last of them completed with -inf."""
    size = values.shape[-1]
    # Whole chunks, if the vocabulary has a divisor of that size: padding copies all the logits.
    chunk = next((chunk for chunk in range(64, 129) if size % chunk == 0), 64)
    padding = [(0, 0), (0, 0), (0, -size % chunk)]
    padded = jnp.pad(values, padding, constant_values=-jnp.inf) if size % chunk else values
    return padded.reshape(*values.shape[:2], padded.shape[2] // chunk, chunk)


def chunk_maxima(chunks: Float[Array, "B K C c"]) -> Float[Array, "B K C"]:
    """The largest of each chunk."""
    # XLA computes once what is written twice, here for the normaliser and for the candidates.
    # Without the barrier it makes of what each does with them other maxima, of all logits again.
    return jax.lax.optimization_barrier(jnp.max(chunks, axis=-1))


def log_normalizer(logits: Float[Array, "B K V"]) -> Float[Array, "B K 1"]:
    """Log-sum-exp over the last axis, kept; 0 where all are -inf, whose log-probs stay -inf."""
    largest = jnp.max(chunk_maxima(in_chunks(logits)), axis=-1, keepdims=True)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)) + largest
    return jnp.where(jnp.isfinite(total), total, 0.0)


def take(leaf: Array, index: Array) -> Array:
    """leaf[b, index[b, k]] for each b and k: leaf [B, J, …], index [B, K] -> [B, K, …]."""
    return jax.vmap(lambda row, i: row[i])(leaf, index)


def no_hypotheses(batch_size: Any, beam_size: int, max_length: int, pad_id: int) -> BeamResult:
    """Return K slots without a hypothesis for each of B sentences; B may be symbolic."""
    impossible = jnp.full((batch_size, beam_size), -jnp.inf, jnp.float32)
    sequences = jnp.full((batch_size, beam_size, max_length), pad_id, jnp.int32)
    return BeamResult(sequences, impossible, impossible, jnp.zeros(impossible.shape, jnp.int32))


def only_possible(result: BeamResult, pad_id: int) -> BeamResult:
    """Nothing but padding in the slots of probability 0."""
    exists = result.log_probs > -jnp.inf
    return result._replace(
        sequences=jnp.where(exists[:, :, None], result.sequences, pad_id),
        lengths=jnp.where(exists, result.lengths, 0),
    )


def require(condition: bool, name: str, value: object, fix: str) -> None:
    """Raise UserError, naming argument, value and fix, unless `condition` holds."""
    if not condition:
        raise UserError(f"{name} is {value}: {fix}")


def require_ngram_size(size: int) -> None:
    """Raise UserError if `size` is no `no_repeat_ngram_size`."""
    require(size >= 0, "no_repeat_ngram_size", size, "give 1 or more, or 0 for no limit")
