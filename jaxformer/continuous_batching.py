"""One compiled search of many sentences in a few rows: when one is done, the next takes its row."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxformer.generation import Limits, make_step_fn, prefill, start_search
from jaxformer.search import BeamResult, Method, SearchState
from jaxformer.transformer import Transformer

# The inputs of a search: source_ids, prefix and keys, as `generate` takes them.
Sources = tuple[Array, Array | None, Array | None]


class Shape(NamedTuple):
    """What a program is compiled for."""

    rows: int  # R, per device
    length: int  # S
    room: int  # tokens of the longest translation
    slots: int  # in the cache, per row, for what its beams have written and still need
    block: int  # sentences encoded together, a divisor of the number of sentences


class _Batch(NamedTuple):
    """The R rows of a program, and how far the search of its P sentences has come."""

    search: SearchState  # of the R rows
    sentence: Int[Array, "R"]  # the sentence in each row; P means none
    next: Int[Array, ""]  # the first sentence that has not begun
    prefilled: SearchState  # that sentence and some that follow it
    out_of_slots: Bool[Array, "R"]  # whether a sentence that is done would need more slots
    results: Any  # hypotheses, steps and `out_of_slots` of the P sentences
    turns: Int[Array, ""]  # steps so far


@partial(jax.jit, static_argnums=(0, 1, 2))
def search_continuously(
    models: tuple[Transformer, ...],
    shape: Shape,
    mesh: Mesh,
    params: tuple[Any, ...],
    method: Method,
    limits: Limits,
    sources: Sources,
    counts: Int[Array, "devices"],
) -> tuple[tuple[BeamResult, Int[Array, "all"], Bool[Array, "all"]], Int[Array, "devices"]]:
    """Translate P sentences on each device; only the first `counts` of them are real.

    Returns their results, steps and whether they need more slots, and the steps of each device.
    """
    everywhere, data = PartitionSpec(), PartitionSpec("data")
    search = jax.shard_map(
        partial(_search_on_device, models, shape),
        mesh=mesh,
        in_specs=(everywhere, everywhere, everywhere, data, data),
        out_specs=data,
        check_vma=False,
    )
    return search(params, method, limits, sources, counts)


def _search_on_device(
    models: tuple[Transformer, ...],
    shape: Shape,
    params: tuple[Any, ...],
    method: Method,
    limits: Limits,
    sources: Sources,
    count: Int[Array, "1"],
) -> tuple[tuple[BeamResult, Int[Array, "P"], Bool[Array, "P"]], Int[Array, "1"]]:
    rows, room = shape.rows, shape.room
    step_fn = make_step_fn(models, params)
    (count,), num_sentences, block = count, len(sources[0]), shape.block

    def prefill_block(first: Any) -> SearchState:
        def part(leaf):
            return jax.lax.dynamic_slice_in_dim(leaf, first, block)

        return prefill(models, params, method, limits, room, *jax.tree.map(part, sources))

    def begin_rows() -> SearchState:
        some = jax.tree.map(lambda leaf: leaf[:rows], sources)
        return start_search(models, params, method, limits, room, *some, num_slots=shape.slots)

    def store_finished(batch: _Batch) -> Any:
        done = batch.search.hypotheses, batch.search.steps, batch.out_of_slots
        places = jnp.where(batch.search.done, batch.sentence, num_sentences)
        return jax.tree.map(
            lambda whole, row: whole.at[places].set(row, mode="drop"), batch.results, done
        )

    def can_refill(batch: _Batch) -> Array:
        """Whether a sentence is done and not yet stored, or a waiting one could begin."""
        done, waiting = batch.search.done, batch.next < count
        return jnp.any(done & ((batch.sentence < num_sentences) | waiting))

    def refill(batch: _Batch) -> _Batch:
        """Store the sentences that are done, and begin as many prefilled ones as find a row."""
        done, first = batch.search.done, batch.next % block
        prefilled = jax.lax.cond(
            (batch.next < count) & (first == 0),
            lambda batch: prefill_block(batch.next),
            lambda batch: batch.prefilled,
            batch,
        )
        nth = jnp.arange(block, dtype=jnp.int32) - first  # 0 is `next`; those before it have begun
        begin_now = (nth >= 0) & (nth < jnp.sum(done)) & (batch.next + nth < count)
        places = jnp.where(begin_now, jnp.argsort(~done)[nth], rows)
        sentence = jnp.where(done, num_sentences, batch.sentence)
        return _Batch(
            search=_put(batch.search, places, prefilled),
            sentence=sentence.at[places].set(batch.next + nth, mode="drop"),
            next=batch.next + jnp.sum(begin_now, dtype=jnp.int32),
            prefilled=prefilled,
            out_of_slots=batch.out_of_slots.at[places].set(False, mode="drop"),
            results=store_finished(batch),
            turns=batch.turns,
        )

    def advance(batch: _Batch) -> _Batch:
        batch = jax.lax.while_loop(can_refill, refill, batch)
        search = method.advance(step_fn, batch.search)
        out_of_slots = search.state.caches[0].is_full & ~search.done
        search = search._replace(done=search.done | out_of_slots)
        return batch._replace(search=search, out_of_slots=out_of_slots, turns=batch.turns + 1)

    def unfinished(batch: _Batch) -> Array:
        return jnp.any(~batch.search.done) | (batch.next < count)

    def zeros_like(begun: Callable[[], SearchState]) -> SearchState:
        """A search of no sentences, with arrays like those of `begun`."""
        structure = None

        def leaves() -> list[Array]:
            nonlocal structure
            found, structure = jax.tree.flatten(begun())
            return found

        like = jax.eval_shape(leaves)
        zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in like]
        return jax.tree.unflatten(structure, zeros)

    search = zeros_like(begin_rows)._replace(done=jnp.ones(rows, bool))
    none = jnp.zeros(rows, bool)
    batch = _Batch(
        search=search,
        sentence=jnp.full(rows, num_sentences, jnp.int32),
        next=jnp.int32(0),
        prefilled=zeros_like(lambda: prefill_block(0)),
        out_of_slots=none,
        results=jax.tree.map(
            lambda leaf: jnp.zeros((num_sentences, *leaf.shape[1:]), leaf.dtype),
            (search.hypotheses, search.steps, none),
        ),
        turns=jnp.int32(0),
    )
    batch = jax.lax.while_loop(unfinished, advance, batch)
    hypotheses, *rest = store_finished(batch)
    return (method.result(search._replace(hypotheses=hypotheses)), *rest), batch.turns[None]


def _put(search: SearchState, rows: Int[Array, "C"], begun: SearchState) -> SearchState:
    """Let the sentences of a search that has just begun take the rows of others."""

    def without_caches(search: SearchState) -> SearchState:
        return search._replace(state=search.state._replace(caches=()))

    pairs = zip(search.state.caches, begun.state.caches, strict=True)
    caches = tuple(cache.put(rows, new) for cache, new in pairs)
    search = jax.tree.map(
        lambda old, new: old.at[rows].set(new, mode="drop"),
        without_caches(search),
        without_caches(begun),
    )
    return search._replace(state=search.state._replace(caches=caches))
