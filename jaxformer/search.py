"""What every search is made of: its state, the loop that advances it, and a step's first half."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.constraints import delay_eos, forbid_repeated_ngrams, force_prefix
from jaxformer.errors import require

State = Any
StepFn = Callable[[Int[Array, "B K"], State], tuple[Float[Array, "B K V"], State]]


class BeamResult(NamedTuple):
    """M hypotheses for each of B sentences.

    A slot without a hypothesis (fewer than M have a non-zero probability) has scores and log_probs
    of -inf, length 0 and nothing but padding.
    """

    sequences: Int[Array, "B M T"]  # without bos; eos last if finished, then padding
    scores: Float[Array, "B M"]  # log_probs / length penalty + bonus; of samples log_probs; float32
    log_probs: Float[Array, "B M"]  # summed over the tokens and eos, natural logarithm, float32
    lengths: Int[Array, "B M"]  # in tokens, eos included


class Request(NamedTuple):
    """What is asked for each sentence, apart from the model's state."""

    max_lengths: Int[Array, "B"]  # 0 costs no step: the only hypothesis is the empty one
    min_lengths: Int[Array, "B"] | None = None
    prefix: Int[Array, "B P"] | None = None  # first tokens of every hypothesis, then padding
    keys: Array | None = None  # [B] keys of the noise, if hypotheses are drawn


class SearchState(NamedTuple):
    """Where a search stands, separately for each sentence. All but `state` is [B, …]."""

    done: Bool[Array, "B"]
    steps: Int[Array, "B"]  # taken so far, or until the sentence was done
    tokens: Int[Array, "B K"]  # the last token of each hypothesis
    hypotheses: Any  # what the method keeps about the hypotheses
    request: Request
    state: State


@runtime_checkable
class Method(Protocol):
    """A way to choose the next tokens: `BeamSearch` or `Sampling`."""

    @property
    def num_beams(self) -> int:
        """K, the number of hypotheses that a step extends."""

    @property
    def no_repeat_ngram_size(self) -> int:
        """The length of n-grams that may occur at most once; 0 means no limit."""

    @property
    def eos_id(self) -> int:
        """The token that ends a hypothesis."""

    @property
    def pad_id(self) -> int:
        """The token that pads sequences."""

    def start(self, request: Request, max_length: int, state: State) -> SearchState:
        """Return the initial state, with room for `max_length` tokens."""

    def advance(self, step_fn: StepFn, search: SearchState) -> SearchState:
        """Generate one more token."""

    def result(self, search: SearchState) -> BeamResult:
        """Return the hypotheses as they stand."""


def run(
    method: Method,
    step_fn: StepFn,
    search: SearchState,
) -> SearchState:
    """Advance until every sentence is done."""
    return jax.lax.while_loop(
        lambda search: jnp.any(~search.done),
        lambda search: method.advance(step_fn, search),
        search,
    )


def next_logits(step_fn: StepFn, search: SearchState) -> tuple[Array, State]:
    """Logits [B, K, V] of the next tokens, float32, and the new state."""
    logits, state = step_fn(search.tokens, search.state)
    shape = search.tokens.shape
    fits = logits.ndim == 3 and logits.shape[:2] == shape
    require(fits, "the shape of the logits", logits.shape, f"make step_fn return {[*shape, 'V']}")
    return logits.astype(jnp.float32), state


def apply_constraints(
    method: Method, logits: Array, search: SearchState, sequences: Array
) -> Array:
    """Apply to logits what is asked for each sentence. A prefix overrides everything else."""
    _, min_lengths, prefix, _ = search.request
    constrained = logits
    if min_lengths is not None:
        constrained = delay_eos(constrained, search.steps, min_lengths, method.eos_id)
    if size := method.no_repeat_ngram_size:
        constrained = forbid_repeated_ngrams(constrained, sequences, search.steps, size)
    if prefix is not None:
        constrained = force_prefix(logits, constrained, search.steps, prefix, method.pad_id)
    return constrained


def take(leaf: Array, index: Array) -> Array:
    """leaf[b, index[b, k]] for each b and k: leaf [B, J, …], index [B, K] -> [B, K, …]."""
    return jax.vmap(lambda row, i: row[i])(leaf, index)


def no_hypotheses(batch_size: Any, beam_size: int, max_length: int, pad_id: int) -> BeamResult:
    """Return K slots without a hypothesis for each of B sentences; B may be symbolic."""
    impossible = jnp.full((batch_size, beam_size), -jnp.inf, jnp.float32)
    sequences = jnp.full((batch_size, beam_size, max_length), pad_id, jnp.int32)
    return BeamResult(sequences, impossible, impossible, jnp.zeros(impossible.shape, jnp.int32))


def only_possible(result: BeamResult, pad_id: int) -> BeamResult:
    """Return `result` with nothing but padding in the slots of probability 0."""
    exists = result.log_probs > -jnp.inf
    return result._replace(
        sequences=jnp.where(exists[:, :, None], result.sequences, pad_id),
        lengths=jnp.where(exists, result.lengths, 0),
    )
