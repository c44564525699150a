"""From source ids to hypotheses: a search over one Transformer, or over several as an ensemble."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.batching import bucket
from jaxformer.beam import (
    BeamSearch,
    TabledPenalty,
    gnmt_length_penalty,
    power_length_penalty,
)
from jaxformer.cache import DecoderCache
from jaxformer.config import PAD_ID, TransformerConfig
from jaxformer.ensemble import Model, ensemble, mean_of_probabilities, speakable
from jaxformer.errors import UserError
from jaxformer.generation_config import GenerationConfig
from jaxformer.ids import as_ids
from jaxformer.matrices import map_matrices, transpose_kernels
from jaxformer.sampling import Sampling
from jaxformer.search import BeamResult, Method, Request, SearchState, StepFn, run, take
from jaxformer.stack import unstack_layers
from jaxformer.transformer import Transformer


class DecodingState(NamedTuple):
    """What decoding remembers, for each member of the ensemble."""

    caches: tuple[DecoderCache, ...]
    coverage: Float[Array, "B K S"] | None  # attention each source token has had, if needed


class Limits(NamedTuple):
    """How many tokens a translation may have, indexed by the number of tokens in its source."""

    most: Int[Array | np.ndarray, "S+1"]
    fewest: Int[Array | np.ndarray, "S+1"] | None

    @classmethod
    def of(cls, options: GenerationConfig, source_length: int, max_length: int) -> "Limits":
        """Apply the rules of `options` without the rounding of float32, at most `max_length`."""

        def each(rule: Callable[[int], int]) -> np.ndarray:
            lengths = range(1, source_length + 1)
            return np.array([0] + [min(rule(length), max_length) for length in lengths], np.int32)

        longest = each(options.max_length)
        asked = options.min_length_ratio or options.min_length_extra
        return cls(longest, np.minimum(each(options.min_length), longest) if asked else None)


def generate(
    models: Model | tuple[Model, ...],
    params: Any,
    source_ids: Int[Array | np.ndarray, "B S"],
    options: GenerationConfig = GenerationConfig(),
    *,
    prefix: Int[Array | np.ndarray, "B P"] | None = None,
    keys: Array | np.ndarray | None = None,
) -> BeamResult:
    """Translate a batch of ids, compiled as one program for all penalties and temperatures.

    Args:
      models, params: one Transformer, or its configuration, and its parameters; or tuples of
        several, whose probabilities are averaged.
      source_ids: sentences with eos, then padding. A row of padding alone costs no step and yields
        the empty hypothesis.
      options: see `GenerationConfig`.
      prefix: first target tokens of each sentence, then padding.
      keys: [B] random keys, one for each sentence, needed if `options.sampling`.

    Raises:
      UserError: the models, their parameters or the options are not what they should be, an array
        has another shape than above, or `options.sampling` is set without keys.

    Returns:
      M hypotheses per sentence. Neither pad nor bos is ever generated. A sentence's result is the
      same, to the last bit, whatever the others in the batch and whatever its row.
    """
    models, params = ensemble(models, params)
    if not isinstance(options, GenerationConfig):
        raise UserError(f"options are {options!r}: give a GenerationConfig")
    source_ids = as_ids(source_ids, "source_ids")
    if source_ids.ndim != 2:
        raise UserError(f"source_ids are of shape {source_ids.shape}: give one row per sentence")
    sentences = source_ids.shape[0]
    if prefix is not None:
        prefix = as_ids(prefix, "prefix")
        if prefix.ndim != 2 or prefix.shape[0] != sentences:
            raise UserError(f"prefix is of shape {prefix.shape}: make it [{sentences}, P]")
    if keys is not None and keys.shape != (sentences, *_key_shape(keys)):
        raise UserError(f"keys are of shape {keys.shape}: give one for each of {sentences} rows")
    configs = [model.config for model in models]
    max_length = max_target_length(configs, options, source_ids.shape[1])
    method = make_method(options, max_length)
    limits = Limits.of(options, source_ids.shape[1], max_length)
    method, limits = jax.device_put((method, limits))  # or a transfer guard would stop them
    return _generate(models, max_length, params, method, limits, source_ids, prefix, keys)


def _key_shape(keys: Array | np.ndarray) -> tuple[int, ...]:
    """The shape of a single key: old-style keys are arrays of words."""
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return ()
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


@partial(jax.jit, static_argnums=(0, 1))
def _generate(
    models: tuple[Transformer, ...],
    room: int,
    params: tuple[Any, ...],
    method: Method,
    limits: Limits,
    source_ids: Int[Array, "B S"],
    prefix: Int[Array, "B P"] | None,
    keys: Array | None,
) -> BeamResult:
    params = decoding_params(models, params)
    search = start_search(models, params, method, limits, room, source_ids, prefix, keys)
    search = run(method, make_step_fn(models, params), search)
    return method.result(search)


@partial(jax.jit, static_argnums=(0, 2))
def decoding_params(
    models: tuple[Transformer, ...], params: tuple[Any, ...], for_cpu: bool = False
) -> tuple[Any, ...]:
    """Parameters in the form that decoding wants.

    Layers are unstacked, matrices have the dtype of the computation, and the softmax matrix gets a
    transposed copy; so do the decoder's matrices with `for_cpu`, if it computes in float32. A
    quantized model's layers are unstacked, and nothing else changes.
    """

    def prepared(config: TransformerConfig, member: Any) -> dict[str, Any]:
        def cast(node: dict[str, Any], name: str, axes: tuple[int, ...]) -> dict[str, Any]:
            return {**node, name: node[name].astype(config.dtype)}

        member = unstack_layers(member)
        if config.quantized:
            return member
        member = map_matrices(member, cast)
        name = "output_embedding" if config.embeddings == "separate" else "embedding"
        member[name] = {**member[name], "transposed": member[name]["embedding"].T}
        if for_cpu and config.dtype == "float32":
            layers = tuple(map(transpose_kernels, member["decoder"]["layers"]))
            member["decoder"] = {**member["decoder"], "layers": layers}
        return member

    configs = [model.config for model in models]
    return tuple(prepared(*both) for both in zip(configs, params, strict=True))


def fewest_positions(configs: Sequence[TransformerConfig]) -> int | None:
    """Number of positions that all members of an ensemble have; None if no member's are learned."""
    return min((n for config in configs if (n := config.num_positions) is not None), default=None)


def max_target_length(
    configs: Sequence[TransformerConfig], options: GenerationConfig, source_length: int
) -> int:
    """T, the most tokens of a translation: what `options` allow, capped by the model's positions.

    At least 1, as tokens are written to arrays of that length.
    """
    limit = fewest_positions(configs)
    asked = max(1, options.max_length(source_length))
    return asked if limit is None else min(asked, limit)


def make_method(options: GenerationConfig, max_length: int) -> Method:
    """The search that `options` ask for, for translations of at most `max_length` tokens.

    It is a pytree: its numbers are arguments of a program, so that one serves all their values.
    """
    if options.sampling:
        greedy = options.temperature == 0
        return Sampling(
            options.num_beams,
            temperature=1.0 if greedy else float(options.temperature),
            top_k=1 if greedy else options.top_k,
            top_p=options.top_p and float(options.top_p),
            no_repeat_ngram_size=options.no_repeat_ngram_size,
        )
    form = gnmt_length_penalty if options.length_penalty_form == "gnmt" else power_length_penalty
    return BeamSearch(
        options.beam_size,
        n_best=options.n_best,
        length_penalty=TabledPenalty.of(form(options.length_penalty), bucket(max_length + 1)),
        early_stopping=options.early_stopping,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        bonus=CoverageBonus(float(options.coverage_penalty)) if options.coverage_penalty else None,
        reorder=_reorder,
    )


@partial(jax.tree_util.register_dataclass, data_fields=["penalty"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class CoverageBonus:
    """Wu et al. (2016), eq. 14: `penalty` · Σ log(attention a source token has had, at most 1)."""

    penalty: float | Float[Array, ""]

    def __call__(self, state: DecodingState) -> Float[Array, "B K"]:
        """Never -inf, which is no score: attention is never 0, but its float may underflow."""
        attended = jnp.clip(state.coverage, 1e-9, 1.0)
        real = state.caches[0].cross_mask[:, 0]
        return self.penalty * jnp.sum(jnp.where(real, jnp.log(attended), 0.0), axis=-1)


def _reorder(state: DecodingState, beams: Array) -> DecodingState:
    coverage = None if state.coverage is None else take(state.coverage, beams)
    return DecodingState(tuple(cache.reorder(beams) for cache in state.caches), coverage)


def make_step_fn(models: tuple[Transformer, ...], params: tuple[Any, ...]) -> StepFn:
    """Return a step function: one token for all members, by the mean of their probabilities."""

    def step(tokens: Array, state: DecodingState) -> tuple[Array, DecodingState]:
        logits, caches, attention = [], [], []
        for model, variables, cache in zip(models, params, state.caches, strict=True):
            (output, cache), sown = model.apply(
                {"params": variables}, tokens, cache, method="decode_step", mutable="intermediates"
            )
            logits.append(speakable(output))
            caches.append(cache)
            attended = sown.get("intermediates", {}).get("decoder", {})
            attention += attended.get("cross_attention", ())[-1:]
        coverage = state.coverage
        if coverage is not None:
            if len(attention) < len(models):
                raise UserError(
                    "coverage_penalty needs an attention that sows its weights: leave it out"
                )
            coverage += sum(jnp.mean(weights, axis=1) for weights in attention) / len(attention)
        return mean_of_probabilities(logits), DecodingState(tuple(caches), coverage)

    return step


def start_search(
    models: tuple[Transformer, ...],
    params: tuple[Any, ...],
    method: Method,
    limits: Limits,
    room: int,
    source_ids: Int[Array, "B S"],
    prefix: Int[Array, "B P"] | None,
    keys: Array | None,
    *,
    num_beams: int | None = None,
    num_slots: int | None = None,
) -> SearchState:
    """A search with the sentences encoded, no token generated yet, and room for `room` tokens.

    Its state has the K beams of `method` and caches of K · room slots, unless `num_beams` and
    `num_slots` say otherwise.
    """
    num_beams = num_beams or method.num_beams
    caches = []
    for model, variables in zip(models, params, strict=True):
        model = model.bind({"params": variables})
        encoded = model.encode(source_ids)
        caches.append(
            model.init_cache(
                encoded,
                source_ids,
                beam_size=num_beams,
                max_length=room,
                num_slots=num_slots,
            )
        )
    lengths = jnp.sum(source_ids != PAD_ID, axis=1, dtype=jnp.int32)
    most, fewest = jax.tree.map(lambda each: jnp.asarray(each)[lengths], limits)
    request = Request(most, fewest, prefix, keys)
    shape = source_ids.shape[0], num_beams, source_ids.shape[1]
    covers = isinstance(method, BeamSearch) and method.bonus is not None
    coverage = jnp.zeros(shape, jnp.float32) if covers else None
    return method.start(request, room, DecodingState(tuple(caches), coverage))


def prefill(
    models: tuple[Transformer, ...],
    params: tuple[Any, ...],
    method: Method,
    *given: Any,
) -> SearchState:
    """`start_search` for sentences that continue in rows of another search, which has the slots.

    It also takes the first step if `prefill_takes_first_step`: all beams are still equal, so it
    computes just one of them, in 1/K of the time.
    """
    if isinstance(method, BeamSearch) and prefill_takes_first_step(models, method):
        search = start_search(models, params, method, *given, num_beams=1, num_slots=1)
        return method.first(make_step_fn(models, params), search)
    return start_search(models, params, method, *given, num_slots=0)


def prefill_takes_first_step(models: Sequence[Transformer], method: Method) -> bool:
    """Whether `prefill` does: in a beam search, K > 1, over a vocabulary of at least 2K tokens."""
    searches = isinstance(method, BeamSearch)
    return searches and 1 < method.num_beams <= models[0].config.vocab_size // 2
