"""`generate` for any number of sentences by continuous batching: hardly a row is idle."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxformer.batching import bucket, groups, num_rows, pad
from jaxformer.ensemble import Model, ensemble
from jaxformer.errors import UserError
from jaxformer.generation import (
    GenerationConfig,
    Limits,
    fewest_positions,
    make_method,
    make_step_fn,
    max_target_length,
    prefill,
    prefill_takes_first_step,
    prepare,
    start_search,
)
from jaxformer.search import BeamResult, Method, Search
from jaxformer.transformer import Transformer

#: Sentences that a program has room for, for each of its rows. While the last of them end, rows are
#: idle: half of them for the length of a sentence, 1/32 of the work.
_SENTENCES_PER_ROW = 16

#: Sentences that a CPU encodes together; other devices encode as many as there are rows.
_ENCODED = 8

#: Slots of the cache for each beam, besides one for each token. Beams soon go on from one past: of
#: 1000 sentences a few need more.
_SLOTS_PER_BEAM = 8

# What is known of sentences: source_ids, prefix and keys, as `generate` takes them.
_Sources = tuple[Array, Array | None, Array | None]


class _Shape(NamedTuple):
    """What a program is compiled for."""

    rows: int  # R, of a device
    length: int  # S
    room: int  # for so many tokens of a translation
    slots: int  # of a row, for what its beams have written
    encoded: int  # sentences together, a divisor of their number


class Generator:
    """`generate` for any number of sentences, on all devices, by continuous batching.

    A program has a few rows and many sentences. As soon as a sentence is done, the next that waits
    begins in its row, at its own first token, so that hardly a row is idle. Caches have room for
    translations of the usual length, whose beams soon go on from one past; the few sentences that
    need more begin once more where there is room for all that can be. Where they are not few, as
    with a model that has learned little, later calls give all room at once.

    Args:
      models, params: as for `generate`.
      devices: where to translate, by default all of this process, each its share.

    Attributes:
      computed_steps: rows times steps so far ...
      needed_steps: ... and those of them that were of sentences not yet done, and of use.
    """

    def __init__(
        self,
        models: Model | tuple[Model, ...],
        params: Any,
        devices: list[jax.Device] | None = None,
    ) -> None:
        self._devices = jax.local_devices() if devices is None else devices
        if not self._devices:
            raise UserError("devices are none: give at least one, or leave them out for all")
        self._mesh = Mesh(np.array(self._devices), ("data",))
        self._models, params = ensemble(models, params)
        self._configs = [model.config for model in self._models]
        self.computed_steps = self.needed_steps = 0
        # Sentences, by what searches have in common whatever their numbers are.
        self._in_usual_room: Counter[jax.tree_util.PyTreeDef] = Counter()
        self._begun_again: Counter[jax.tree_util.PyTreeDef] = Counter()
        self._counting = threading.Lock()
        self._on_cpu = self._devices[0].platform == "cpu"
        # One program leaves cores idle: its operations come one after the other, and many are too
        # small to be shared. Two at once on two cores: 1.2 times the sentences a second.
        self._at_once = 2 if self._on_cpu and len(self._devices) == 1 else 1
        everywhere = jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))
        self._params = prepare(self._models, everywhere, self._on_cpu)

    def sentences(
        self,
        sources: Sequence[Sequence[int]],
        options: GenerationConfig,
        *,
        batch_tokens: int | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
        keys: Array | None = None,
        few_shapes: bool = False,
    ) -> list[BeamResult]:
        """Search for any number of sentences of any length, the longest first.

        Args:
          sources: ids of each sentence, with eos.
          options: see `GenerationConfig`.
          batch_tokens: source positions at once, over all devices. By default 4096 for each of
            them; a CPU has far fewer, where more rows cost as much more time.
          prefixes: first target tokens of each sentence.
          keys: [number of sentences] keys of the noise, needed if `options.sampling`.
          few_shapes: as for `groups`, and caches have room for all that can be: fewer programs to
            compile.

        Returns:
          For each sentence numpy arrays [N, T], or [N]. T depends on its length.

        Raises:
          UserError: prefixes or keys are not as many as sentences, the keys are of another kind
            than JAX makes by default, or a sentence is longer than the learned positions.
        """
        if not isinstance(options, GenerationConfig):
            raise UserError(f"options are {options!r}: give a GenerationConfig")
        if not all(hasattr(ids, "__len__") for ids in sources):
            raise UserError("sources are no lists of ids: give one for each sentence")
        lengths, limit = list(map(len, sources)), fewest_positions(self._configs)
        if limit is not None and max(lengths, default=0) > limit:
            raise UserError(
                f"a source has {max(lengths)} tokens and the model {limit} learned positions: "
                "cut it"
            )
        results: list[Any] = [None] * len(sources)
        prefix_length = bucket(max(map(len, prefixes or [[]]), default=0))
        if keys is not None and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
            if keys.dtype != jax.eval_shape(jax.random.key, 0).dtype:
                raise UserError(f"keys are {keys.dtype}: give keys of jax_default_prng_impl")
            keys = jax.random.key_data(keys)
        noise = None if keys is None else np.asarray(keys)
        for name, each in (("prefixes", prefixes), ("keys", noise)):
            if each is not None and len(each) != len(sources):
                raise UserError(f"there are {len(each)} {name}: give one for each of the sources")
        # Of the caller's thread: those that search have one of their own.
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

        def search(shape: _Shape, chosen: Sequence[int]) -> list[int]:
            """Those that need more room are returned."""
            order = _deal_to_devices(chosen, len(self._devices), _SENTENCES_PER_ROW * shape.rows)

            def in_order(ids: Sequence[Sequence[int]], length: int) -> np.ndarray:
                return pad([ids[i] if i >= 0 else () for i in order], len(order), length)

            given = (
                in_order(sources, shape.length),
                None if prefixes is None else in_order(prefixes, prefix_length),
                None if noise is None else noise[np.maximum(order, 0)],
            )
            counts = np.sum(order.reshape(len(self._devices), -1) >= 0, axis=1, dtype=np.int32)
            most = max_target_length(self._configs, options, shape.length)
            method, limits = make_method(options, most), Limits.of(options, shape.length, most)
            arguments = self._params, method, limits, given, counts
            with jax.default_matmul_precision(precision):
                (found, steps, out_of_room), turns = jax.device_get(
                    _search(self._models, shape, self._mesh, *arguments)
                )
            taken = prefill_takes_first_step(self._models, method)  # before they have a row
            more, needed = [], 0
            for place in np.flatnonzero(order >= 0):
                index = int(order[place])
                if out_of_room[place]:
                    more.append(index)
                else:
                    results[index] = jax.tree.map(lambda leaf, place=place: leaf[place], found)
                    needed += max(0, int(steps[place]) - taken)
            with self._counting:
                self.computed_steps += shape.rows * int(turns.sum())
                self.needed_steps += needed
            return more

        threads = ThreadPoolExecutor(self._at_once)

        def start(chosen: list[int], length: int, all_room: bool) -> list[tuple[int, Future]]:
            devices = len(self._devices)
            tokens = batch_tokens
            if tokens is None:
                tokens = devices * self._tokens_at_once(options, length)
            rows = num_rows(len(chosen), tokens, length, devices) // devices
            encoded = min(rows, _ENCODED) if self._on_cpu else rows
            room_of = self._all_room if all_room else self._usual_room
            shape = _Shape(rows, length, *room_of(options, length), encoded)
            parts = -(-len(chosen) // (devices * rows * _SENTENCES_PER_ROW))
            if len(chosen) > 2 * self._at_once * rows:
                parts = -(-parts // self._at_once) * self._at_once  # as much for each thread
            return [(length, threads.submit(search, shape, chosen[i::parts])) for i in range(parts)]

        try:
            begun, again = [], []
            kind = jax.tree.structure(make_method(options, most=1))
            few = max(16, self._in_usual_room[kind] // 4)
            all_room = few_shapes or self._begun_again[kind] > few
            if not all_room:
                with self._counting:
                    self._in_usual_room[kind] += len(sources)
            for chosen, length in groups(lengths, few_shapes=few_shapes, limit=limit):
                begun += start(chosen, length, all_room)
            for length, same in groupby(begun, key=lambda part: part[0]):
                if more := [index for _, part in same for index in part.result()]:
                    with self._counting:
                        self._begun_again[kind] += len(more)
                    again += start(more, length, all_room=True)
            for _, part in again:
                part.result()
        finally:
            # After an error or Ctrl-C nothing more begins, and nobody waits for what has begun.
            threads.shutdown(wait=False, cancel_futures=True)
        return results

    def _tokens_at_once(self, options: GenerationConfig, source_length: int) -> int:
        """Source positions with which a device is fastest, as measured."""
        if not self._on_cpu:
            return 4096
        if self._configs[0].d_model >= 512:
            # Products with large matrices want some 64 rows: what 16 sentences have of hypotheses.
            return min(16 * source_length, 4096)
        if self._configs[0].quantized and options.num_beams >= 4:
            # As measured; presumably because the logits of so few stay in the cache.
            return min(8 * source_length, 512)
        return 512

    def _all_room(self, options: GenerationConfig, source_length: int) -> tuple[int, int]:
        """Steps and slots that no sentence needs more of."""
        room = max_target_length(self._configs, options, source_length)
        return room, options.num_beams * room

    def _usual_room(self, options: GenerationConfig, source_length: int) -> tuple[int, int]:
        """Steps and slots that few sentences need more of."""
        (room, _), usual = self._all_room(options, source_length), source_length * 3 // 2
        searched = options.beam_size > 1 and not options.sampling
        if searched and options.length_penalty_form == "power" and not options.early_stopping:
            # What is divided by its length can be overtaken for long after it has ended.
            usual = source_length * 2
        room = min(room, usual)
        slots = options.num_beams * room  # samples share no past
        return room, min(slots, room + _SLOTS_PER_BEAM * options.beam_size) if searched else slots


def _deal_to_devices(chosen: Sequence[int], devices: int, per_device: int) -> np.ndarray:
    """Deal sentences out to devices like cards, so that each has its share of the long ones.

    Three on two devices that have room for three each: [0, 2, -1, 1, -1, -1].
    """
    dealt = np.full((per_device, devices), -1)
    dealt.flat[: len(chosen)] = chosen
    return dealt.T.ravel()


class _Batch(NamedTuple):
    """The R rows of a program, and where the search of its P sentences stands."""

    search: Search  # of the R rows
    sentence: Int[Array, "R"]  # the sentence in each row; P is none
    next: Int[Array, ""]  # the first sentence that has not begun
    encoded: Search  # it and some that follow
    out_of_room: Bool[Array, "R"]  # whether a sentence that is done would need more room
    results: Any  # hypotheses, steps and `out_of_room` of the P sentences
    turns: Int[Array, ""]  # steps so far


@partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    models: tuple[Transformer, ...],
    shape: _Shape,
    mesh: Mesh,
    params: tuple[Any, ...],
    method: Method,
    limits: Limits,
    sources: _Sources,
    counts: Int[Array, "D"],
) -> tuple[tuple[BeamResult, Int[Array, "DP"], Bool[Array, "DP"]], Int[Array, "D"]]:
    """Search for P sentences on each of D devices, of which the first `counts` are real.

    Returns their results, steps and whether they need more room, and the steps of each device.
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
    shape: _Shape,
    params: tuple[Any, ...],
    method: Method,
    limits: Limits,
    sources: _Sources,
    count: Int[Array, "1"],
) -> tuple[tuple[BeamResult, Int[Array, "P"], Bool[Array, "P"]], Int[Array, "1"]]:
    rows, room = shape.rows, shape.room
    step_fn = make_step_fn(models, params)
    (count,), num_sentences, block = count, len(sources[0]), shape.encoded

    def encode(first: Any) -> Search:
        def part(leaf):
            return jax.lax.dynamic_slice_in_dim(leaf, first, block)

        return prefill(models, params, method, limits, room, *jax.tree.map(part, sources))

    def begin_rows() -> Search:
        some = jax.tree.map(lambda leaf: leaf[:rows], sources)
        return start_search(models, params, method, limits, room, *some, num_slots=shape.slots)

    def store_finished(batch: _Batch) -> Any:
        done = batch.search.hypotheses, batch.search.steps, batch.out_of_room
        places = jnp.where(batch.search.done, batch.sentence, num_sentences)
        return jax.tree.map(
            lambda whole, row: whole.at[places].set(row, mode="drop"), batch.results, done
        )

    def can_refill(batch: _Batch) -> Array:
        """Whether a sentence is done and not yet put away, or one could begin."""
        done, waiting = batch.search.done, batch.next < count
        return jnp.any(done & ((batch.sentence < num_sentences) | waiting))

    def refill(batch: _Batch) -> _Batch:
        """Put away what is done, and let those begin that are encoded, as many as find a row."""
        done, first = batch.search.done, batch.next % block
        encoded = jax.lax.cond(
            (batch.next < count) & (first == 0),
            lambda batch: encode(batch.next),
            lambda batch: batch.encoded,
            batch,
        )
        nth = jnp.arange(block, dtype=jnp.int32) - first  # 0 is `next`; those before it have begun
        begin_now = (nth >= 0) & (nth < jnp.sum(done)) & (batch.next + nth < count)
        places = jnp.where(begin_now, jnp.argsort(~done)[nth], rows)
        sentence = jnp.where(done, num_sentences, batch.sentence)
        return _Batch(
            search=_put(batch.search, places, encoded),
            sentence=sentence.at[places].set(batch.next + nth, mode="drop"),
            next=batch.next + jnp.sum(begin_now, dtype=jnp.int32),
            encoded=encoded,
            out_of_room=batch.out_of_room.at[places].set(False, mode="drop"),
            results=store_finished(batch),
            turns=batch.turns,
        )

    def advance(batch: _Batch) -> _Batch:
        batch = jax.lax.while_loop(can_refill, refill, batch)
        search = method.advance(step_fn, batch.search)
        full = (search.steps >= room) | search.state.caches[0].is_full
        out_of_room = full & ~search.done
        search = search._replace(done=search.done | out_of_room)
        return batch._replace(search=search, out_of_room=out_of_room, turns=batch.turns + 1)

    def unfinished(batch: _Batch) -> Array:
        return jnp.any(~batch.search.done) | (batch.next < count)

    def zeros_like(begun: Callable[[], Search]) -> Search:
        """A search of no sentences."""
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
        encoded=zeros_like(lambda: encode(0)),
        out_of_room=none,
        results=jax.tree.map(
            lambda leaf: jnp.zeros((num_sentences, *leaf.shape[1:]), leaf.dtype),
            (search.hypotheses, search.steps, none),
        ),
        turns=jnp.int32(0),
    )
    batch = jax.lax.while_loop(unfinished, advance, batch)
    hypotheses, *rest = store_finished(batch)
    return (method.result(search._replace(hypotheses=hypotheses)), *rest), batch.turns[None]


def _put(search: Search, rows: Int[Array, "C"], begun: Search) -> Search:
    """Let the sentences of a search that has just begun take the places of others."""

    def without_caches(search: Search) -> Search:
        return search._replace(state=search.state._replace(caches=()))

    pairs = zip(search.state.caches, begun.state.caches, strict=True)
    caches = tuple(cache.put(rows, new) for cache, new in pairs)
    search = jax.tree.map(
        lambda old, new: old.at[rows].set(new, mode="drop"),
        without_caches(search),
        without_caches(begun),
    )
    return search._replace(state=search.state._replace(caches=caches))
