"""Greedy search, beam search and sampling, over a step function and so over any model.

    step_fn(tokens [B, K], state) -> (logits [B, K, V], state)

`tokens` holds the last token of each hypothesis (bos at first), `logits` the scores of the next
one, and `state` whatever the model remembers between the two: any pytree. Every id of the
vocabulary may be generated; to forbid one, let `step_fn` set its logit to -inf.

The *length* of a hypothesis counts its tokens with eos and without bos, everywhere: in the length
penalty, in the limits and in `BeamResult.lengths`.

All three searches are one `lax.while_loop` of static shapes that ends as soon as every sentence is
done. They do not compile themselves: call them inside `jax.jit`. No sentence's result depends on
the others in its batch, nor on whether `step_fn` runs on after it is done.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID

State = Any
StepFn = Callable[[Int[Array, "B K"], State], tuple[Float[Array, "B K V"], State]]
Reorder = Callable[[State, Int[Array, "B K"]], State]
LengthPenalty = Callable[[Any], Any]


class BeamResult(NamedTuple):
    """K hypotheses for each of B sentences.

    A slot for which no hypothesis exists (there are fewer than K of non-zero probability) has
    scores and log_probs -inf, length 0 and nothing but padding.
    """

    sequences: Int[Array, "B K T"]  # without bos; eos last if finished, then padding
    scores: Float[Array, "B K"]  # log_probs / length penalty, float32
    log_probs: Float[Array, "B K"]  # summed over the tokens with eos, natural logarithm, float32
    lengths: Int[Array, "B K"]  # tokens, eos counted


def _require(condition: bool, name: str, value: object, fix: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}: {fix}")


def gnmt_length_penalty(alpha: float) -> LengthPenalty:
    """((5 + length) / 6) ** alpha: Wu et al. (2016), eq. 14. The paper's §6.1 uses alpha = 0.6."""
    _require(alpha >= 0, "alpha", alpha, "use 0 (no penalty) or more")
    return lambda length: ((5 + length) / 6) ** alpha


def power_length_penalty(alpha: float) -> LengthPenalty:
    """Length ** alpha: fairseq and Marian. With alpha = 1 the score is the mean log-probability."""
    _require(alpha >= 0, "alpha", alpha, "use 0 (no penalty) or more")
    return lambda length: length**alpha


_PAPER_LENGTH_PENALTY = gnmt_length_penalty(0.6)


def gather_beams(state: State, beams: Int[Array, "B K"]) -> State:
    """The default `reorder`: beam k of each leaf [B, K, …] becomes what beam beams[b, k] was.

    Leaves [] and [B] have no beams and stay. Any other shape raises ValueError rather than be
    taken for shared or, where an axis happens to be K long, be mixed up.
    """

    def gather(leaf: Array) -> Array:
        fits = leaf.ndim < 2 or leaf.shape[:2] == beams.shape
        _require(
            fits, "the shape of a state leaf", leaf.shape, "make it [B, K, …], or pass reorder="
        )
        return _take(leaf, beams) if leaf.ndim >= 2 else leaf

    return jax.tree.map(gather, state)


class _Search(NamedTuple):
    """What beam search carries from one step to the next."""

    step: Int[Array, ""]  # tokens generated so far
    done: Bool[Array, "B"]
    tokens: Int[Array, "B K"]  # the live beams' last tokens
    live: BeamResult  # without eos, best first
    finished: BeamResult  # with eos, best first
    state: State


def beam_search(
    step_fn: StepFn,
    init_state: State,
    *,
    batch_size: int,
    beam_size: int,
    max_length: int,
    length_limits: Int[Array, "B"] | None = None,
    length_penalty: LengthPenalty = _PAPER_LENGTH_PENALTY,
    reorder: Reorder = gather_beams,
    bos_id: int = BOS_ID,
    eos_id: int = EOS_ID,
    pad_id: int = PAD_ID,
) -> BeamResult:
    """The K best sequences that beam search finds, best first (§6.1).

    A step ranks all one-token extensions of the K live beams by log-probability and looks at the
    best 2K. Those that end in eos join the K best finished hypotheses, ranked by score; the K best
    others live on, so eos never narrows the beam. With `beam_size` 1 a step looks at the best one
    only, which makes it greedy search. Ties go to the lower beam, then to the lower token id.

    A sentence is done at its length limit, or as soon as no live beam can enter its K finished
    ones: log-probabilities only fall, so the best score in reach of a beam is its log-probability
    now over the penalty at the sentence's limit. Finished hypotheses rank before unfinished ones;
    live beams cut off at the limit, scored like the rest, only fill up the K when too few finished.

    Args:
      step_fn: see the module's docstring. Logits of any float type; scores are float32.
      init_state: `step_fn`'s first state, with K equal beams per sentence.
      batch_size, beam_size: B and K.
      max_length: T, the most tokens of a hypothesis, eos among them; static.
      length_limits: the same for each sentence, cut to 0 … T. A sentence of limit 0 costs no step
        and has one hypothesis, the empty one, unfinished, of score 0. None means T for all.
      length_penalty: float32 lengths -> divisors, positive from length 1 on, that never fall.
      reorder: (state, beams [B, K]) -> the state in which beam k continues what was beam
        beams[b, k]. Not called if K is 1.
      bos_id, eos_id, pad_id: first input, end and filling of the sequences.

    Raises:
      ValueError: for sizes below their minimum, or shapes that do not fit them.
    """
    _require(beam_size >= 1, "beam_size", beam_size, "use 1 or more")
    limits = _limits(length_limits, batch_size, max_length)
    # A second candidate would outlive an eos of the first and could still win by its length.
    num_candidates = 2 * beam_size if beam_size > 1 else 1
    slots = jnp.arange(beam_size, dtype=jnp.int32)[None, :]
    positions = jnp.arange(max_length, dtype=jnp.int32)[None, None, :]

    def normalize(log_probs: Array, lengths: Array) -> Array:
        return log_probs / length_penalty(lengths.astype(jnp.float32))

    def advance(search: _Search) -> _Search:
        logits, state = step_fn(search.tokens, search.state)
        _check_logits(logits, (batch_size, beam_size))
        log_probs, beams, tokens = _extend(search.live.log_probs, logits, num_candidates)
        sequences = jnp.where(
            positions == search.step, tokens[:, :, None], _take(search.live.sequences, beams)
        )
        lengths = jnp.full_like(tokens, search.step + 1)
        candidates = BeamResult(sequences, normalize(log_probs, lengths), log_probs, lengths)
        ended = tokens == eos_id

        live, kept = _best(_only(candidates, ~ended), beam_size)
        beams, tokens = _take(beams, kept), _take(tokens, kept)
        # Older hypotheses come first and so win ties, as the stop rule below assumes.
        finished, _ = _best(_concat(search.finished, _only(candidates, ended)), beam_size)
        if beam_size > 1:
            state = reorder(state, beams)

        def unless_done(old: Array, new: Array) -> Array:
            return jnp.where(jnp.expand_dims(search.done, range(1, old.ndim)), old, new)

        frozen = search.tokens, search.live, search.finished
        tokens, live, finished = jax.tree.map(unless_done, frozen, (tokens, live, finished))
        in_reach = normalize(live.log_probs[:, 0], limits)
        step = search.step + 1
        done = search.done | (step >= limits) | (finished.scores[:, -1] >= in_reach)
        return _Search(step, done, tokens, live, finished, state)

    none = _no_hypotheses(batch_size, beam_size, max_length, pad_id)
    # All beams start equal, so only the first may live, or the beam would hold K copies of it.
    start = jnp.where(jnp.broadcast_to(slots == 0, none.scores.shape), 0.0, none.scores)
    search = _Search(
        step=jnp.int32(0),
        done=limits <= 0,
        tokens=jnp.full((batch_size, beam_size), bos_id, jnp.int32),
        live=none._replace(scores=start, log_probs=start),
        finished=none,
        state=init_state,
    )
    search = jax.lax.while_loop(lambda search: ~jnp.all(search.done), advance, search)

    num_finished = jnp.sum(search.finished.scores > -jnp.inf, axis=1, dtype=jnp.int32)[:, None]
    order = jnp.where(slots < num_finished, slots, beam_size + slots - num_finished)
    ranked = _concat(search.finished, search.live)
    ranked = jax.tree.map(lambda leaf: _take(leaf, order), ranked)
    exists = ranked.log_probs > -jnp.inf
    return ranked._replace(
        sequences=jnp.where(exists[:, :, None], ranked.sequences, pad_id),
        lengths=jnp.where(exists, ranked.lengths, 0),
    )


def greedy_search(
    step_fn: StepFn, init_state: State, *, batch_size: int, max_length: int, **options: Any
) -> BeamResult:
    """The most probable token at each step until eos: `beam_search` with one beam, K = 1.

    Takes `beam_search`'s other arguments, all but `beam_size`, as `options`.
    """
    return beam_search(
        step_fn, init_state, batch_size=batch_size, beam_size=1, max_length=max_length, **options
    )


def sample(
    step_fn: StepFn,
    init_state: State,
    rng: Array,
    *,
    batch_size: int,
    max_length: int,
    num_samples: int = 1,
    length_limits: Int[Array, "B"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    bos_id: int = BOS_ID,
    eos_id: int = EOS_ID,
    pad_id: int = PAD_ID,
) -> BeamResult:
    """Sequences drawn token by token, K = `num_samples` a sentence, in the order drawn.

    The logits are divided by the temperature, then only the `top_k` best are kept, then the
    smallest set of the best that holds `top_p` of what is left (Holtzman et al. 2020). The noise
    of a token follows from the key, the sentence's row in the batch and the step alone.

    Args:
      rng: a key, old or new style.
      temperature: below 1 sharpens, above 1 flattens; 0 is greedy search.
      top_k: tokens to choose from, of equal ones the lower ids; None is all, 1 is greedy search.
      top_p: probability to choose from, above 0 up to 1, at least the best token; None is all.
      Others: as for `beam_search`, with one state per sample. It is never reordered.

    Returns:
      BeamResult whose log_probs are the model's own, at temperature 1 over the whole vocabulary,
      and whose scores equal them. Samples cut off at the limit have no eos.

    Raises:
      ValueError: for arguments out of the ranges above, or shapes that do not fit the sizes.
    """
    _require(num_samples >= 1, "num_samples", num_samples, "use 1 or more")
    _require(temperature >= 0, "temperature", temperature, "use 0 (greedy) or more")
    _require(top_k is None or top_k >= 1, "top_k", top_k, "use 1 or more, or None for all tokens")
    _require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "use more than 0, at most 1, or None")
    limits = _limits(length_limits, batch_size, max_length)
    positions = jnp.arange(max_length, dtype=jnp.int32)[None, None, :]
    rows = jnp.arange(batch_size, dtype=jnp.int32)
    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, rows)
    shape = (batch_size, num_samples)

    def draw(logits: Array, step: Array) -> Array:
        vocab_size = logits.shape[-1]
        keep = min(top_k or vocab_size, vocab_size) if temperature > 0 else 1
        if keep < vocab_size or top_p is not None:
            logits, ids = _top_k(logits, keep)
        else:
            ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)  # all of them, unsorted
        logits = logits / (temperature or 1.0)
        if top_p is not None:
            probs = jax.nn.softmax(logits, axis=-1)
            better = jnp.cumsum(probs, axis=-1) - probs  # what the tokens before this one hold
            logits = jnp.where(better < top_p, logits, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, step)
        choice = jax.vmap(jax.random.categorical)(keys, logits)
        return jnp.take_along_axis(ids, choice[:, :, None], axis=-1)[:, :, 0]

    def advance(carry: tuple) -> tuple:
        step, done, tokens, (sequences, log_probs, _, lengths), state = carry
        logits, state = step_fn(tokens, state)
        _check_logits(logits, shape)
        logits = logits.astype(jnp.float32)
        tokens = jnp.where(done, tokens, draw(logits, step))
        chosen = jnp.take_along_axis(logits, tokens[:, :, None], axis=-1)
        gains = (chosen - _log_normalizer(logits))[:, :, 0]
        log_probs = jnp.where(done, log_probs, log_probs + gains)
        here = (positions == step) & ~done[:, :, None]
        sequences = jnp.where(here, tokens[:, :, None], sequences)
        lengths = jnp.where(done, lengths, step + 1)
        done = done | (tokens == eos_id) | (step + 1 >= limits)[:, None]
        return step + 1, done, tokens, BeamResult(sequences, log_probs, log_probs, lengths), state

    none = _no_hypotheses(*shape, max_length, pad_id)
    zeros = jnp.zeros(shape, jnp.float32)
    drawn = none._replace(scores=zeros, log_probs=zeros)
    done = jnp.broadcast_to((limits <= 0)[:, None], shape)
    carry = (jnp.int32(0), done, jnp.full(shape, bos_id, jnp.int32), drawn, init_state)
    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[1]), advance, carry)[3]


def _extend(log_probs: Array, logits: Array, count: int) -> tuple[Array, Array, Array]:
    """The `count` best one-token extensions of all beams, or all that exist if they are fewer.

    Args: log_probs [B, K] of the beams, logits [B, K, V] of their next tokens.
    Returns: log_probs, beams and tokens of the extensions, each [B, count], best first.
    """
    logits = logits.astype(jnp.float32)
    # The best tokens of a beam are those of the largest logits: no [B, K, V] of log-probabilities.
    values, tokens = _top_k(logits, min(count, logits.shape[-1]))
    batch_size, beam_size, per_beam = values.shape
    totals = log_probs[:, :, None] + (values - _log_normalizer(logits))
    totals = totals.reshape(batch_size, -1)
    totals, flat = jax.lax.top_k(totals, min(count, beam_size * per_beam))
    return totals, flat // per_beam, _take(tokens.reshape(batch_size, -1), flat)


def _top_k(values: Array, k: int, chunk: int = 64) -> tuple[Array, Array]:
    """`lax.top_k` over the last axis of [B, K, V], bit for bit, several times faster on CPU.

    Only the k chunks of the largest maxima can hold the k largest: an element of any other chunk
    has k chunks before it, each with a value at least as large (and, if equal, at a lower index).
    """
    size = values.shape[-1]
    if size < 2 * k * chunk:
        top, index = jax.lax.top_k(values, k)
        return top, index
    padding = [(0, 0), (0, 0), (0, -size % chunk)]
    chunks = jnp.pad(values, padding, constant_values=-jnp.inf)
    chunks = chunks.reshape(*values.shape[:2], -1, chunk)
    _, best = jax.lax.top_k(jnp.max(chunks, axis=-1), k)
    best = jnp.sort(best, axis=-1)  # back in order of index, for the ties
    found = jnp.take_along_axis(chunks, best[:, :, :, None], axis=2)
    top, flat = jax.lax.top_k(found.reshape(*values.shape[:2], -1), k)
    return top, jnp.take_along_axis(best, flat // chunk, axis=-1) * chunk + flat % chunk


def _log_normalizer(logits: Array) -> Array:
    """Log-sum-exp over the last axis, kept; 0 where all are -inf, whose log-probs stay -inf."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(total), total, 0.0)


def _take(leaf: Array, index: Array) -> Array:
    """leaf[b, index[b, k]] for each b and k: leaf [B, N, …], index [B, K] -> [B, K, …]."""
    return jax.vmap(lambda row, i: row[i])(leaf, index)


def _best(hypotheses: BeamResult, count: int) -> tuple[BeamResult, Array]:
    """The `count` of the highest scores, best first, and their indices [B, count]."""
    _, index = jax.lax.top_k(hypotheses.scores, count)
    return jax.tree.map(lambda leaf: _take(leaf, index), hypotheses), index


def _only(hypotheses: BeamResult, mask: Array) -> BeamResult:
    """Hypotheses outside the mask [B, N] become impossible."""
    return hypotheses._replace(
        scores=jnp.where(mask, hypotheses.scores, -jnp.inf),
        log_probs=jnp.where(mask, hypotheses.log_probs, -jnp.inf),
    )


def _concat(first: BeamResult, second: BeamResult) -> BeamResult:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def _no_hypotheses(batch_size: int, beam_size: int, max_length: int, pad_id: int) -> BeamResult:
    impossible = jnp.full((batch_size, beam_size), -jnp.inf, jnp.float32)
    sequences = jnp.full((batch_size, beam_size, max_length), pad_id, jnp.int32)
    return BeamResult(sequences, impossible, impossible, jnp.zeros(impossible.shape, jnp.int32))


def _limits(length_limits: Array | None, batch_size: int, max_length: int) -> Array:
    """Each sentence's length limit, int32 [B]."""
    _require(batch_size >= 1, "batch_size", batch_size, "use 1 or more")
    _require(max_length >= 0, "max_length", max_length, "use 0 or more")
    if length_limits is None:
        return jnp.full(batch_size, max_length, jnp.int32)
    fits = length_limits.shape == (batch_size,)
    _require(fits, "the shape of length_limits", length_limits.shape, f"make it [{batch_size}]")
    return jnp.clip(length_limits, 0, max_length).astype(jnp.int32)


def _check_logits(logits: Array, shape: tuple[int, int]) -> None:
    fits = logits.ndim == 3 and logits.shape[:2] == shape
    _require(fits, "the shape of the logits", logits.shape, f"make step_fn return {[*shape, 'V']}")
