"""Sampling with a temperature, from the k best tokens or the best that hold probability p."""

import dataclasses
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID
from jaxformer.constraints import require_ngram_size
from jaxformer.errors import UserError, require
from jaxformer.search import (
    BeamResult,
    Request,
    SearchState,
    State,
    StepFn,
    apply_constraints,
    next_logits,
    no_hypotheses,
    only_possible,
)
from jaxformer.top_k import log_normalizer, top_k


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p"],
    meta_fields=["num_samples", "top_k", "no_repeat_ngram_size", "bos_id", "eos_id", "pad_id"],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sequences drawn token by token, `num_samples` (K) per sentence, in the order drawn.

    The logits are divided by the temperature, then only the `top_k` best are kept, then the
    smallest set of the best that holds `top_p` of the remaining probability (Holtzman et al. 2020).
    The noise of a token depends only on the sentence's key, the step and the sample's number.

    To `jax.jit` it is a pytree of `temperature` and `top_p`, which are not checked when traced.

    Attributes:
      num_samples: K.
      temperature: below 1 sharpens, above 1 flattens; 0 is greedy search.
      top_k: how many tokens to choose from, the lower ids first if equal; None: all, 1: greedy.
      top_p: probability to choose from, above 0 up to 1; the best token always stays. None: all.
      no_repeat_ngram_size, bos_id, eos_id, pad_id: as for `BeamSearch`.
    """

    num_samples: int = 1
    temperature: float | Float[Array, ""] = 1.0
    top_k: int | None = None
    top_p: float | Float[Array, ""] | None = None
    no_repeat_ngram_size: int = 0
    bos_id: int = BOS_ID
    eos_id: int = EOS_ID
    pad_id: int = PAD_ID

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, "num_samples", self.num_samples, "give 1 or more")
        check_sampling(self.temperature, self.top_k, self.top_p)
        require_ngram_size(self.no_repeat_ngram_size)

    @property
    def num_beams(self) -> int:
        """K."""
        return self.num_samples

    def start(self, request: Request, max_length: int, state: State) -> SearchState:
        """Return the initial state, with room for `max_length` tokens."""
        shape = request.max_lengths.shape[0], self.num_samples
        none = no_hypotheses(*shape, max_length, self.pad_id)
        zeros = jnp.zeros(shape, jnp.float32)
        done = request.max_lengths <= 0
        return SearchState(
            done=done,
            steps=jnp.zeros(shape[0], jnp.int32),
            tokens=jnp.full(shape, self.bos_id, jnp.int32),
            hypotheses=(
                none._replace(scores=zeros, log_probs=zeros),
                jnp.broadcast_to(done[:, None], shape),
            ),
            request=request,
            state=state,
        )

    def advance(self, step_fn: StepFn, search: SearchState) -> SearchState:
        """Draw one more token for every sample that has not ended."""
        (sequences, log_probs, _, lengths), ended = search.hypotheses
        steps = search.steps + 1
        logits, state = next_logits(step_fn, search)
        normalizer = log_normalizer(logits)
        logits = apply_constraints(self, logits, search, sequences)
        tokens = jnp.where(ended, search.tokens, self._draw(logits, search))
        chosen = jnp.take_along_axis(logits, tokens[:, :, None], axis=-1)
        gains = (chosen - normalizer)[:, :, 0]
        log_probs = jnp.where(ended, log_probs, log_probs + gains)
        positions = jnp.arange(sequences.shape[2], dtype=jnp.int32)
        here = (positions[None, None] == search.steps[:, None, None]) & ~ended[:, :, None]
        sequences = jnp.where(here, tokens[:, :, None], sequences)
        lengths = jnp.where(ended, lengths, steps[:, None])
        at_limit = steps >= search.request.max_lengths
        ended = ended | (tokens == self.eos_id) | at_limit[:, None]
        drawn = BeamResult(sequences, log_probs, log_probs, lengths)
        done = jnp.all(ended, axis=1)
        steps = jnp.where(search.done, search.steps, steps)
        return SearchState(done, steps, tokens, (drawn, ended), search.request, state)

    def result(self, search: SearchState) -> BeamResult:
        """The samples; their log_probs and scores are the model's own, at temperature 1."""
        return only_possible(search.hypotheses[0], self.pad_id)

    def _draw(self, logits: Array, search: SearchState) -> Array:
        vocab_size = logits.shape[-1]
        greedy = isinstance(self.temperature, Real) and self.temperature == 0
        keep = 1 if greedy else min(self.top_k or vocab_size, vocab_size)
        if keep < vocab_size or self.top_p is not None:
            logits, ids = top_k(logits, keep)
        else:
            ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)  # all of them, unsorted
        if not greedy:
            logits = logits / self.temperature
        if self.top_p is not None:
            probs = jax.nn.softmax(logits, axis=-1)
            better = jnp.cumsum(probs, axis=-1) - probs  # held by the tokens before this one
            logits = jnp.where(better < self.top_p, logits, -jnp.inf)
        if search.request.keys is None:
            raise UserError("sentences have no keys to draw with: give one for each")
        keys = jax.vmap(jax.random.fold_in)(search.request.keys, search.steps)
        keys = jax.vmap(fold_in_rows, in_axes=(0, None))(
            keys, jnp.arange(self.num_samples, dtype=jnp.int32)
        )
        choice = jax.vmap(jax.vmap(jax.random.categorical))(keys, logits)
        return jnp.take_along_axis(ids, choice[:, :, None], axis=-1)[:, :, 0]


def check_sampling(temperature: Any, top_k: int | None, top_p: Any) -> None:
    """Raise `UserError` for impossible options; arrays pass unchecked, as they may be traced."""
    if isinstance(temperature, Real):
        fits = temperature == 0 or 1e-30 <= float(temperature) <= 1e30  # float32 can divide by it
        require(fits, "temperature", temperature, "give 0, or 1e-30 to 1e30")
    require(top_k is None or top_k >= 1, "top_k", top_k, "give at least 1")
    if isinstance(top_p, Real):
        require(0 < float(top_p) <= 1, "top_p", top_p, "give more than 0, at most 1")


def fold_in_rows(rng: Array, numbers: Int[Array, "B"]) -> Array:
    """A key for each number."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, numbers)
