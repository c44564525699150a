"""From source ids to hypotheses: a search over one Transformer, or over several as an ensemble."""

import dataclasses
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxformer.batching import SMALLEST, batches, bucket, pad
from jaxformer.beam import BeamSearch, gnmt_length_penalty, power_length_penalty
from jaxformer.cache import DecoderCache
from jaxformer.config import PAD_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.sampling import Sampling
from jaxformer.scoring import speakable
from jaxformer.search import BeamResult, Method, Search, Sentences, StepFn, run, take
from jaxformer.transformer import Transformer, unstack_decoder

PenaltyForm = Literal["gnmt", "power"]


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How to search for a translation. Lengths count target tokens with eos; S source tokens with.

    Attributes:
      beam_size: K, hypotheses kept at each step and returned; 1 is greedy search. With `sampling`,
        how many are drawn.
      length_penalty: alpha; higher favours longer translations.
      length_penalty_form: "gnmt", ((5 + length) / 6)^alpha (§6.1), or "power", length^alpha.
      coverage_penalty: beta of Wu et al. (2016), eq. 14: how much a source token costs that the
        last decoder layer has hardly attended to.
      early_stopping: a sentence ends with its K-th finished hypothesis, as in other toolkits,
        instead of when no live one can be better.
      max_length_ratio, max_length_extra: a and b, hypotheses have at most a · S + b tokens; §6.1
        has 1 and 50.
      min_length_ratio, min_length_extra: likewise, at least.
      no_repeat_ngram_size: n-grams of this many tokens occur once in a hypothesis; 0 is no limit.
      sampling: draw each token instead of searching for the best.
      temperature, top_k, top_p: as for `Sampling`.

    Raises:
      UserError: a value is impossible; the message names the field, the value and the fix.
    """

    beam_size: int = 4
    length_penalty: float = 0.6
    length_penalty_form: PenaltyForm = "gnmt"
    coverage_penalty: float = 0.0
    early_stopping: bool = False
    max_length_ratio: float = 1.0
    max_length_extra: int = 50
    min_length_ratio: float = 0.0
    min_length_extra: int = 0
    no_repeat_ngram_size: int = 0
    sampling: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        at_least = {
            "beam_size": 1,
            "length_penalty": 0,
            "coverage_penalty": 0,
            "max_length_ratio": 0,
            "max_length_extra": 0,
            "min_length_ratio": 0,
            "min_length_extra": 0,
            "no_repeat_ngram_size": 0,
            "temperature": 0,
            "top_k": 1,
        }
        for name, minimum in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise UserError(f"{name} is {value}: give at least {minimum}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give more than 0, at most 1")
        if self.length_penalty_form not in get_args(PenaltyForm):
            forms = " or ".join(get_args(PenaltyForm))
            raise UserError(f"length_penalty_form is {self.length_penalty_form!r}: {forms}")
        drawn = ("temperature", "top_k", "top_p")
        searched = ("coverage_penalty", "early_stopping")
        for field in dataclasses.fields(self):
            idle = searched if self.sampling else drawn
            if field.name in idle and getattr(self, field.name) != field.default:
                raise UserError(
                    f"{field.name} is {getattr(self, field.name)}: it has no effect "
                    + ("with sampling" if self.sampling else "without sampling, set it too")
                )

    def max_length(self, source_length: int) -> int:
        """T: the most tokens a hypothesis of a source of this many tokens can have."""
        return math.floor(self.max_length_ratio * source_length) + self.max_length_extra


class _State(NamedTuple):
    """What decoding remembers, of each member of the ensemble."""

    caches: tuple[DecoderCache, ...]
    coverage: Float[Array, "B K S"] | None  # attention a source token has had, if it counts


@partial(jax.jit, static_argnums=(0, 3))
def generate(
    configs: tuple[TransformerConfig, ...],
    params: tuple[Any, ...],
    source_ids: Int[Array, "B S"],
    options: GenerationConfig = GenerationConfig(),
    *,
    prefix: Int[Array, "B P"] | None = None,
    keys: Array | None = None,
) -> BeamResult:
    """Translate a batch of ids, compiled as one program.

    Args:
      configs, params: of one model, or of several whose probabilities are averaged.
      source_ids: sentences with eos, then padding. A row of padding alone costs no step and has
        the empty hypothesis.
      options: see `GenerationConfig`.
      prefix: first target tokens of each sentence, then padding.
      keys: [B] keys of the noise of each sentence, needed if `options.sampling`.

    Returns:
      K = beam_size hypotheses a sentence. Neither pad nor bos is ever generated. A sentence's
      result does not depend, to the last bit, on the others in the batch nor on its row.
    """
    params = prepare(configs, params)
    max_length = _max_length(configs, options, source_ids.shape[1])
    search = _begin(configs, params, source_ids, options, max_length, max_length, prefix, keys)
    search = run(_method(options), _step_fn(configs, params, options), search)
    return _method(options).result(search)


@partial(jax.jit, static_argnums=0)
def prepare(configs: tuple[TransformerConfig, ...], params: tuple[Any, ...]) -> tuple[Any, ...]:
    """Parameters as decoding wants them.

    Layers apart, matrices in the dtype of the computation, the softmax layer's transposed besides.
    """

    def cast(path: tuple, leaf: Array, dtype: str) -> Array:
        matrix = path[-1].key in ("kernel", "embedding") and leaf.dtype != jnp.int8
        return leaf.astype(dtype) if matrix else leaf

    def prepared(config: TransformerConfig, member: Any) -> dict[str, Any]:
        cast_to = partial(cast, dtype=config.dtype)
        member = jax.tree_util.tree_map_with_path(cast_to, unstack_decoder(member))
        name = "output_embedding" if config.embeddings == "separate" else "embedding"
        if not config.quantized:
            member[name] = {**member[name], "transposed": member[name]["embedding"].T}
        return member

    return tuple(prepared(*both) for both in zip(configs, params, strict=True))


class Generator:
    """`generate` for a stream of batches, on all devices, without the work for finished sentences.

    Most sentences of a batch end long before the last one. When a quarter of them is left, these
    move on as a batch of a quarter of the size: to move them at the half already is no faster, and
    takes twice the compiled programs. So do caches grow: they begin with room for the usual
    length, and only the few sentences that need more get it.

    Args:
      configs, params: as for `generate`.
      options: see `GenerationConfig`.
      devices: rows of a batch are split over these, by default all of this process.

    Attributes:
      num_devices: how many these are.
      computed_steps: rows times steps of all batches so far ...
      needed_steps: ... and those of them that were of sentences not yet done. The others waited
        for the rest of their batch, or filled up its shape.
    """

    def __init__(
        self,
        configs: tuple[TransformerConfig, ...],
        params: tuple[Any, ...],
        options: GenerationConfig,
        devices: list[jax.Device] | None = None,
    ) -> None:
        devices = jax.local_devices() if devices is None else devices
        mesh = Mesh(np.array(devices), ("data",))
        self.configs = configs
        self.options = options
        self.num_devices = len(devices)
        self.computed_steps = self.needed_steps = 0
        self._counting = threading.Lock()
        # One batch leaves cores idle: its operations come one after the other, and many are too
        # small to be shared. Two at once on two cores: 1.2 times the sentences a second. Not on
        # several devices, for there the collectives of two programs could wait for each other.
        self._overlap = len(devices) == 1 and devices[0].platform == "cpu"
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        self._params = prepare(
            configs, jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        )

    def __call__(
        self,
        source_ids: np.ndarray,
        *,
        prefix: np.ndarray | None = None,
        keys: Array | None = None,
        grow: bool = True,
    ) -> BeamResult:
        """Like `generate`, with numpy arrays; the rows must be a multiple of the devices.

        Without `grow`, caches have room for the longest translation from the beginning.
        """
        max_length = _max_length(self.configs, self.options, source_ids.shape[1])
        room = min(max_length, source_ids.shape[1] * 3 // 2) if grow else max_length
        source_ids, prefix, keys = jax.device_put((source_ids, prefix, keys), self._rows)
        rows = np.arange(len(source_ids))  # of the batch, in the search
        until = self._until(len(rows))
        search, result = _first_stage(
            self.configs,
            self._params,
            source_ids,
            self.options,
            max_length,
            room,
            prefix,
            keys,
            until,
        )
        done, steps, step, result = jax.device_get((search.done, search.steps, search.step, result))
        results = jax.tree.map(np.copy, result)
        computed, needed = len(rows) * int(step), steps.copy()
        while not done.all():
            if step >= room:
                room = max_length
            kept = np.argsort(done, kind="stable")[: self._enough(int(np.sum(~done)), len(rows))]
            rows, before = rows[kept], step
            until = self._until(len(rows))
            search, result = _next_stage(
                self.configs, self._params, self.options, room, self._rows, search, kept, until
            )
            done, steps, step, result = jax.device_get(
                (search.done, search.steps, search.step, result)
            )
            for whole, part in zip(results, result, strict=True):
                whole[rows] = part
            computed, needed[rows] = computed + len(rows) * int(step - before), steps
        with self._counting:
            self.computed_steps += computed
            self.needed_steps += int(needed.sum())
        return results

    def sentences(
        self,
        sources: Sequence[Sequence[int]],
        *,
        batch_tokens: int = 4096,
        prefixes: Sequence[Sequence[int]] | None = None,
        keys: Array | None = None,
        few_shapes: bool = False,
    ) -> list[BeamResult]:
        """Search for any number of sentences of any length, the longest first.

        Args:
          sources: ids of each sentence, with eos.
          batch_tokens: source positions of a batch, over all devices. A single CPU device works
            on two batches at once.
          prefixes: first target tokens of each sentence.
          keys: [number of sentences] keys of the noise.
          few_shapes: as for `batches`, and caches do not grow.

        Returns:
          For each sentence numpy arrays [K, T], or [K].
        """
        results: list[Any] = [None] * len(sources)
        prefix_length = bucket(max(map(len, prefixes or [[]]), default=0))

        def search(batch: tuple[list[int], int, int]) -> None:
            chosen, rows, length = batch
            source_ids = pad([sources[index] for index in chosen], rows, length)
            prefix = batch_keys = None
            if prefixes is not None:
                prefix = pad([prefixes[index] for index in chosen], rows, prefix_length)
            if keys is not None:
                batch_keys = keys[np.resize(chosen, rows)]
            found = self(source_ids, prefix=prefix, keys=batch_keys, grow=not few_shapes)
            for row, index in enumerate(chosen):
                results[index] = jax.tree.map(lambda leaf, row=row: leaf[row], found)

        waiting = batches(
            list(map(len, sources)),
            batch_tokens,
            devices=self.num_devices,
            few_shapes=few_shapes,
            limit=fewest_positions(self.configs),
        )
        if self._overlap:
            with ThreadPoolExecutor(2) as threads:
                list(threads.map(search, waiting))
        else:
            list(map(search, waiting))
        return results

    def _until(self, rows: int) -> np.int32:
        """At how many sentences left a batch of `rows` moves on."""
        quarter = rows // 4
        return np.int32(quarter if quarter >= SMALLEST * self.num_devices else 0)

    def _enough(self, waiting: int, rows: int) -> int:
        """Rows for the sentences that wait: a quarter, as often as they allow."""
        while rows // 4 >= max(waiting, SMALLEST * self.num_devices):
            rows //= 4
        return rows


def fewest_positions(configs: Sequence[TransformerConfig]) -> int | None:
    """Positions that all members of an ensemble have; None if none of them is learned."""
    return min((n for config in configs if (n := config.num_positions) is not None), default=None)


def _max_length(
    configs: tuple[TransformerConfig, ...], options: GenerationConfig, source_length: int
) -> int:
    """T, the positions that there are room for, of which there may be fewer."""
    limit = fewest_positions(configs)
    asked = options.max_length(source_length)
    return asked if limit is None else min(asked, limit)


def _method(options: GenerationConfig) -> Method:
    if options.sampling:
        return Sampling(
            options.beam_size,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
        )
    form = gnmt_length_penalty if options.length_penalty_form == "gnmt" else power_length_penalty

    def coverage_bonus(state: _State) -> Array:
        """-inf is no score: attention never vanishes, but its float may."""
        attended = jnp.clip(state.coverage, 1e-9, 1.0)
        real = state.caches[0].cross_mask[:, 0]
        return options.coverage_penalty * jnp.sum(jnp.where(real, jnp.log(attended), 0.0), axis=-1)

    def reorder(state: _State, beams: Array) -> _State:
        coverage = None if state.coverage is None else take(state.coverage, beams)
        return _State(tuple(cache.reorder(beams) for cache in state.caches), coverage)

    return BeamSearch(
        options.beam_size,
        length_penalty=form(float(options.length_penalty)),
        early_stopping=options.early_stopping,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        bonus=coverage_bonus if options.coverage_penalty else None,
        reorder=reorder,
    )


def _step_fn(
    configs: tuple[TransformerConfig, ...], params: tuple[Any, ...], options: GenerationConfig
) -> StepFn:
    """One token of all members; the mean of their probabilities counts."""

    def step(tokens: Array, state: _State) -> tuple[Array, _State]:
        logits, caches, attention = [], [], []
        for config, variables, cache in zip(configs, params, state.caches, strict=True):
            (output, cache), sown = Transformer(config).apply(
                {"params": variables}, tokens, cache, method="decode_step", mutable="intermediates"
            )
            logits.append(speakable(output))
            caches.append(cache)
            attention.append(sown["intermediates"]["decoder"]["cross_attention"][-1])
        coverage = state.coverage
        if coverage is not None:
            coverage += sum(jnp.mean(weights, axis=1) for weights in attention) / len(attention)
        # Without the barrier this is fused into each reader of the logits, and computed anew for
        # each: 13 ms of 20 for 320 hypotheses and 10,000 pieces.
        scores = jax.lax.optimization_barrier(_mean_of_probabilities(logits))
        return scores, _State(tuple(caches), coverage)

    return step


def _mean_of_probabilities(logits: list[Array]) -> Array:
    """Log of the members' mean probability, up to a constant; with one member its logits."""
    if len(logits) == 1:
        return logits[0]
    return jax.nn.logsumexp(jnp.stack([jax.nn.log_softmax(member) for member in logits]), axis=0)


def _begin(
    configs: tuple[TransformerConfig, ...],
    params: tuple[Any, ...],
    source_ids: Array,
    options: GenerationConfig,
    max_length: int,
    room: int,
    prefix: Array | None,
    keys: Array | None,
) -> Search:
    """Encode, and put nothing in the caches, which have `room` of the `max_length` tokens."""
    caches = []
    for config, variables in zip(configs, params, strict=True):
        model = Transformer(config).bind({"params": variables})
        caches.append(
            model.init_cache(
                model.encode(source_ids), source_ids, beam_size=options.beam_size, max_length=room
            )
        )
    lengths = jnp.sum(source_ids != PAD_ID, axis=1, dtype=jnp.int32)

    def limit(ratio: float, extra: int) -> Array:
        limits = jnp.floor(ratio * lengths.astype(jnp.float32)).astype(jnp.int32) + extra
        return jnp.where(lengths > 0, jnp.minimum(limits, max_length), 0)

    at_least = limit(options.min_length_ratio, options.min_length_extra)
    sentences = Sentences(
        max_lengths=limit(options.max_length_ratio, options.max_length_extra),
        min_lengths=at_least if options.min_length_ratio or options.min_length_extra else None,
        prefix=prefix,
        keys=keys,
    )
    shape = source_ids.shape[0], options.beam_size, source_ids.shape[1]
    coverage = jnp.zeros(shape) if options.coverage_penalty and not options.sampling else None
    return _method(options).start(sentences, max_length, _State(tuple(caches), coverage))


@partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _first_stage(
    configs: tuple[TransformerConfig, ...],
    params: tuple[Any, ...],
    source_ids: Array,
    options: GenerationConfig,
    max_length: int,
    room: int,
    prefix: Array | None,
    keys: Array | None,
    until: Array,
) -> tuple[Search, BeamResult]:
    """Go on until `until` sentences are left or the caches are full; what there is by then."""
    search = _begin(configs, params, source_ids, options, max_length, room, prefix, keys)
    return _advance(configs, params, options, room, search, until)


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _next_stage(
    configs: tuple[TransformerConfig, ...],
    params: tuple[Any, ...],
    options: GenerationConfig,
    room: int,
    sharding: NamedSharding,
    search: Search,
    rows: Array,
    until: Array,
) -> tuple[Search, BeamResult]:
    """The same with the sentences `rows` alone, and caches that have `room`."""

    def keep(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[rows], tree)

    caches = tuple(cache.take(rows, room) for cache in search.state.caches)
    kept = search._replace(
        done=search.done[rows],
        steps=search.steps[rows],
        tokens=search.tokens[rows],
        hypotheses=keep(search.hypotheses),
        sentences=keep(search.sentences),
        state=_State(caches, keep(search.state.coverage)),
    )
    kept = jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding) if leaf.ndim else leaf, kept
    )
    return _advance(configs, params, options, room, kept, until)


def _advance(
    configs: tuple[TransformerConfig, ...],
    params: tuple[Any, ...],
    options: GenerationConfig,
    room: int,
    search: Search,
    until: Array,
) -> tuple[Search, BeamResult]:
    method = _method(options)
    step_fn = _step_fn(configs, params, options)
    search = run(method, step_fn, search, until=until, max_step=room)
    return search, method.result(search)
