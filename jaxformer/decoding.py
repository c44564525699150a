"""Greedy search, beam search and sampling, over a step function and hence over any model.

    step_fn(tokens [B, K], state) -> (logits [B, K, V], state)

`tokens` holds the last token of each hypothesis (bos at first), `logits` the scores of the next
one, and `state` whatever the model remembers between the two: any pytree. Every id of the
vocabulary may be generated; to forbid one, let `step_fn` set its logit to -inf.

The *length* of a hypothesis counts its tokens with eos and without bos, everywhere: in the length
penalty, in the limits and in `BeamResult.lengths`.

`beam_search`, `greedy_search` and `sample` are each one `lax.while_loop` of static shapes that ends
as soon as every sentence is done. They do not compile themselves: call them inside `jax.jit`. No
sentence's result depends on the others in its batch, nor on whether `step_fn` runs on after it is
done. To act between steps, as `jaxformer.continuous_batching` does to begin new sentences in the
rows of those that are done, use the parts they are made of: a `BeamSearch` or a `Sampling`, with
its `start` and `advance`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxformer.beam import BeamSearch
from jaxformer.errors import require
from jaxformer.sampling import Sampling, fold_in_rows
from jaxformer.search import BeamResult, Request, State, StepFn, run


def beam_search(
    step_fn: StepFn,
    init_state: State,
    *,
    batch_size: int,
    beam_size: int,
    max_length: int,
    length_limits: Int[Array, "B"] | None = None,
    min_lengths: Int[Array, "B"] | None = None,
    prefix: Int[Array, "B P"] | None = None,
    **options: Any,
) -> BeamResult:
    """The K best sequences that `BeamSearch` finds, best first.

    Args:
      step_fn: see the module's docstring. Logits of any float type; scores are float32.
      init_state: `step_fn`'s first state, with K equal beams per sentence.
      batch_size, beam_size: B and K.
      max_length: T, the most tokens of a hypothesis, eos counted; static.
      length_limits: such a limit for each sentence, clipped to 0 … T. A sentence with limit 0 costs
        no step and has one hypothesis: empty, unfinished, of score 0. None means T for all.
      min_lengths: the fewest tokens of each sentence's hypotheses, eos counted; if above its limit,
        none of them can end.
      prefix: the tokens each sentence's hypotheses begin with, followed by `pad_id`. They count
        towards log-probabilities and lengths.
      **options: `BeamSearch`'s other attributes.

    Raises:
      UserError: for sizes below their minimum, or shapes that do not fit them.
    """
    method = BeamSearch(beam_size, **options)
    penalty = method.length_penalty
    require(callable(penalty), "length_penalty", penalty, "wrap it in gnmt_length_penalty")
    request = _request(batch_size, max_length, length_limits, min_lengths, prefix)
    search = run(method, step_fn, method.start(request, max_length, init_state))
    return method.result(search)


def greedy_search(
    step_fn: StepFn, init_state: State, *, batch_size: int, max_length: int, **options: Any
) -> BeamResult:
    """The most probable token at each step until eos: `beam_search` with one beam, K = 1.

    `options` are `beam_search`'s other arguments, except `beam_size`.
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
    length_limits: Int[Array, "B"] | None = None,
    min_lengths: Int[Array, "B"] | None = None,
    prefix: Int[Array, "B P"] | None = None,
    **options: Any,
) -> BeamResult:
    """Sequences that `Sampling` draws, K = `num_samples` per sentence.

    Args:
      rng: a key, old or new style; a sentence's own key is this one with its row folded in.
      **options: `Sampling`'s attributes.
      Others: as for `beam_search`, with one state per sample, which is never reordered.

    Returns:
      BeamResult whose log_probs are the model's own, at temperature 1 over the whole vocabulary,
      and whose scores equal them. Samples cut off at the limit have no eos.

    Raises:
      UserError: for arguments out of their ranges, or shapes that do not fit the sizes.
    """
    method = Sampling(**options)
    request = _request(batch_size, max_length, length_limits, min_lengths, prefix)
    request = request._replace(keys=fold_in_rows(rng, jnp.arange(batch_size, dtype=jnp.int32)))
    search = run(method, step_fn, method.start(request, max_length, init_state))
    return method.result(search)


def _request(
    batch_size: int,
    max_length: int,
    length_limits: Array | None,
    min_lengths: Array | None,
    prefix: Array | None,
) -> Request:
    """Check the arguments that the searches have in common, and make a `Request` of them."""
    require(batch_size >= 1, "batch_size", batch_size, "give 1 or more")
    require(max_length >= 0, "max_length", max_length, "give 0 or more")

    def checked(name: str, array: Any, ndim: int) -> Any:
        if array is None:
            return None
        array = jnp.asarray(array)
        fits = array.ndim == ndim and array.shape[0] == batch_size and array.size > 0
        fix = f"make it [{batch_size}{', P' * (ndim == 2)}]"
        require(fits, f"the shape of {name}", array.shape, fix)
        return array

    limits = checked("length_limits", length_limits, 1)
    if limits is None:
        limits = jnp.full(batch_size, max_length, jnp.int32)
    limits = jnp.clip(limits, 0, max_length).astype(jnp.int32)
    return Request(limits, checked("min_lengths", min_lengths, 1), checked("prefix", prefix, 2))
