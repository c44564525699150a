"""`generate` for any number of sentences, by continuous batching: rows are hardly ever idle."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxformer.batching import SMALLEST, bucket, groups, num_rows, pad
from jaxformer.continuous_batching import Shape, search_continuously
from jaxformer.ensemble import Model, ensemble
from jaxformer.errors import UserError
from jaxformer.generation import (
    Limits,
    decoding_params,
    fewest_positions,
    make_method,
    max_target_length,
    prefill_takes_first_step,
)
from jaxformer.generation_config import GenerationConfig
from jaxformer.search import BeamResult, Method

#: Sentences that a program has room for, per row. While the last of them end, rows are idle: half
#: of the rows for the length of a sentence, 1/32 of the work.
_SENTENCES_PER_ROW = 16

#: Sentences that a CPU encodes together; other devices encode as many as there are rows.
_CPU_BLOCK = 8

#: Cache slots per beam, in addition to one per token. Beams soon share one past: out of 1000
#: sentences, a few need more.
_SLOTS_PER_BEAM = 8

#: JAX settings that results depend on and that a caller may have made for its own thread only;
#: searches run in other threads.
_OF_A_THREAD = (
    "default_matmul_precision",
    "default_prng_impl",
    "enable_x64",
    "threefry_partitionable",
)


class Generator:
    """`generate` for any number of sentences, on all devices, by continuous batching.

    A program has a few rows and many sentences. As soon as a sentence is done, the next in line
    begins in its row, at its own first token, so that rows are hardly ever idle. Caches have slots
    for translations of the usual length, whose beams soon share one past. The few sentences that
    outgrow them are searched again, with slots for the longest. Where these are not few, as with a
    model that has learned little, later calls give all sentences those from the start.

    Args:
      models, params: as for `generate`.
      devices: where to translate, by default all devices of this process; each takes a share.

    Raises:
      UserError: `models` are not models, `params` are not theirs, or as for `devices_or_all`.

    Attributes:
      needed_steps: how many of the `computed_steps` served a sentence not yet done, whose result
        was kept.
    """

    def __init__(
        self,
        models: Model | tuple[Model, ...],
        params: Any,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self._devices = devices_or_all(devices)
        self._mesh = Mesh(np.array(self._devices), ("data",))
        self._models, params = ensemble(models, params)
        self._configs = [model.config for model in self._models]
        self._turns: Counter[Shape] = Counter()
        self.needed_steps = 0
        # Sentence counts, by the structure of the search whatever its numbers are.
        self._with_usual_slots: Counter[jax.tree_util.PyTreeDef] = Counter()
        self._begun_again: Counter[jax.tree_util.PyTreeDef] = Counter()
        self._counting = threading.Lock()
        self._on_cpu = self._devices[0].platform == "cpu"
        # One program leaves cores idle: its operations run one after the other, and many are too
        # small to be split. Two at once on two cores give 1.2 times the sentences per second.
        self._at_once = 2 if self._on_cpu and len(self._devices) == 1 else 1
        # Kept: to start a thread takes a tenth of a narrow model's time for one sentence, or more.
        self._for_one_sentence = ThreadPoolExecutor()
        everywhere = jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))
        self._params = decoding_params(self._models, everywhere, self._on_cpu)

    def generate(
        self,
        sources: Sequence[Sequence[int]],
        options: GenerationConfig,
        *,
        batch_tokens: int | None = None,
        prefixes: Sequence[Sequence[int]] | None = None,
        keys: Array | np.ndarray | None = None,
        few_shapes: bool = False,
    ) -> list[BeamResult]:
        """Translate any number of sentences of any length, the longest first.

        Args:
          sources: ids of each sentence, with eos.
          options: see `GenerationConfig`.
          batch_tokens: source positions of a program, over all devices; on a CPU, two programs may
            run at once. By default 4096 per device, but fewer on a CPU, where time grows with the
            rows.
          prefixes: first target tokens of each sentence.
          keys: [number of sentences] random keys, needed if `options.sampling`.
          few_shapes: as for `groups`, and caches have slots for the longest translations: there are
            fewer programs to compile.

        Returns:
          For each sentence, numpy arrays [M, T] or [M]. T depends on the sentence's length.

        Raises:
          UserError: there are not as many prefixes or keys as sentences, the keys are not of the
            kind JAX makes by default, a sentence is longer than the learned positions or is not a
            list of ids, or `options` is not a `GenerationConfig`.
        """
        limit = fewest_positions(self._configs)
        call = _Call.checked(sources, options, prefixes, keys, limit)
        results: list[Any] = [None] * len(sources)
        one = len(sources) == 1
        threads = self._for_one_sentence if one else ThreadPoolExecutor(self._at_once)

        def begin(
            chosen: list[int], length: int, all_slots: bool, few_rows: bool = False
        ) -> list[tuple[int, Future]]:
            rows, parts = self._rows_and_parts(options, len(chosen), length, batch_tokens, few_rows)
            shape = self._shape(options, rows, length, all_slots)
            return [
                (length, threads.submit(self._search, call, shape, chosen[part::parts], results))
                for part in range(parts)
            ]

        try:
            begun, again = [], []
            kind = jax.tree.structure(make_method(options, max_length=1))
            few = max(16, self._with_usual_slots[kind] // 4)
            all_slots = few_shapes or self._begun_again[kind] > few
            if not all_slots:
                with self._counting:
                    self._with_usual_slots[kind] += len(sources)
            lengths = list(map(len, sources))
            for chosen, length in groups(lengths, few_shapes=few_shapes, limit=limit):
                begun += begin(chosen, length, all_slots)
            for length, same in groupby(begun, key=lambda part: part[0]):
                if more := [index for _, part in same for index in part.result()]:
                    with self._counting:
                        self._begun_again[kind] += len(more)
                    again += begin(more, length, all_slots=True, few_rows=self._on_cpu)
            for _, part in again:
                part.result()
        finally:
            # After an error or Ctrl-C nothing more begins, and nobody waits for what has begun.
            if not one:
                threads.shutdown(wait=False, cancel_futures=True)
        return results

    @property
    def turns(self) -> Counter[Shape]:
        """Steps so far in each shape, of all devices together."""
        with self._counting:  # searches under way may add a shape
            return self._turns.copy()

    @property
    def computed_steps(self) -> int:
        """Rows times steps so far."""
        return sum(shape.rows * turns for shape, turns in self.turns.items())

    def lower(self, options: GenerationConfig, shape: Shape) -> jax.stages.Lowered:
        """Return the program of one of the `turns`, for what it costs: nothing is translated.

        Args:
          options: as they were given to `generate`, without prefixes.
          shape: a key of `turns`.
        """
        number = len(self._devices) * _SENTENCES_PER_ROW * shape.rows
        sources = jax.ShapeDtypeStruct((number, shape.length), jnp.int32)
        keys = None
        if options.sampling:
            keys = jax.eval_shape(
                lambda: jax.random.key_data(jax.random.split(jax.random.key(0), number))
            )
        counts = jax.ShapeDtypeStruct((len(self._devices),), jnp.int32)
        return search_continuously.lower(
            self._models,
            shape,
            self._mesh,
            self._params,
            *_method_and_limits(options, shape),
            (sources, None, keys),
            counts,
        )

    def _search(
        self, call: "_Call", shape: Shape, chosen: Sequence[int], results: list[Any]
    ) -> list[int]:
        """Search the chosen sentences; return those that need more slots, without a result."""
        order = _deal_to_devices(chosen, len(self._devices), _SENTENCES_PER_ROW * shape.rows)
        counts = np.sum(order.reshape(len(self._devices), -1) >= 0, axis=1, dtype=np.int32)
        method, limits = _method_and_limits(call.options, shape)
        given = call.in_order(order, shape.length)
        with call.as_its_thread():
            (found, steps, out_of_slots), turns = jax.device_get(
                search_continuously(
                    self._models, shape, self._mesh, self._params, method, limits, given, counts
                )
            )
        taken = prefill_takes_first_step(self._models, method)  # a step before they get a row
        more, needed = [], 0
        for place in np.flatnonzero(order >= 0):
            index = int(order[place])
            if out_of_slots[place]:
                more.append(index)
            else:
                results[index] = jax.tree.map(lambda leaf, place=place: leaf[place], found)
                needed += max(0, int(steps[place]) - taken)
        with self._counting:
            self._turns[shape] += int(turns.sum())
            self.needed_steps += needed
        return more

    def _rows_and_parts(
        self,
        options: GenerationConfig,
        number: int,
        length: int,
        batch_tokens: int | None,
        few_rows: bool,
    ) -> tuple[int, int]:
        """Rows per device, and how many programs share a number of sentences.

        With threads there are two sentences or more for each row if that leaves enough rows for
        products at full speed: the second begins when the first is done, in a row that would be
        idle. With `few_rows` it is so whatever the products cost, for sentences that take many
        steps.
        """
        devices = len(self._devices)
        if batch_tokens is None:
            batch_tokens = devices * self._tokens_at_once(options, length)

        def rows_for(waiting: int) -> int:
            return num_rows(waiting, batch_tokens, length, devices)

        rows, at_once = rows_for(number), min(self._at_once, number)
        share = -(-number // at_once)
        each, fewer = rows_for(share), rows_for(-(-share // 2))
        most = max(number, rows)  # more rows than that, in all programs, would be idle
        if few_rows or (at_once > 1 and fewer >= SMALLEST and at_once * fewer <= most):
            rows = fewer
        elif at_once * each <= most:
            rows = each
        else:
            at_once = 1
        parts = -(-number // (rows * _SENTENCES_PER_ROW))
        return rows // devices, -(-parts // at_once) * at_once  # as many for each thread

    def _shape(self, options: GenerationConfig, rows: int, length: int, all_slots: bool) -> Shape:
        """The program of so many rows per device for sentences of one length."""
        block = min(rows, _CPU_BLOCK) if self._on_cpu else rows
        room = max_target_length(self._configs, options, length)
        slots = options.num_beams * room if all_slots else _usual_slots(options, length, room)
        return Shape(rows, length, room, slots, block)

    def _tokens_at_once(self, options: GenerationConfig, source_length: int) -> int:
        """How many source positions at once a device is fastest with, as measured."""
        if not self._on_cpu:
            return 4096
        if self._configs[0].d_model >= 512:
            # Each product reads and rearranges its whole matrix, even if its rows, which are the
            # hypotheses, are few: as measured, 320 are fastest, greedy or 5 for each sentence.
            return min(max(320 // options.num_beams, 1) * source_length, 4096)
        if self._configs[0].quantized and options.num_beams >= 4:
            # As measured; presumably because the logits of so few sentences stay in the CPU cache.
            return min(8 * source_length, 512)
        return 512


class _Call(NamedTuple):
    """What `Generator.generate` was given, checked."""

    options: GenerationConfig
    sources: Sequence[Sequence[int]]
    prefixes: Sequence[Sequence[int]] | None
    keys: np.ndarray | None  # of words
    settings: dict[str, Any]  # of JAX, in the thread that calls

    @classmethod
    def checked(
        cls,
        sources: Sequence[Sequence[int]],
        options: GenerationConfig,
        prefixes: Sequence[Sequence[int]] | None,
        keys: Array | np.ndarray | None,
        limit: int | None,
    ) -> "_Call":
        """Refuse what `Generator.generate` says, and sources of more than `limit` tokens."""
        if not isinstance(options, GenerationConfig):
            raise UserError(f"options are {options!r}: give a GenerationConfig")
        if not all(hasattr(ids, "__len__") for ids in sources):
            raise UserError("sources are not lists of ids: give one list per sentence")
        longest = max(map(len, sources), default=0)
        if limit is not None and longest > limit:
            raise UserError(
                f"a source has {longest} tokens and the model {limit} learned positions: shorten it"
            )
        if keys is not None and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
            if keys.dtype != jax.eval_shape(lambda: jax.random.key(0)).dtype:
                raise UserError(f"keys are {keys.dtype}: give keys of jax_default_prng_impl")
            keys = jax.random.key_data(keys)
        words = None if keys is None else np.asarray(keys)
        for name, each in (("prefixes", prefixes), ("keys", words)):
            if each is not None and len(each) != len(sources):
                raise UserError(f"there are {len(each)} {name}: give one for each of the sources")
        settings = {name: getattr(jax.config, f"jax_{name}") for name in _OF_A_THREAD}
        return cls(options, sources, prefixes, words, settings)

    def in_order(
        self, order: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Sources, prefixes and keys of the sentences `order` [P], nothing where that is -1."""

        def padded(each: Sequence[Sequence[int]], length: int) -> np.ndarray:
            return pad([each[index] if index >= 0 else () for index in order], len(order), length)

        prefixes = None
        if self.prefixes is not None:
            prefixes = padded(self.prefixes, bucket(max(map(len, self.prefixes), default=0)))
        keys = None if self.keys is None else self.keys[np.maximum(order, 0)]
        return padded(self.sources, length), prefixes, keys

    @contextlib.contextmanager
    def as_its_thread(self) -> Iterator[None]:
        """Let this thread compute with the settings of the one that called."""
        with contextlib.ExitStack() as stack:
            for name, value in self.settings.items():
                stack.enter_context(getattr(jax, name)(value))
            yield


def _method_and_limits(options: GenerationConfig, shape: Shape) -> tuple[Method, Limits]:
    return make_method(options, shape.room), Limits.of(options, shape.length, shape.room)


def _usual_slots(options: GenerationConfig, source_length: int, room: int) -> int:
    """Cache slots that are enough for all but a few sentences, which may take `room` steps."""
    usual = source_length * 3 // 2
    searched = options.beam_size > 1 and not options.sampling
    if searched and options.length_penalty_form == "power" and not options.early_stopping:
        # A score divided by the length can be overtaken long after its hypothesis has ended.
        usual = source_length * 2
    usual = min(usual, room)
    slots = options.num_beams * usual  # samples share no past
    return min(slots, usual + _SLOTS_PER_BEAM * options.beam_size) if searched else slots


def devices_or_all(devices: Sequence[jax.Device] | None) -> list[jax.Device]:
    """`devices`, by default all devices of this process.

    Raises:
      UserError: there are none, or one is listed twice.
    """
    found = jax.local_devices() if devices is None else list(devices)
    if not found or len(set(found)) < len(found):
        raise UserError("devices is empty, or has one twice: list each once, or leave devices out")
    return found


def _deal_to_devices(chosen: Sequence[int], devices: int, per_device: int) -> np.ndarray:
    """Deal sentences out to devices like cards, so that each has its share of the long ones.

    Three sentences on two devices with room for three each: [0, 2, -1, 1, -1, -1].
    """
    dealt = np.full((per_device, devices), -1)
    dealt.flat[: len(chosen)] = chosen
    return dealt.T.ravel()
