"""Beam search with a length penalty (§6.1)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID
from jaxformer.constraints import require_ngram_size
from jaxformer.errors import require
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
    take,
)
from jaxformer.top_k import best_of_chunks, chunk_maxima, in_chunks, log_normalizer

Reorder = Callable[[State, Int[Array, "B K"]], State]
LengthPenalty = Callable[[Any], Any]


def gnmt_length_penalty(alpha: float) -> LengthPenalty:
    """((5 + length) / 6) ** alpha: Wu et al. (2016), eq. 14. The paper's §6.1 uses alpha = 0.6.

    Raises:
      UserError: alpha is below 0.
    """
    require(alpha >= 0, "alpha", alpha, "give 0 (no penalty) or more")
    return jax.tree_util.Partial(_gnmt, alpha)


def power_length_penalty(alpha: float) -> LengthPenalty:
    """Length ** alpha, as in fairseq and Marian; alpha = 1 scores by mean log-probability.

    Raises:
      UserError: alpha is below 0.
    """
    require(alpha >= 0, "alpha", alpha, "give 0 (no penalty) or more")
    return jax.tree_util.Partial(_power, alpha)


def _gnmt(alpha: Any, length: Any) -> Any:
    return ((5 + length) / 6) ** alpha


def _power(alpha: Any, length: Any) -> Any:
    return length**alpha


@partial(jax.tree_util.register_dataclass, data_fields=["divisors"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TabledPenalty:
    """A length penalty looked up in an array, so that one compiled program serves all penalties."""

    divisors: Any  # Float[Array, "T"], or what JAX puts into a pytree in place of arrays

    @classmethod
    def of(cls, penalty: LengthPenalty, size: int) -> "TabledPenalty":
        """Tabulate a penalty for lengths below `size`, each value rounded once, from float64."""
        lengths = np.arange(size, dtype=np.float64)
        with np.errstate(over="ignore"):
            return cls(np.asarray(penalty(lengths), np.float32))

    def __call__(self, lengths: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """Look up the divisor for each length."""
        return jnp.asarray(self.divisors)[lengths.astype(jnp.int32)]


def gather_beams(state: State, beams: Int[Array, "B K"]) -> State:
    """The default `reorder`: beam k of each leaf [B, K, …] becomes what beam beams[b, k] was.

    Leaves [] and [B] have no beams and stay as they are. Any other shape raises UserError,
    rather than being taken for shared state or, where an axis happens to be K long, being mixed up.
    """

    def gather(leaf: Array) -> Array:
        fits = leaf.shape in ((), beams.shape[:1]) or leaf.shape[:2] == beams.shape
        require(
            fits, "the shape of a state leaf", leaf.shape, "make it [B, K, …], or pass reorder="
        )
        return take(leaf, beams) if leaf.ndim >= 2 else leaf

    return jax.tree.map(gather, state)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["length_penalty", "bonus"],
    meta_fields=[
        "beam_size",
        "n_best",
        "early_stopping",
        "no_repeat_ngram_size",
        "reorder",
        "bos_id",
        "eos_id",
        "pad_id",
    ],
)
@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """The K best sequences that beam search finds (§6.1).

    A step ranks all one-token extensions of the K live beams by log-probability and looks at the
    best 2K. Those that end in eos join the K best finished hypotheses, ranked by score; the K best
    others live on, so eos never narrows the beam. With `beam_size` 1 a step looks at the best one
    only, which makes it greedy search. Ties go to the lower beam, then to the lower token id.

    A sentence is done at its length limit, or as soon as no live beam can enter its M best finished
    hypotheses: log-probabilities only fall, so the best score a beam can still reach is its current
    log-probability over the penalty at the sentence's limit. With `early_stopping` it is also done
    when K hypotheses have finished, and only an eos among the best K of a step finishes one, as in
    fairseq, CTranslate2 and Hugging Face's `early_stopping=True`: fewer steps, no guarantee.

    Finished hypotheses rank before unfinished ones; live beams cut off at the limit, scored like
    the rest, only make up the number where fewer than M have finished.

    To `jax.jit` it is a pytree of the numbers in `length_penalty` and `bonus`, if they are pytrees.

    Attributes:
      beam_size: K.
      n_best: M, how many are returned: the same as with a larger M, in fewer steps; None is all K.
      length_penalty: float32 lengths -> divisors, positive from length 1 on, non-decreasing.
      early_stopping: see above.
      no_repeat_ngram_size: n-grams of this many tokens occur once in a hypothesis; 0 is no limit.
      bonus: state -> [B, K], not above 0, added to the score of a hypothesis (a coverage penalty).
      reorder: (state, beams [B, K]) -> the state in which beam k continues what was beam
        beams[b, k]. Not called if K is 1.
      bos_id, eos_id, pad_id: first input, end and padding of the sequences.
    """

    beam_size: int
    n_best: int | None = None
    length_penalty: LengthPenalty = dataclasses.field(
        default_factory=lambda: gnmt_length_penalty(0.6)
    )
    early_stopping: bool = False
    no_repeat_ngram_size: int = 0
    bonus: Callable[[State], Float[Array, "B K"]] | None = None
    reorder: Reorder = gather_beams
    bos_id: int = BOS_ID
    eos_id: int = EOS_ID
    pad_id: int = PAD_ID

    def __post_init__(self) -> None:
        require(self.beam_size >= 1, "beam_size", self.beam_size, "give 1 or more")
        fits = self.n_best is None or 1 <= self.n_best <= self.beam_size
        require(fits, "n_best", self.n_best, f"give 1 to {self.beam_size}, or None for all")
        require_ngram_size(self.no_repeat_ngram_size)

    @property
    def num_beams(self) -> int:
        """K."""
        return self.beam_size

    def start(self, request: Request, max_length: int, state: State) -> SearchState:
        """A search with nothing generated yet and room for `max_length` tokens."""
        batch_size = request.max_lengths.shape[0]
        none = no_hypotheses(batch_size, self.beam_size, max_length, self.pad_id)
        # All beams start equal, so only the first may live, or the beam would hold K copies of it.
        first = jnp.arange(self.beam_size) == 0
        start = jnp.where(jnp.broadcast_to(first, none.scores.shape), 0.0, none.scores)
        return SearchState(
            done=request.max_lengths <= 0,
            steps=jnp.zeros(batch_size, jnp.int32),
            tokens=jnp.full((batch_size, self.beam_size), self.bos_id, jnp.int32),
            hypotheses=(none._replace(scores=start, log_probs=start), none),
            request=request,
            state=state,
        )

    def advance(self, step_fn: StepFn, search: SearchState) -> SearchState:
        """Extend every live beam by one token."""
        return self._advance(step_fn, search, self.beam_size)

    def first(self, step_fn: StepFn, search: SearchState) -> SearchState:
        """`advance` right after `start`, with a state of one beam: as all are equal, one is enough.

        `reorder` expands that state to K beams. The vocabulary must have at least 2K tokens.
        """
        return self._advance(step_fn, search, 1)

    def _advance(self, step_fn: StepFn, search: SearchState, num_live: int) -> SearchState:
        all_live, old_finished = search.hypotheses
        old_live = jax.tree.map(lambda leaf: leaf[:, :num_live], all_live)
        tokens = search.tokens[:, :num_live]
        logits, state = next_logits(step_fn, search._replace(tokens=tokens))
        normalizer = log_normalizer(logits)
        logits = apply_constraints(self, logits, search, old_live.sequences)
        # With K = 1 a second candidate would outlive the first's eos and could still win by length.
        num_candidates = 2 * self.beam_size if self.beam_size > 1 else 1
        log_probs, beams, tokens = best_extensions(
            old_live.log_probs, logits, normalizer, num_candidates
        )
        positions = jnp.arange(old_live.sequences.shape[2], dtype=jnp.int32)
        sequences = jnp.where(
            positions[None, None] == search.steps[:, None, None],
            tokens[:, :, None],
            take(old_live.sequences, beams),
        )
        steps = search.steps + 1
        lengths = jnp.broadcast_to(steps[:, None], tokens.shape)
        scores = self._normalize(log_probs, lengths)
        if self.bonus is not None:
            scores += take(self.bonus(state), beams)
        candidates = BeamResult(sequences, scores, log_probs, lengths)
        ended = tokens == self.eos_id
        counted = ended & (jnp.arange(ended.shape[1])[None] < self.beam_size)

        live, kept = _best(_only(candidates, ~ended), self.beam_size, by="log_probs")
        beams, tokens = take(beams, kept), take(tokens, kept)
        # Older hypotheses come first and so win ties, as the stop rule below assumes.
        ends = _only(candidates, counted if self.early_stopping else ended)
        finished, _ = _best(_concat(old_finished, ends), self.beam_size, by="scores")
        if self.beam_size > 1:
            state = self.reorder(state, beams)

        def unless_done(old: Array, new: Array) -> Array:
            return jnp.where(jnp.expand_dims(search.done, range(1, old.ndim)), old, new)

        frozen = search.tokens, all_live, old_finished
        tokens, live, finished = jax.tree.map(unless_done, frozen, (tokens, live, finished))
        limits = search.request.max_lengths
        in_reach = self._normalize(live.log_probs[:, 0], limits)
        enough = finished.scores[:, self._num_returned - 1] >= in_reach
        if self.early_stopping:
            enough |= finished.scores[:, -1] > -jnp.inf
        done = search.done | (steps >= limits) | enough
        steps = jnp.where(search.done, search.steps, steps)
        return SearchState(done, steps, tokens, (live, finished), search.request, state)

    def result(self, search: SearchState) -> BeamResult:
        """The hypotheses, best first."""
        live, finished = search.hypotheses
        live, _ = _best(live, self.beam_size, by="scores")  # a bonus may reorder them
        slots = jnp.arange(self._num_returned, dtype=jnp.int32)[None, :]
        num_finished = jnp.sum(finished.scores > -jnp.inf, axis=1, dtype=jnp.int32)[:, None]
        order = jnp.where(slots < num_finished, slots, self.beam_size + slots - num_finished)
        ranked = _concat(finished, live)
        ranked = jax.tree.map(lambda leaf: take(leaf, order), ranked)
        return only_possible(ranked, self.pad_id)

    @property
    def _num_returned(self) -> int:
        return self.n_best or self.beam_size

    def _normalize(self, log_probs: Array, lengths: Array) -> Array:
        return log_probs / self.length_penalty(lengths.astype(jnp.float32))


def best_extensions(
    log_probs: Float[Array, "B K"],
    logits: Float[Array, "B K V"],
    normalizer: Float[Array, "B K 1"],
    count: int,
) -> tuple[Float[Array, "B C"], Int[Array, "B C"], Int[Array, "B C"]]:
    """The best one-token extensions of all beams of each sentence.

    Args:
      log_probs: of the beams, float32.
      logits, normalizer: of the next token, whose log-probabilities are their difference.
      count: C, how many, or all K · V if that is fewer.

    Returns:
      Log-probabilities, beams and tokens of the extensions, best first; ties go to the lower beam,
      then to the lower token.
    """
    batch_size, beam_size, vocab_size = logits.shape
    chunks = in_chunks(logits)
    if chunks.shape[2] < 2 * count:
        totals = log_probs[:, :, None] + (logits - normalizer)
        totals = totals.reshape(batch_size, beam_size * vocab_size)
        totals, flat = jax.lax.top_k(totals, min(count, beam_size * vocab_size))
        return totals, flat // vocab_size, flat % vocab_size
    _, _, num_chunks, chunk = chunks.shape

    def score(values: Array, chosen: Array) -> Array:
        # Rounding keeps their order: the larger logit never gets the smaller log-probability.
        beams = chosen // num_chunks
        return take(log_probs, beams)[:, :, None] + (values - take(normalizer, beams))

    rows = chunks.reshape(batch_size, beam_size * num_chunks, chunk)
    maxima = chunk_maxima(chunks).reshape(batch_size, beam_size * num_chunks)
    totals, chosen, place = best_of_chunks(rows, maxima, count, score)
    return totals, chosen // num_chunks, chosen % num_chunks * chunk + place


def _best(hypotheses: BeamResult, count: int, *, by: str) -> tuple[BeamResult, Array]:
    """The `count` hypotheses with the highest `by`, best first, and their indices [B, count]."""
    _, index = jax.lax.top_k(getattr(hypotheses, by), count)
    return jax.tree.map(lambda leaf: take(leaf, index), hypotheses), index


def _only(hypotheses: BeamResult, mask: Array) -> BeamResult:
    """Make hypotheses outside the mask [B, M] impossible."""
    return hypotheses._replace(
        scores=jnp.where(mask, hypotheses.scores, -jnp.inf),
        log_probs=jnp.where(mask, hypotheses.log_probs, -jnp.inf),
    )


def _concat(first: BeamResult, second: BeamResult) -> BeamResult:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)
