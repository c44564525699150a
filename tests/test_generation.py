"""The search over a Transformer: against the uncached model, alone and beside other sentences."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxformer.attention import MultiHeadAttention
from jaxformer.beam import TabledPenalty, gnmt_length_penalty, power_length_penalty
from jaxformer.config import BOS_ID, EOS_ID, PAD_ID
from jaxformer.decoder import DecoderLayer
from jaxformer.decoding import beam_search, sample
from jaxformer.errors import UserError
from jaxformer.feed_forward import FeedForward
from jaxformer.generation import Limits, decoding_params, generate, make_method, start_search
from jaxformer.generation_config import GenerationConfig
from jaxformer.generator import Generator
from jaxformer.scoring import attention_alignment, attention_maps, token_log_probs
from jaxformer.transformer import Transformer
from random_run import SEPARATE as CONFIG
from random_run import params_of, random_params
from train.benchmark.compiles import count_compiles

B, S, K = 5, 7, 3
OPTIONS = GenerationConfig(beam_size=K, max_length_extra=4)
T = S + 4


def sources(batch=B, length=S, seed=0):
    draw = np.random.default_rng(seed)
    ids = draw.integers(4, CONFIG.vocab_size, size=(batch, length)).astype(np.int32)
    for row in range(batch):
        real = int(draw.integers(2, length + 1)) if row else length
        ids[row, real - 1] = EOS_ID
        ids[row, real:] = PAD_ID
    return jnp.asarray(ids)


SOURCE = sources()


def search(options=OPTIONS, source=SOURCE, params=None, configs=(CONFIG,), **arguments):
    params = (params_of(),) if params is None else params
    return generate(configs, params, source, options, **arguments)


def test_one_model_is_an_ensemble_of_one():
    alone = generate(CONFIG, params_of(), SOURCE, OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, alone, search())
    labels = alone.sequences[:, 0]
    np.testing.assert_array_equal(
        token_log_probs(CONFIG, params_of(), SOURCE, labels),
        token_log_probs((CONFIG,), (params_of(),), SOURCE, labels),
    )


def test_a_model_may_be_bound_or_part_of_another():
    class Whole(nn.Module):
        def setup(self):
            self.part = Transformer(CONFIG)

        def translate(self, source):
            return generate(self.part, self.part.variables["params"], source, OPTIONS)

        def score(self, source, labels):
            return token_log_probs(self.part, self.part.variables["params"], source, labels)

    params, expected = params_of(), search()
    bound = Transformer(CONFIG).bind({"params": params})
    variables = {"params": {"part": params}}
    for found in (
        generate(bound, params, SOURCE, OPTIONS),
        Whole().apply(variables, SOURCE, method="translate"),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    labels = expected.sequences[:, 0]
    np.testing.assert_array_equal(
        Whole().apply(variables, SOURCE, labels, method="score"),
        token_log_probs(CONFIG, params, SOURCE, labels),
    )


def test_nothing_is_moved_unasked_that_is_on_the_device():
    params = jax.device_put(params_of())
    expected = search()
    with jax.transfer_guard("disallow"):
        found = generate(CONFIG, params, SOURCE, OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_ids": SOURCE[0]}, "source_ids are of shape (7,): give one row per sentence"),
        ({"options": {"beam_size": 2}}, "options are {'beam_size': 2}: give a GenerationConfig"),
        ({"prefix": SOURCE[:2]}, "prefix is of shape (2, 7): make it [5, P]"),
        ({"prefix": SOURCE[:, 0]}, "prefix is of shape (5,): make it [5, P]"),
        ({"keys": jnp.zeros((5, 3), jnp.uint32)}, "keys are of shape (5, 3): give one for each"),
        ({"keys": jax.random.key(0)}, "keys are of shape (): give one for each of 5 rows"),
    ],
)
def test_arguments_of_other_shapes(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=re.escape(message)):
        generate(CONFIG, params_of(), **({"source_ids": SOURCE} | arguments))


def test_lengths_are_those_of_the_rule():
    """Not those of float32, in which 1.3 times 90 is 116.99999."""
    options = GenerationConfig(max_length_ratio=1.3, max_length_extra=0, min_length_ratio=0.7)
    ids = jnp.full((2, 90), EOS_ID).at[1, 30:].set(PAD_ID)
    limits = Limits.of(options, 90, 117)
    method = make_method(options, 117)
    found = start_search(
        (Transformer(CONFIG),), (params_of(),), method, limits, 117, ids, None, None
    )
    assert found.request.max_lengths.tolist() == [117, 39]
    assert found.request.min_lengths.tolist() == [62, 21]


SEARCHED = [
    dict(length_penalty=0.0),
    dict(length_penalty=0.6),
    dict(length_penalty=1.0, max_length_ratio=0.5, max_length_extra=T - S // 2),
    dict(length_penalty=1.7, length_penalty_form="power"),
]


@pytest.mark.parametrize(
    "every",
    [
        [dict(beam_size=K, max_length_extra=4) | each for each in SEARCHED],
        [
            dict(beam_size=2, max_length_extra=1, coverage_penalty=beta, min_length_extra=m)
            for beta, m in ((1.0, 1), (9.5, 3))
        ],
        [
            dict(sampling=True, temperature=t, top_p=p)
            for t, p in ((1.0, 1.0), (0.3, 0.9), (1.7, 0.4))
        ],
    ],
)
def test_one_program_serves_all_numbers(every):
    def found(each):
        keys = jax.random.split(jax.random.key(0), B) if each.get("sampling") else None
        return search(GenerationConfig(**each), keys=keys)

    first = found(every[0])
    with count_compiles() as compiled:
        others = [found(each) for each in every[1:]]
    assert not compiled
    for other in others:
        assert not np.array_equal(first.scores, other.scores)


def test_a_looked_up_penalty_is_rounded_once():
    table = TabledPenalty.of(gnmt_length_penalty(0.6), 4)
    np.testing.assert_array_equal(
        table(jnp.array([[1.0, 3.0]])), np.float32([[1.0, (8 / 6) ** 0.6]])
    )
    assert TabledPenalty.of(power_length_penalty(100_000.0), 4)(jnp.array([2.0])) == np.inf


def test_the_softmax_layer_is_transposed_before_the_search():
    (prepared,) = decoding_params((Transformer(CONFIG),), (params_of(),))
    found = prepared["output_embedding"]
    np.testing.assert_array_equal(found["transposed"], found["embedding"].T)
    assert "transposed" not in prepared["embedding"]
    assert "transposed" not in prepared["decoder"]["layers"][0]["feed_forward"]["hidden"]


def test_for_a_cpu_so_is_the_decoder():
    (prepared,) = decoding_params((Transformer(CONFIG),), (params_of(),), for_cpu=True)
    for layer in prepared["decoder"]["layers"]:
        hidden = layer["feed_forward"]["hidden"]
        np.testing.assert_array_equal(hidden["transposed"], hidden["kernel"].T)
        output = layer["self_attention"]["output"]
        whole = output["kernel"].reshape(-1, CONFIG.d_model)
        np.testing.assert_array_equal(output["transposed"], whole.T)
    half = CONFIG.replace(dtype="bfloat16")
    (prepared,) = decoding_params((Transformer(half),), (params_of(),), for_cpu=True)
    assert "transposed" not in prepared["decoder"]["layers"][0]["feed_forward"]["hidden"]


def uncached(source, members):
    """A step function that computes everything anew from all tokens so far."""

    def step_fn(tokens, state):
        index, written = state["index"], state["written"]
        written = written.at[:, :, index].set(tokens)
        flat = written.reshape(-1, T)

        def logits_of(config, params):
            logits = Transformer(config).apply(
                {"params": params}, jnp.repeat(source, tokens.shape[1], axis=0), flat
            )
            return logits[:, index].reshape(*tokens.shape, -1)

        unspoken = jnp.array([PAD_ID, BOS_ID])
        probs = [
            jax.nn.softmax(logits_of(*member).at[:, :, unspoken].set(-jnp.inf))
            for member in members
        ]
        return jnp.log(sum(probs) / len(members)), {"index": index + 1, "written": written}

    return step_fn


@functools.partial(jax.jit, static_argnums=0)
def search_uncached(configs, params, source):
    lengths = jnp.sum(source != PAD_ID, axis=1)
    written = jnp.zeros((len(source), K, T), jnp.int32)
    return beam_search(
        uncached(source, list(zip(configs, params, strict=True))),
        {"index": jnp.int32(0), "written": written},
        batch_size=len(source),
        beam_size=K,
        max_length=T,
        length_limits=lengths + 4,
        reorder=lambda state, beams: {
            "index": state["index"],
            "written": jnp.take_along_axis(state["written"], beams[:, :, None], axis=1),
        },
    )


def assert_same(left, right, rtol=1e-4):
    np.testing.assert_array_equal(left.sequences, right.sequences)
    np.testing.assert_array_equal(left.lengths, right.lengths)
    np.testing.assert_allclose(left.scores, right.scores, rtol=rtol)
    np.testing.assert_allclose(left.log_probs, right.log_probs, rtol=rtol)


def assert_bit_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("members", [1, 2])
def test_it_is_beam_search_over_the_whole_model(members):
    configs = (CONFIG, CONFIG.replace(norm="pre"))[:members]
    params = tuple(params_of(config) for config in configs)
    found = search(configs=configs, params=params)
    assert_same(found, search_uncached(configs, params, SOURCE))
    assert len({tuple(row) for row in np.asarray(found.sequences[:, 0])}) == B, "one for all"
    lengths = np.asarray(found.lengths)
    assert lengths.min() < lengths.max()


@pytest.mark.parametrize("seed", range(4))
def test_neither_order_nor_company_changes_a_bit(seed):
    draw = np.random.default_rng(seed)
    order = draw.permutation(B)
    assert_bit_equal(search(source=SOURCE[order]), jax.tree.map(lambda x: x[order], search()))
    row = int(draw.integers(B))
    others = sources(seed=seed + 10).at[row].set(SOURCE[row])
    assert_bit_equal(
        jax.tree.map(lambda x: x[row], search(source=others)),
        jax.tree.map(lambda x: x[row], search()),
    )


def test_a_row_of_padding_has_the_empty_translation():
    result = search(source=SOURCE.at[2].set(PAD_ID))
    assert not np.asarray(result.sequences[2]).any()
    assert result.log_probs[2, 0] == 0.0 and result.lengths[2, 0] == 0
    assert result.log_probs[2, 1] == -np.inf


def flat_pairs(result, source=SOURCE):
    """Every hypothesis beside its source, as if it were a given translation."""
    target = result.sequences.reshape(-1, result.sequences.shape[-1])
    return jnp.repeat(source, result.sequences.shape[1], axis=0), target


def test_scores_of_a_given_translation_are_those_of_decoding():
    configs, params = (CONFIG, CONFIG.replace(norm="pre")), None
    params = tuple(params_of(config) for config in configs)
    result = search(configs=configs, params=params)
    log_probs = token_log_probs(configs, params, *flat_pairs(result))
    np.testing.assert_allclose(jnp.sum(log_probs, axis=1), result.log_probs.ravel(), rtol=1e-5)
    assert (np.asarray(log_probs)[np.asarray(flat_pairs(result)[1]) == PAD_ID] == 0).all()


def test_scores_have_gradients_beside_padding():
    # Only that of the last matrix, which costs no backward pass: NaN there is NaN everywhere.
    config = CONFIG.replace(encoder_layers=1, decoder_layers=1, embeddings="separate")
    params, labels = params_of(config), jnp.array([[5, EOS_ID, PAD_ID]])

    def total(last):
        own = params | {"output_embedding": last}
        return jnp.sum(token_log_probs(config, own, SOURCE[:1], labels))

    (gradient,) = jax.tree.leaves(jax.grad(total)(params["output_embedding"]))
    assert np.isfinite(gradient).all() and np.any(gradient)


class _Gate(nn.Module):
    """A user's own part, made of Flax's."""

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        width = x.shape[-1]
        return nn.sigmoid(nn.Dense(width)(x)) * nn.DenseGeneral((2, width // 2))(x).reshape(x.shape)


class _GatedLayer(DecoderLayer):
    def make_feed_forward(self, output_gain):
        return _Gate()


@pytest.mark.slow
def test_a_transformer_with_layers_of_ones_own_is_searched_like_any_other():
    model = Transformer(CONFIG, decoder_layer=_GatedLayer)
    params = jax.jit(model.init)(jax.random.key(0), SOURCE, SOURCE)["params"]
    result = generate(model, params, SOURCE, OPTIONS)
    source, labels = flat_pairs(result)
    log_probs = token_log_probs(model, params, source, labels)
    np.testing.assert_allclose(jnp.sum(log_probs, axis=1), result.log_probs.ravel(), rtol=1e-5)
    both = generate((model, CONFIG), (params, params_of()), SOURCE, OPTIONS)
    log_probs = token_log_probs((model, CONFIG), (params, params_of()), *flat_pairs(both))
    np.testing.assert_allclose(jnp.sum(log_probs, axis=1), both.log_probs.ravel(), rtol=1e-5)
    sentences = [[token for token in row if token != PAD_ID] for row in SOURCE.tolist()]
    for row, found in enumerate(
        Generator(model, params, jax.devices()[:1]).generate(sentences, OPTIONS)
    ):
        np.testing.assert_array_equal(found.sequences[:, :T], result.sequences[row])
        np.testing.assert_allclose(found.log_probs, result.log_probs[row], rtol=1e-5)
    weights = attention_maps(model, params, source, labels).cross
    assert weights.shape[:3] == (CONFIG.decoder_layers, B * K, CONFIG.num_heads)
    np.testing.assert_array_equal(
        attention_alignment(model, params, source, labels), weights[0].mean(axis=1)
    )


class _Experts(nn.Module):
    """Parameters with an axis for the experts, in modules whose names the library uses too."""

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        experts = nn.vmap(
            FeedForward,
            in_axes=None,
            out_axes=-1,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=3,
        )
        return jnp.mean(experts(5, name="feed_forward")(x), axis=-1)


class _ExpertsLayer(DecoderLayer):
    def make_feed_forward(self, output_gain):
        return _Experts()


class _Unseen(nn.Module):
    """An attention layer that stores no weights where they are looked for."""

    def setup(self):
        self.inner = MultiHeadAttention(CONFIG.num_heads, CONFIG.query_key_dim)

    def __call__(self, query_input, key_value_input, mask=None, *, deterministic=True):
        return self.attend(query_input, *self.project_key_value(key_value_input), mask)

    def project_key_value(self, x):
        return self.inner.project_key_value(x)

    def attend(self, query_input, key, value, mask=None, *, deterministic=True):
        return self.inner.attend(query_input, key, value, mask)


class _UnseenLayer(DecoderLayer):
    def make_attention(self, output_gain):
        return _Unseen()


@pytest.mark.parametrize(
    "layer", [pytest.param(_ExpertsLayer, marks=pytest.mark.slow), _UnseenLayer]
)
def test_parts_of_ones_own_may_have_other_parameters_and_no_weights_to_show(layer):
    model = Transformer(CONFIG, decoder_layer=layer)
    params = jax.jit(model.init)(jax.random.key(0), SOURCE, SOURCE)["params"]
    result = generate(model, params, SOURCE[:1], OPTIONS)
    log_probs = token_log_probs(model, params, *flat_pairs(result, SOURCE[:1]))
    np.testing.assert_allclose(jnp.sum(log_probs, axis=1), result.log_probs.ravel(), rtol=1e-5)
    sentence = [token for token in SOURCE[0].tolist() if token != PAD_ID]
    (found,) = Generator(model, params, jax.devices()[:1]).generate([sentence], OPTIONS)
    np.testing.assert_array_equal(found.sequences[:, :T], result.sequences[0])
    if layer is _UnseenLayer:
        with pytest.raises(UserError, match="coverage_penalty needs an attention that sows its"):
            generate(model, params, SOURCE, dataclasses.replace(OPTIONS, coverage_penalty=0.1))
        with pytest.raises(UserError, match="sows no attention_weights"):
            attention_maps(model, params, SOURCE, SOURCE)


def test_parts_of_ones_own_keep_the_dtype_of_their_parameters():
    model = Transformer(CONFIG.replace(dtype="bfloat16"), decoder_layer=_GatedLayer)
    params = jax.jit(model.init)(jax.random.key(0), SOURCE, SOURCE)["params"]
    (prepared,) = decoding_params((model,), (params,), for_cpu=True)
    layer = prepared["decoder"]["layers"][0]
    assert layer["self_attention"]["query"]["kernel"].dtype == jnp.bfloat16
    assert layer["feed_forward"]["Dense_0"]["kernel"].dtype == jnp.float32


class _Doubled(DecoderLayer):
    def __call__(self, *arguments, **options):
        return 2 * super().__call__(*arguments, **options)


def test_a_layer_that_would_not_decode_as_it_trains_is_refused():
    with pytest.raises(ValueError, match=r"_Doubled has a __call__ of its own.*: give it a decode"):
        generate(Transformer(CONFIG, decoder_layer=_Doubled), params_of(), SOURCE, OPTIONS)


@pytest.mark.parametrize(
    ("models", "params", "message"),
    [
        (CONFIG, None, "parameters are a dictionary, not NoneType: give variables"),
        (CONFIG, {1: 2}, "not the parameters of a Transformer, but 1: give variables"),
        ([CONFIG], [{}], "models are a list: give a tuple of models and a tuple of their param"),
        (CONFIG, {"params": {}}, "not the parameters of a Transformer, but params: give variables"),
        ((CONFIG, CONFIG), {}, "there are 2 models: give a tuple with the parameters of each"),
        ((CONFIG, CONFIG), ({},), "there are 2 models: give a tuple with the parameters of each"),
        (
            (CONFIG, CONFIG.replace(vocab_size=7)),
            ({"encoder": {}}, {"encoder": {}}),
            "the models have vocab_size 7, 61: give models that share one vocabulary",
        ),
        ("tiny", {"encoder": {}}, "a model is a Transformer or its TransformerConfig, not 'tiny'"),
    ],
)
def test_what_is_no_model_is_refused(models, params, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=message):
        generate(models, params, SOURCE, OPTIONS)


def test_no_sentences_have_no_hypotheses():
    assert search(source=SOURCE[:0]).sequences.shape == (0, K, T)


def test_coverage_penalty():
    options = GenerationConfig(
        beam_size=K, max_length_extra=4, coverage_penalty=0.7, length_penalty_form="power"
    )
    result = search(options)
    source, target = flat_pairs(result)
    weights = attention_maps(CONFIG, params_of(), source, target).cross[-1].mean(axis=1)
    covered = jnp.sum(jnp.where((target != PAD_ID)[:, :, None], weights, 0.0), axis=1)
    logs = jnp.where(source != PAD_ID, jnp.log(jnp.clip(covered, 1e-9, 1.0)), 0.0)
    lengths = result.lengths.ravel().astype(jnp.float32)
    expected = result.log_probs.ravel() / power_length_penalty(0.6)(lengths)
    expected += 0.7 * jnp.sum(logs, axis=1)
    np.testing.assert_allclose(result.scores.ravel(), expected, rtol=1e-4)


def test_attention_rows_are_distributions_over_the_source():
    source, target = flat_pairs(search())
    weights = np.asarray(attention_alignment(CONFIG, params_of(), source, target))
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert (weights[np.broadcast_to((source == PAD_ID)[:, None], weights.shape)] == 0).all()


def test_lengths_follow_the_source():
    options = GenerationConfig(
        beam_size=K,
        max_length_ratio=1.5,
        max_length_extra=2,
        min_length_ratio=1.0,
        min_length_extra=2,
    )
    # A model that tends to end at once.
    eager = jax.tree.map(jnp.asarray, random_params(CONFIG))
    result = search(options, params=(eager,))
    real = np.sum(np.asarray(SOURCE) != PAD_ID, axis=1)[:, None]
    lengths = np.asarray(result.lengths)
    assert (lengths <= np.floor(1.5 * real) + 2).all()
    assert (lengths >= real + 2).all()
    free = search(params=(eager,))
    assert (np.asarray(free.lengths) < real + 2).any(), "the minimum changed nothing"
    (by_ratio,) = [search(GenerationConfig(beam_size=K, min_length_ratio=1.0), params=(eager,))]
    assert (np.asarray(by_ratio.lengths) >= real).all()


def ngrams(tokens, size):
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


@pytest.mark.parametrize("sampling", [False, True])
def test_no_ngram_occurs_twice(sampling):
    options = {"beam_size": K, "max_length_extra": 40, "min_length_extra": 40}
    options |= {"sampling": True, "top_k": 2} if sampling else {}
    keys = jax.random.split(jax.random.key(0), B)
    repeated = []
    for size in (0, 2):
        config = GenerationConfig(no_repeat_ngram_size=size, **options)
        result = search(config, keys=keys if sampling else None)
        lists = [
            ngrams(row[:length], 2)
            for rows, lengths in zip(
                np.asarray(result.sequences).tolist(), np.asarray(result.lengths), strict=True
            )
            for row, length in zip(rows, lengths, strict=True)
        ]
        repeated.append(sum(len(found) - len(set(found)) for found in lists))
    assert repeated[0] > 0 and repeated[1] == 0


@pytest.mark.parametrize("sampling", [False, True])
def test_a_prefix_is_kept_and_counted(sampling):
    prefix = jnp.array([[9, 11, 13], [9, 0, 0], [0, 0, 0], [17, 18, 0], [20, 21, 22]], jnp.int32)
    keys = jax.random.split(jax.random.key(0), B)
    options = dataclasses.replace(OPTIONS, sampling=sampling)
    arguments = {"keys": keys} if sampling else {}
    result = search(options, prefix=prefix, **arguments)
    for row in range(B):
        forced = [int(token) for token in prefix[row] if token]
        for hypothesis in np.asarray(result.sequences[row]).tolist():
            assert hypothesis[: len(forced)] == forced
    log_probs = token_log_probs((CONFIG,), (params_of(),), *flat_pairs(result))
    np.testing.assert_allclose(jnp.sum(log_probs, axis=1), result.log_probs.ravel(), rtol=1e-4)
    free = search(options, **arguments)
    np.testing.assert_array_equal(result.sequences[2], free.sequences[2])  # from another program
    np.testing.assert_allclose(result.scores[2], free.scores[2], rtol=1e-5)


@pytest.mark.parametrize("sampling", [False, True])
def test_the_best_alone_are_the_first_of_all(sampling):
    options = dataclasses.replace(OPTIONS, sampling=sampling)
    keys = jax.random.split(jax.random.key(6), B) if sampling else None
    every = search(options, keys=keys)
    best = search(dataclasses.replace(options, n_best=2), keys=keys)
    np.testing.assert_array_equal(best.sequences, every.sequences[:, :2])
    np.testing.assert_allclose(best.scores, every.scores[:, :2], rtol=1e-6)


def test_samples_follow_their_keys():
    options = dataclasses.replace(OPTIONS, sampling=True)
    keys = jax.random.split(jax.random.key(3), B)
    result = search(options, keys=keys)
    order = np.array([3, 1, 4, 0, 2])
    moved = search(options, source=SOURCE[order], keys=keys[order])
    assert_bit_equal(moved, jax.tree.map(lambda x: x[order], result))
    other = search(options, keys=jax.random.split(jax.random.key(4), B))
    assert (np.asarray(other.sequences) != np.asarray(result.sequences)).any()
    assert len({tuple(row) for row in np.asarray(result.sequences[0]).tolist()}) > 1


def test_samples_at_temperature_zero_are_greedy():
    keys = jax.random.split(jax.random.key(3), B)
    drawn = search(GenerationConfig(beam_size=1, sampling=True, temperature=0.0), keys=keys)
    greedy = search(GenerationConfig(beam_size=1))
    np.testing.assert_array_equal(drawn.sequences, greedy.sequences)
    np.testing.assert_allclose(drawn.log_probs, greedy.log_probs, rtol=1e-6)


def test_bfloat16_weights_are_cast_once():
    config = CONFIG.replace(dtype="bfloat16")
    (params,) = decoding_params((Transformer(config),), (params_of(),))
    assert isinstance(params["decoder"]["layers"], tuple)
    dtypes = {
        path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert dtypes["kernel"] == dtypes["embedding"] == jnp.bfloat16
    assert dtypes["scale"] == dtypes["bias"] == jnp.float32
    half = search(GenerationConfig(beam_size=1), configs=(config,))
    whole = search(GenerationConfig(beam_size=1))
    same = np.asarray(half.sequences[:, 0, 0]) == np.asarray(whole.sequences[:, 0, 0])
    assert same.mean() > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_size": 0}, "beam_size is 0: give at least 1"),
        ({"beam_size": 2.0}, "beam_size is 2.0: give a whole number"),
        ({"n_best": True}, "n_best is True: give a whole number or None"),
        ({"length_penalty": None}, "length_penalty is None: give a number"),
        ({"sampling": "no"}, "sampling is 'no': give True or False"),
        ({"length_penalty": -1.0}, "length_penalty is -1.0: give at least 0"),
        ({"n_best": 5}, "n_best is 5: give 1 to 4, at most the number of beams"),
        ({"n_best": 0}, "n_best is 0: give at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5: give more than 0, at most 1"),
        ({"top_k": 0}, "top_k is 0: give at least 1"),
        ({"max_length_ratio": float("inf")}, "max_length_ratio is inf: give at most 100,000"),
        ({"max_length_extra": 10**8}, "max_length_extra is 100000000: give at most 100,000"),
        (
            {"sampling": True, "temperature": float("inf")},
            "temperature is inf: give 0, or 1e-30 to 1e30",
        ),
        (
            {"sampling": True, "length_penalty": 1.0},
            "length_penalty is 1.0: it has no effect with sampling: leave it out",
        ),
        ({"temperature": float("nan")}, "temperature is nan: give 0, or 1e-30 to 1e30"),
        ({"top_k": 3}, "top_k is 3: it has no effect without sampling: set sampling too"),
        (
            {"early_stopping": True, "sampling": True},
            "early_stopping is True: it has no effect with sampling: leave it out",
        ),
    ],
)
def test_impossible_options(monkeypatch, changes, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(UserError) as raised:
        GenerationConfig(**changes)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 2, "coverage_penalty": 0.2, "min_length_extra": 2},
        {"no_repeat_ngram_size": 2, "sampling": True, "top_p": 0.9},
    ],
)
def test_searches_promote_nothing_and_stay_in_float32(options):
    options = GenerationConfig(beam_size=2, max_length_extra=3, **options)
    ids = jnp.ones((2, 3), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2) if options.sampling else None
    arguments = {"prefix": ids, "keys": keys}
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.enable_x64(True),
    ):
        params = jax.tree.map(jnp.asarray, params_of())
        program = functools.partial(generate, (CONFIG,), options=options)
        found = jax.eval_shape(program, (params,), ids, **arguments)
    assert found.scores.dtype == jnp.float32


def test_sampling_is_the_sampling_of_the_decoding_module():
    """The same keys, folded in by row, give the same draws as `sample` over the same model."""
    rng = jax.random.key(11)
    drawn = {"temperature": 0.8, "top_k": 7, "top_p": 0.9}
    options = GenerationConfig(beam_size=2, max_length_extra=4, sampling=True, **drawn)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.arange(B))
    found = search(options, keys=keys)
    (params,) = decoding_params((Transformer(CONFIG),), (params_of(),))

    def step_fn(tokens, cache):
        logits, cache = Transformer(CONFIG).apply(
            {"params": params}, tokens, cache, method="decode_step"
        )
        return logits.at[:, :, jnp.array([PAD_ID, BOS_ID])].set(-jnp.inf), cache

    @jax.jit
    def draw():
        model = Transformer(CONFIG).bind({"params": params})
        cache = model.init_cache(model.encode(SOURCE), SOURCE, beam_size=2, max_length=T)
        limits = jnp.sum(SOURCE != PAD_ID, axis=1) + 4
        shape = {"batch_size": B, "max_length": T, "num_samples": 2}
        return sample(step_fn, cache, rng, length_limits=limits, **shape, **drawn)

    expected = draw()
    np.testing.assert_array_equal(found.sequences, expected.sequences)


def test_a_most_of_no_tokens_is_the_empty_translation():
    options = GenerationConfig(beam_size=1, max_length_ratio=0.0, max_length_extra=0)
    found = search(options)
    assert not found.sequences.any() and not found.lengths.any()


def test_a_minimum_above_the_maximum_is_the_maximum():
    """However much room padding gives; the last token may be eos."""
    options = GenerationConfig(beam_size=1, max_length_extra=0, min_length_ratio=2.0)
    found = search(options)
    padded = jnp.pad(SOURCE, ((0, 0), (0, 24)))
    wider = search(options, padded)
    width = found.sequences.shape[2]
    np.testing.assert_array_equal(found.sequences, wider.sequences[:, :, :width])
    np.testing.assert_array_equal(found.lengths, wider.lengths)


def test_coverage_of_an_ensemble_is_the_mean_of_its_members():
    options = GenerationConfig(beam_size=K, max_length_extra=4, coverage_penalty=0.7)
    twice = search(options, configs=(CONFIG, CONFIG), params=(params_of(), params_of()))
    assert_same(twice, search(options))
