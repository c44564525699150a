"""The model: what may influence what, and that every way of computing it agrees.

Three models cover every choice of the configuration between them. Their parameters are random
numbers, biases and scales included, so that nothing is right because it starts as 0 or 1.
"""

import contextlib
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from jaxformer.attention import MultiHeadAttention
from jaxformer.config import BOS_ID, PAD_ID, PRESETS, TransformerConfig
from jaxformer.decoder import Decoder, DecoderLayer
from jaxformer.embedding import Embedding
from jaxformer.encoder import Encoder, EncoderLayer
from jaxformer.errors import UserError
from jaxformer.feed_forward import FeedForward
from jaxformer.linear import Linear
from jaxformer.positions import PositionalEncoding
from jaxformer.stack import unstack_layers
from jaxformer.transformer import Transformer

B, S, T, K = 6, 8, 6, 3

_COMMON = TransformerConfig(
    vocab_size=23, d_model=12, d_ff=17, num_heads=2, head_dim=5, value_dim=7, max_length=9
)
CONFIGS = {
    "paper": _COMMON.replace(encoder_layers=2, decoder_layers=1),
    "modern": _COMMON.replace(
        norm="pre",
        embeddings="target",
        source_vocab_size=29,
        positions="learned",
        activation="swiglu",
        attention_bias=True,
        encoder_layers=1,
        decoder_layers=2,
        scan_layers=True,
    ),
    "imported": _COMMON.replace(
        embeddings="separate",
        source_vocab_size=19,
        positions="sinusoidal_concat",
        activation="gelu",
        attention_bias=True,
        output_bias=True,
        encoder_layers=1,
        decoder_layers=2,
        remat=True,
    ),
}
MODERN = CONFIGS["modern"]
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

TYPES = CONFIGS | {"bfloat16": CONFIGS["modern"].replace(dtype="bfloat16")}
every_type = pytest.mark.parametrize("config", TYPES.values(), ids=TYPES)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Programs run once, on little data: optimising them would take longer than all the rest."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def shapes_of(config):
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), ids, ids)["params"]


@functools.cache
def random_params(config, seed=0):
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes_of(config))


def random_sentences(lengths, width, vocab_size, seed=0):
    """Ids [len(lengths), width] without the special ones; padding after each length."""
    ids = np.random.default_rng(seed).integers(4, vocab_size, (len(lengths), width))
    return np.where(np.arange(width) < np.array(lengths)[:, None], ids, PAD_ID).astype(np.int32)


def shift_right(labels):
    """The decoder's input: bos, then all labels but the last."""
    ids = np.concatenate([np.full((len(labels), 1), BOS_ID, np.int32), labels[:, :-1]], axis=1)
    return np.where(labels == PAD_ID, PAD_ID, ids)


SOURCE_LENGTHS, TARGET_LENGTHS = [7, 4, 5, 3, 6, 2], [5, 3, 4, 2, 5, 1]
SOURCE = random_sentences(SOURCE_LENGTHS, S, 19)
LABELS = random_sentences(TARGET_LENGTHS, T, 23, seed=1)
TARGET = shift_right(LABELS)
REAL_TARGET = LABELS != PAD_ID


@contextlib.contextmanager
def added_to_embeddings(source, target):
    """Add to the vectors that enter the two stacks, however the model embeds ids."""
    extra = {"source_positions": source, "target_positions": target}

    def add(next_function, args, kwargs, context):
        out = next_function(*args, **kwargs)
        name = context.module.name
        return out + extra[name].astype(out.dtype) if name in extra else out

    with nn.intercept_methods(add):
        yield


traces = []


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, source_ids, target_ids, source_delta, target_delta):
    traces.append(model)
    with added_to_embeddings(source_delta, target_delta):
        return model.apply({"params": params}, source_ids, target_ids)


def logits_of(
    config, source_ids=SOURCE, target_ids=TARGET, source_delta=None, target_delta=None, params=None
):
    """Run the configuration's one compiled program, as long as shapes are the same."""

    def none(ids):
        return np.zeros((*ids.shape, config.d_model), np.float32)

    return forward(
        Transformer(config),
        random_params(config) if params is None else params,
        source_ids,
        target_ids,
        none(source_ids) if source_delta is None else source_delta,
        none(target_ids) if target_delta is None else target_delta,
    )


def tolerance_of(config):
    return 2e-5 if config.dtype == "float32" else 2e-2


def assert_close(actual, expected, tolerance=2e-5):
    """Within `tolerance` of the largest number, leaf by leaf."""

    def check(path, actual, expected):
        actual, expected = np.asarray(actual), np.asarray(expected)
        largest = np.max(np.abs(expected), initial=1e-30)
        np.testing.assert_allclose(
            actual / largest, expected / largest, rtol=0, atol=tolerance, err_msg=str(path)
        )

    jax.tree_util.tree_map_with_path(check, actual, expected)


# What comes out


@every_config
def test_logits(config):
    logits = logits_of(config)
    assert logits.shape == (B, T, config.vocab_size)
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits))
    assert len(np.unique(np.asarray(logits)[REAL_TARGET], axis=0)) == REAL_TARGET.sum()


def test_the_second_call_compiles_nothing():
    """Neither for other ids, nor for another module of an equal configuration."""
    logits_of(MODERN)
    before = len(traces)
    config = TransformerConfig.from_dict(MODERN.to_dict())
    logits_of(config, SOURCE[::-1], TARGET[::-1], params=random_params(MODERN, seed=1))
    assert len(traces) == before


def test_parameters_are_drawn_by_a_program_of_one_layer():
    """However many layers there are, and although the step is unrolled."""

    def program(num_layers: int) -> str:
        config = _COMMON.replace(encoder_layers=num_layers, decoder_layers=num_layers)
        ids = jnp.ones((1, 2), jnp.int32)
        return jax.jit(Transformer(config).init).lower(jax.random.key(0), ids, ids).as_text()

    assert program(2).count("\n") == program(5).count("\n")


def test_shapes_of_the_big_model():
    """Without allocating anything."""
    config = PRESETS["big"]
    model = Transformer(config)
    source_ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    target_ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    variables = {"params": shapes_of(config)}
    logits = jax.eval_shape(model.apply, variables, source_ids, target_ids)
    assert logits.shape == (2, 3, 37_000) and logits.dtype == jnp.float32
    encode = functools.partial(model.apply, method=model.encode)
    encoded = jax.eval_shape(encode, variables, source_ids)
    assert encoded.shape == (2, 5, 1024) and encoded.dtype == jnp.float32


# Parameters


def names(params):
    """{"encoder/layers/feed_forward/hidden/kernel": shape, ...}"""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


@every_config
def test_parameters_are_float32_and_the_stacks_as_deep_as_asked(config):
    params = shapes_of(config.replace(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        leaves = jax.tree.leaves(params[stack]["layers"])
        assert {leaf.shape[0] for leaf in leaves} == {layers}


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_only_pre_norm_has_a_norm_after_each_stack(norm):
    params = names(shapes_of(_COMMON.replace(norm=norm)))
    final = {
        f"{stack}/layer_norm/{p}" for stack in ("encoder", "decoder") for p in ("scale", "bias")
    }
    assert final & set(params) == (final if norm == "pre" else set())


def test_embedding_matrices():
    def matrices(embeddings, **sizes):
        params = names(shapes_of(_COMMON.replace(embeddings=embeddings, **sizes)))
        return {name: shape for name, shape in params.items() if "/layers/" not in name}

    one, other = (23, 12), (29, 12)
    assert matrices("shared") == {"embedding/embedding": one}
    assert matrices("target", source_vocab_size=29) == {
        "embedding/embedding": one,
        "source_embedding/embedding": other,
    }
    assert matrices("separate", source_vocab_size=29) == {
        "embedding/embedding": one,
        "source_embedding/embedding": other,
        "output_embedding/embedding": one,
    }
    # Learned positions: each side has its own (Table 3 (E)).
    learned = matrices("shared", positions="learned")
    assert set(learned) - {"embedding/embedding"} == {
        "source_positions/embedding",
        "target_positions/embedding",
    }


@every_config
def test_scan_layers_and_remat_leave_the_parameters_as_they_are(config):
    """So that a checkpoint fits whichever way the next run is compiled."""
    trees = [
        names(shapes_of(config.replace(scan_layers=scan, remat=remat)))
        for scan in (False, True)
        for remat in (False, True)
    ]
    assert all(tree == trees[0] for tree in trees)


def test_initialisation():
    init = jax.jit(Transformer(MODERN).init)
    params, again, other = (
        init(jax.random.key(seed), SOURCE[:1], TARGET[:1])["params"] for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, params, again)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        match path[-1].key:
            case "bias":
                assert not np.any(leaf), path
            case "scale":
                assert np.all(leaf == 1), path
            case "kernel":  # drawn anew for each layer, with the variance for its fan
                assert len(np.unique(leaf)) > 0.99 * leaf.size, path
                heads = (0, 1) if path[-2].key in ("query", "key", "value") else ()
                fan_in = 12 if heads else math.prod(leaf.shape[1:-1])
                fan_out = leaf[0].size // fan_in
                limit = (6 / (fan_in + fan_out)) ** 0.5
                if path[-2].key == "output":  # 2 sub-layers a layer, or 3
                    sublayers = {"encoder": 2, "decoder": 3}[path[0].key] * len(leaf)
                    limit *= sublayers**-0.5
                assert 0.9 * limit < np.max(np.abs(leaf)) <= limit, path
            case "embedding":
                assert np.std(leaf) == pytest.approx(12**-0.5, rel=0.15), path
    kernels = [params["encoder"]["layers"]["feed_forward"]["hidden"]["kernel"]]
    kernels.append(other["encoder"]["layers"]["feed_forward"]["hidden"]["kernel"])
    assert np.all(kernels[0] != kernels[1])


@pytest.mark.parametrize("layers", [4, 12])
def test_positions_stay_apart_in_a_new_encoder(layers):
    """Otherwise the decoder's attention could not tell them apart, and would learn nothing."""
    config = TransformerConfig(
        vocab_size=500, d_model=64, d_ff=96, num_heads=4, encoder_layers=layers, decoder_layers=1
    )
    draw = np.random.default_rng(0)
    ids = jnp.asarray(draw.integers(4, 500, size=(3, 17)), jnp.int32)
    model = Transformer(config)
    params = model.init(jax.random.key(0), ids, ids)["params"]
    encoded = np.asarray(model.apply({"params": params}, ids, method="encode"))
    inside = encoded - encoded.mean(axis=1, keepdims=True)
    assert np.mean(inside**2) > 0.4 * np.mean(encoded**2)


# What may influence what


@every_type
def test_later_target_tokens_have_no_influence(config):
    """Sentence b of six equal ones is disturbed at position b: no bit before it changes."""
    source_ids, target_ids = np.tile(SOURCE[:1], (T, 1)), np.tile(TARGET[:1], (T, 1))
    disturbance = 10 * np.repeat(np.eye(T, dtype=np.float32)[:, :, None], config.d_model, -1)
    disturbance[:, :, ::2] *= -0.5
    plain = logits_of(config, source_ids, target_ids)
    disturbed = logits_of(config, source_ids, target_ids, target_delta=disturbance)
    influenced = np.any(plain != disturbed, axis=-1)
    np.testing.assert_array_equal(influenced, np.triu(np.ones((T, T), bool)))


def test_later_target_tokens_have_no_gradient():
    """d logits[t] / d embedding[s] is exactly 0 for s > t, and not 0 for s <= t."""
    config = CONFIGS["paper"]
    source_ids, target_ids = np.tile(SOURCE[:1], (T, 1)), np.tile(TARGET[:1], (T, 1))
    direction = np.random.default_rng(3).normal(size=(T, T, config.d_model)).astype(np.float32)
    direction *= np.eye(T, dtype=np.float32)[:, :, None]

    def logits(target_delta):
        return logits_of(config, source_ids, target_ids, target_delta=target_delta)

    _, derivative = jax.jvp(logits, (np.zeros_like(direction),), (direction,))
    influenced = np.any(derivative != 0, axis=-1)
    np.testing.assert_array_equal(influenced, np.triu(np.ones((T, T), bool)))


@every_type
def test_padding_has_no_influence_whatever_it_holds(config):
    disturbance = np.full((B, S, config.d_model), 10, np.float32)
    disturbance[:, :, ::2] *= -0.5
    in_padding = np.where((SOURCE == PAD_ID)[:, :, None], disturbance, 0)
    plain = logits_of(config)
    np.testing.assert_array_equal(plain, logits_of(config, source_delta=in_padding))
    assert np.all(plain != logits_of(config, source_delta=disturbance - in_padding))


def test_more_padding_has_no_influence():
    source_ids, target_ids = np.pad(SOURCE, ((0, 0), (0, 1))), np.pad(TARGET, ((0, 0), (0, 3)))
    longer = logits_of(MODERN, source_ids, target_ids)[:, :T]
    assert_close(longer[REAL_TARGET], logits_of(MODERN)[REAL_TARGET])


@every_config
def test_the_rest_of_the_batch_has_no_influence(config):
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(
        logits_of(config, SOURCE[order], TARGET[order]), logits_of(config)[order]
    )


# Packed rows

# The sentence pairs of each row, in order.
ROWS = [[0, 1], [2, 3, 5], [4]]


def pack(sentences, lengths, width):
    """ids and segment ids [len(ROWS), width]"""
    ids, segment_ids = np.zeros((2, len(ROWS), width), np.int32)
    for row, pairs in enumerate(ROWS):
        start = 0
        for segment, pair in enumerate(pairs, start=1):
            end = start + lengths[pair]
            ids[row, start:end] = sentences[pair, : lengths[pair]]
            segment_ids[row, start:end] = segment
            start = end
    return ids, segment_ids


def unpack(rows):
    """The first TARGET_LENGTHS[pair] positions of each pair, pair after pair."""
    parts = {}
    for row, pairs in enumerate(ROWS):
        start = 0
        for pair in pairs:
            parts[pair] = rows[row, start : start + TARGET_LENGTHS[pair]]
            start += TARGET_LENGTHS[pair]
    return np.concatenate([parts[pair] for pair in sorted(parts)])


PACKED_SOURCE, SOURCE_SEGMENTS = pack(SOURCE, SOURCE_LENGTHS, 13)
PACKED_TARGET, TARGET_SEGMENTS = pack(TARGET, TARGET_LENGTHS, 11)
PACKED_LABELS, _ = pack(LABELS, TARGET_LENGTHS, 11)
SEGMENTS = {"source_segment_ids": SOURCE_SEGMENTS, "target_segment_ids": TARGET_SEGMENTS}


@every_type
def test_packed_pairs_have_the_logits_they_have_alone(config):
    """Also with learned positions, in a row that is longer than any position in it."""
    apply = jax.jit(Transformer(config).apply)
    variables = {"params": random_params(config)}
    packed = apply(variables, PACKED_SOURCE, PACKED_TARGET, **SEGMENTS)
    assert np.all(np.isfinite(packed))
    assert_close(unpack(packed), logits_of(config)[REAL_TARGET], tolerance_of(config))


def loss_sums_and_gradients(config, source_ids, target_ids, labels, **segments):
    model = Transformer(config)

    @jax.jit
    def run(params, ids, segments):
        def loss(params):
            sums = model.apply({"params": params}, *ids, **segments, method="loss")
            return sums.loss, sums

        return jax.grad(loss, has_aux=True)(params)

    gradients, sums = run(random_params(config), (source_ids, target_ids, labels), segments)
    return sums, gradients


@functools.cache
def plain_sums_and_gradients():
    """With a pair of nothing but padding, like those that fill up the last batch of an epoch."""
    ids = (np.pad(rows, ((0, 1), (0, 0))) for rows in (SOURCE, TARGET, LABELS))
    return loss_sums_and_gradients(MODERN, *ids)


def without_key_biases(gradients):
    """Softmax ignores a bias of the keys: its exact gradient is 0, here a rounding error."""
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if (path[-2].key, path[-1].key) != ("key", "bias")
    }


def test_loss_is_the_cross_entropy_of_the_logits():
    sums, gradients = plain_sums_and_gradients()
    log_probs = np.asarray(jax.nn.log_softmax(logits_of(MODERN)), np.float64)[REAL_TARGET]
    nll = -log_probs[np.arange(len(log_probs)), LABELS[REAL_TARGET]].sum()
    uniform = -log_probs.mean(axis=-1).sum()
    smoothing = MODERN.label_smoothing
    assert float(sums.weight) == sum(TARGET_LENGTHS)
    assert float(sums.nll) == pytest.approx(nll, rel=1e-5)
    assert float(sums.loss) == pytest.approx((1 - smoothing) * nll + smoothing * uniform, rel=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    assert all(np.any(leaf) for leaf in without_key_biases(gradients).values())


def test_the_loss_has_all_of_the_output_bias_in_bfloat16_too():
    """As the logits do: in bfloat16, a bias of 6 would be off by up to 0.016."""
    config = CONFIGS["imported"].replace(label_smoothing=0.0)
    params = random_params(config)
    bias = jnp.linspace(5, 7, config.vocab_size)
    unsaid = max(set(range(4, config.vocab_size)) - set(np.asarray(LABELS).ravel().tolist()))
    arguments = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    for never, dtype, stored in (
        (bias[unsaid], "bfloat16", jnp.float32),
        (-jnp.inf, "bfloat16", jnp.float32),
        (jnp.finfo(jnp.float32).min, "bfloat16", jnp.float32),
        (-jnp.inf, "float32", jnp.bfloat16),
    ):
        variables = {**params, "output_bias": bias.at[unsaid].set(never)}
        variables = jax.tree.map(lambda x, stored=stored: x.astype(stored), variables)
        model = Transformer(config.replace(dtype=dtype)).bind({"params": variables})
        logits = np.asarray(model(*arguments), np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        nll = -np.take_along_axis(log_probs, np.asarray(LABELS)[..., None], axis=-1)[..., 0]
        sums = model.loss(*arguments, jnp.asarray(LABELS))
        assert float(sums.loss) == pytest.approx(nll[REAL_TARGET].sum(), rel=1e-5)


def test_packed_pairs_have_the_loss_and_gradients_they_have_alone():
    packed = loss_sums_and_gradients(
        MODERN, PACKED_SOURCE, PACKED_TARGET, PACKED_LABELS, **SEGMENTS
    )
    assert_gradients_agree(packed, plain_sums_and_gradients())


def assert_gradients_agree(actual, expected):
    for name in ("loss", "nll", "weight"):
        assert float(getattr(actual[0], name)) == pytest.approx(
            float(getattr(expected[0], name)), rel=1e-5
        )

    assert_close(without_key_biases(actual[1]), without_key_biases(expected[1]))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ((4,), (4,), r"source_ids are of shape \(4,\): give rows of ids"),
        ((2, 0), (2, 4), r"source_ids are of shape \(2, 0\): give rows of ids"),
        ((2, 4), (2, 0), r"target_ids are of shape \(2, 0\): give rows of ids"),
        ((2, 4), (3, 4), "there are 2 rows of source_ids and 3 of target_ids"),
    ],
)
def test_ids_of_other_shapes(source, target, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(
            Transformer(_COMMON).init,
            jax.random.key(0),
            *(jnp.ones(s, jnp.int32) for s in (source, target)),
        )


def test_a_name_is_no_config(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match="config is of type str: give a TransformerConfig"):
        Transformer("tiny").init(jax.random.key(0), PACKED_SOURCE, PACKED_TARGET)


def test_packing_one_side_only_is_refused():
    config = CONFIGS["paper"]
    apply = functools.partial(Transformer(config).apply, {"params": random_params(config)})
    for name, segment_ids in SEGMENTS.items():
        with pytest.raises(ValueError, match="segment ids on both sides"):
            jax.eval_shape(apply, PACKED_SOURCE, PACKED_TARGET, **{name: segment_ids})


# Other ways to compute the same


@pytest.mark.parametrize(
    "changes", [{"remat": True}, {"remat": True, "scan_layers": False}], ids=["scan", "unrolled"]
)
def test_remat_and_unrolling_change_no_gradient(changes):
    ids = (np.pad(rows, ((0, 1), (0, 0))) for rows in (SOURCE, TARGET, LABELS))
    other = loss_sums_and_gradients(MODERN.replace(**changes), *ids)
    assert_gradients_agree(other, plain_sums_and_gradients())


@functools.partial(jax.jit, static_argnums=0)
def decode(model, params, source_ids, tokens, beams):
    """Logits [T, B, K, V] of tokens [T, B, K], reordered by beams [T, B, K] before each step."""
    apply = functools.partial(model.apply, {"params": params})
    encoded = apply(source_ids, method="encode")
    cache = apply(encoded, source_ids, beam_size=K, max_length=T, method="init_cache")

    def step(cache, inputs):
        tokens, beams = inputs
        logits, cache = apply(tokens, cache.reorder(beams), method="decode_step")
        return cache, logits

    cache, logits = jax.lax.scan(step, cache, (tokens, beams))
    return logits, cache.index


@every_type
def test_cached_decoding_is_the_full_forward_pass(config):
    """Two sentences; each of their beams has its own past, and at step 3 takes over another's."""
    sentences = [1, 4]
    tokens = random_sentences([T] * 2 * K, T, 23, seed=2).reshape(2, K, T)
    tokens[:, :, 0] = BOS_ID
    beams = np.tile(np.arange(K, dtype=np.int32), (T, 2, 1))
    beams[3] = [[2, 2, 0], [1, 0, 0]]
    logits, index = decode(
        Transformer(config),
        random_params(config),
        SOURCE[sentences],
        np.moveaxis(tokens, -1, 0),
        beams,
    )
    logits = np.moveaxis(logits, 0, 2)
    np.testing.assert_array_equal(index, [T, T])

    def full(tokens):
        source_ids = np.repeat(SOURCE[sentences], K, axis=0)
        return np.asarray(logits_of(config, source_ids, tokens.reshape(-1, T))).reshape(
            logits.shape
        )

    tolerance = tolerance_of(config)
    assert_close(logits[:, :, :3], full(tokens)[:, :, :3], tolerance)
    past = np.take_along_axis(tokens[:, :, :3], beams[3][:, :, None], axis=1)
    reordered = np.concatenate([past, tokens[:, :, 3:]], axis=-1)
    assert_close(logits[:, :, 3:], full(reordered)[:, :, 3:], tolerance)


def test_bfloat16_is_close_to_float32():
    bfloat16 = MODERN.replace(dtype="bfloat16")
    logits = logits_of(bfloat16)
    assert logits.dtype == jnp.float32
    exact = logits_of(MODERN)[REAL_TARGET]
    error = np.std(logits[REAL_TARGET] - exact) / np.std(exact)
    assert 1e-4 < error < 0.03  # a different computation, and a good one
    encode = functools.partial(Transformer(bfloat16).apply, method="encode")
    encoded = jax.eval_shape(encode, {"params": shapes_of(bfloat16)}, SOURCE)
    assert encoded.dtype == jnp.bfloat16


def test_vmap_over_a_batch_of_batches():
    model, params = Transformer(MODERN), random_params(MODERN)

    def apply(source_ids, target_ids):
        return model.apply({"params": params}, source_ids, target_ids)

    batches = jax.jit(jax.vmap(apply))(SOURCE.reshape(2, 3, S), TARGET.reshape(2, 3, T))
    assert_close(batches.reshape(B, T, -1), logits_of(MODERN))


# Dropout


def test_training_mode():
    config = MODERN.replace(dropout=0.1, attention_dropout=0.2, activation_dropout=0.3)
    model, variables = Transformer(config), {"params": random_params(MODERN)}

    @jax.jit
    def train(rng, source_ids, target_ids):
        rngs = {"dropout": rng}
        return model.apply(variables, source_ids, target_ids, deterministic=False, rngs=rngs)

    one, again, other = (train(jax.random.key(seed), SOURCE, TARGET) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.mean(one != other) > 0.99
    assert np.mean(one != logits_of(MODERN)) > 0.99
    assert np.all(np.isfinite(one))


def test_each_rate_is_applied_in_every_place_that_has_it():
    """Counted by module path and input shape, because the sides differ in length."""

    def calls(**rates):
        config = _COMMON.replace(**{"dropout": 0.0, "scan_layers": True, **rates})
        made = []

        def count(next_function, args, kwargs, context):
            if getattr(context.module, "rate", 0) > 0:
                made.append((context.module.path, args[0].shape))
            return next_function(*args, **kwargs)

        def run(params, rng, *ids):
            apply = functools.partial(Transformer(config).apply, rngs={"dropout": rng})
            return apply({"params": params}, *ids, deterministic=False)

        params = shapes_of(config)
        with nn.intercept_methods(count):
            jax.eval_shape(run, params, jax.random.key(0), SOURCE, TARGET)
        return len(set(made))

    assert calls() == 0
    assert calls(dropout=0.1) == 2 + 2 + 3  # embeddings of each side; sub-layers of each layer
    assert calls(attention_dropout=0.1) == 1 + 2
    assert calls(activation_dropout=0.1) == 1 + 1


def test_every_layer_draws_its_own_dropout():
    """Each layer adds ones, half of them dropped, the rest doubled: 0, 2 and 4, not 0 and 4."""
    config = _COMMON.replace(norm="pre", encoder_layers=2, dropout=0.5, scan_layers=True)
    encoder, x = Encoder(config), jnp.zeros((3, S, config.d_model))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params = variables["params"]
    params["layers"]["feed_forward"]["output"]["bias"] += 1
    params["layer_norm"]["scale"] += 1

    @jax.jit
    def run(rng):
        return encoder.apply(variables, x, deterministic=False, rngs={"dropout": rng})

    distinct = [len(np.unique(row.round(3))) for row in run(jax.random.key(0)).reshape(-1, 12)]
    assert max(distinct) == 3


# The model in other hands


def test_attention_weights_of_every_layer():
    variables = {"params": shapes_of(MODERN)}
    apply = functools.partial(Transformer(MODERN).apply, mutable=["intermediates"])
    _, state = jax.eval_shape(apply, variables, SOURCE, TARGET)
    shapes = jax.tree.map(lambda leaf: leaf.shape, state["intermediates"])
    weights = {"self_attention": {"attention_weights": ((1, B, 2, S, S),)}}
    assert shapes["encoder"]["layers"] == weights
    assert shapes["decoder"]["layers"] == {
        "self_attention": {"attention_weights": ((2, B, 2, T, T),)},
        "cross_attention": {"attention_weights": ((2, B, 2, T, S),)},
    }


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("paper", "bfloat16"),
        ("modern", "float32"),
        ("modern", "bfloat16"),
        ("imported", "bfloat16"),
    ],
)
def test_no_type_or_rank_is_promoted_silently(name, dtype):
    rates = {"attention_dropout": 0.1, "activation_dropout": 0.1}
    config = CONFIGS[name].replace(dtype=dtype, **rates)
    model, params = Transformer(config), shapes_of(config)

    def loss(params, rng, *ids, **segments):
        apply = functools.partial(model.apply, method="loss", rngs={"dropout": rng})
        sums = apply({"params": params}, *ids, **segments, deterministic=False)
        return sums.loss / sums.weight

    def skip_layer_norm(next_function, args, kwargs, context):
        # Flax's own LayerNorm promotes bfloat16, to compute its statistics in float32.
        skip = dtype == "bfloat16" and isinstance(context.module, nn.LayerNorm)
        return args[0] if skip else next_function(*args, **kwargs)

    steps = np.zeros((T, 2, K), np.int32)
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.enable_x64(True),
        nn.intercept_methods(skip_layer_norm),
    ):
        jax.eval_shape(functools.partial(logits_of, config), SOURCE, TARGET)
        packed = (PACKED_SOURCE, PACKED_TARGET, PACKED_LABELS)
        jax.eval_shape(jax.grad(loss), params, jax.random.key(0), *packed, **SEGMENTS)
        jax.eval_shape(functools.partial(decode, model), params, SOURCE[:2], steps, steps)


_X = np.ones((2, 3, MODERN.d_model), np.float32)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Linear((2, 5)), [_X]),
        (Embedding(11, 6), [np.array([[1, 2, 3]])]),
        (PositionalEncoding("learned", 9), [_X]),
        (MultiHeadAttention(2, 3), [_X, _X[:, :2]]),
        (FeedForward(7, "geglu"), [_X]),
        (EncoderLayer(MODERN), [_X]),
        (DecoderLayer(MODERN), [_X, _X[:, :2]]),
        (Encoder(MODERN), [_X]),
        (Decoder(MODERN), [_X, _X[:, :2]]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_module_works_alone(module, inputs):
    inputs = [jnp.asarray(x) for x in inputs]
    table = nn.tabulate(module, jax.random.key(0), console_kwargs={"force_terminal": False})
    assert type(module).__name__ in table(*inputs)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    out = jax.eval_shape(module.apply, params, *inputs)
    batched = [jnp.stack([x] * 4) for x in inputs]
    mapped = jax.eval_shape(
        jax.vmap(module.apply, in_axes=(None, *(0 for _ in inputs))), params, *batched
    )
    assert mapped.shape == (4, *out.shape)
    gradient = jax.grad(lambda params: jnp.sum(module.apply(params, *inputs)))
    assert names(jax.eval_shape(gradient, params)) == names(params)
    wrapped = nnx.eval_shape(lambda: nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(*inputs))
    found = nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(params))


def test_nothing_is_tiled_by_beam():
    def arrays(params, encoded):
        cache = Transformer(MODERN).apply(
            {"params": params}, encoded, ids, beam_size=K, max_length=T, method="init_cache"
        )
        return [(layer.self_key, layer.cross_key) for layer in cache.layers]

    ids = jnp.asarray(SOURCE)
    encoded = jax.ShapeDtypeStruct((*ids.shape, MODERN.d_model), jnp.float32)
    heads, width = MODERN.num_heads, MODERN.query_key_dim
    for self_key, cross_key in jax.eval_shape(arrays, shapes_of(MODERN), encoded):
        assert cross_key.shape == (len(ids), heads, width, ids.shape[1])
        assert self_key.shape == (len(ids), heads, K * T, width)


def test_tabulate():
    tabulate = nn.tabulate(
        Transformer(MODERN),
        jax.random.key(0),
        console_kwargs={"width": 240, "force_terminal": False},
    )
    table = tabulate(jnp.asarray(SOURCE), jnp.asarray(TARGET))
    for shown in ("encoder", "decoder", "cross_attention", "feed_forward", "float32[6,6,23]"):
        assert shown in table


def test_as_an_nnx_module():
    def wrap(source_ids, target_ids):
        module = nnx.bridge.ToNNX(Transformer(MODERN), rngs=nnx.Rngs(0))
        return module.lazy_init(source_ids, target_ids)

    graph, params, _ = nnx.split(nnx.eval_shape(wrap, SOURCE, TARGET), nnx.Param, ...)
    assert jax.tree.structure(nnx.to_pure_dict(params)) == jax.tree.structure(shapes_of(MODERN))
    nnx.replace_by_pure_dict(params, random_params(MODERN))
    rngs = nnx.state(nnx.bridge.ToNNX(Transformer(MODERN), rngs=nnx.Rngs(0)))
    module = nnx.merge(graph, params, rngs)
    logits = nnx.jit(lambda module, *ids: module(*ids))(module, SOURCE, TARGET)
    assert_close(logits, logits_of(MODERN))


class _Expert(nn.Module):
    """A user's own feed-forward network, with an additional loss, a variable and noise."""

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        calls = self.variable("statistics", "calls", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            calls.value += 1
        self.sow("losses", "balance", jnp.mean(x))
        return nn.Dense(x.shape[-1])(x) + jax.random.normal(self.make_rng("noise"), x.shape)


class _ExpertLayer(EncoderLayer):
    def setup(self):
        super().setup()
        self.expert = _Expert()

    def __call__(self, x, mask=None, *, deterministic=True):
        return x + self.expert(super().__call__(x, mask, deterministic=deterministic))


def test_a_layer_of_ones_own_has_all_that_flax_has():
    config = CONFIGS["paper"].replace(encoder_layers=3)
    encoder, x = Encoder(config, _ExpertLayer), jnp.ones((1, 2, config.d_model))
    key = jax.random.key(0)
    variables = encoder.init({"params": key, "noise": key}, x)
    del variables["losses"]
    y, seen = encoder.apply(variables, x, rngs={"noise": key}, mutable=["losses", "statistics"])
    assert y.shape == x.shape
    (balance,) = jax.tree.leaves(seen["losses"])
    assert balance.shape == (3,)
    (calls,) = jax.tree.leaves(seen["statistics"])
    assert calls.tolist() == [1, 1, 1]


class _GatedEncoderLayer(EncoderLayer):
    def make_feed_forward(self, output_gain):
        return FeedForward(7, "swiglu", output_gain=output_gain)


class _GatedDecoderLayer(DecoderLayer):
    def make_feed_forward(self, output_gain):
        return FeedForward(5, "swiglu", output_gain=output_gain)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_layers_with_parts_of_ones_own_decode_as_they_train(norm):
    config = CONFIGS["paper"].replace(norm=norm)
    model = Transformer(config, _GatedEncoderLayer, _GatedDecoderLayer)
    source_ids, target_ids = jnp.asarray(SOURCE[:2]), jnp.asarray(TARGET[:2, :T])
    params = model.init(jax.random.key(0), source_ids, target_ids)["params"]
    for stack, width in (("encoder", 7), ("decoder", 5)):
        kernel = params[stack]["layers"]["feed_forward"]["hidden"]["kernel"]
        assert width in kernel.shape
    tokens = np.repeat(TARGET[:2, :T].T[..., None], K, axis=2)
    beams = np.tile(np.arange(K, dtype=np.int32), (T, 2, 1))
    logits, _ = decode(model, params, source_ids, tokens, beams)
    full = model.apply({"params": params}, source_ids, target_ids)
    assert_close(logits[:, :, 1], np.swapaxes(full, 0, 1))


class _Split(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=True):
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(x.shape[-1], kernel_init=kernel)(x)


class _SplitLayer(EncoderLayer):
    def make_feed_forward(self, output_gain):
        return _Split()


def test_parts_of_ones_own_may_say_how_their_parameters_are_split():
    model = Transformer(CONFIGS["paper"], _SplitLayer)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(SOURCE), jnp.asarray(TARGET))
    specs = nn.get_partition_spec(shapes)["params"]["encoder"]["layers"]["feed_forward"]
    assert specs["Dense_0"]["kernel"] == jax.sharding.PartitionSpec(None, None, "model")


class _Capped(Transformer):
    def logits(self, hidden):
        return jnp.tanh(super().logits(hidden))


def test_logits_of_ones_own_are_not_passed_over():
    model, params = _Capped(CONFIGS["paper"]), random_params(CONFIGS["paper"])
    source_ids, target_ids = jnp.asarray(SOURCE), jnp.asarray(TARGET)
    with pytest.raises(ValueError, match="_Capped overrides logits, which the loss does not call"):
        model.apply({"params": params}, source_ids, target_ids, target_ids, method="loss")


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_layers_apart_encode_as_stacked(name):
    model, params = Transformer(CONFIGS[name]), random_params(CONFIGS[name])
    encode = jax.jit(functools.partial(model.apply, method="encode"))
    apart = unstack_layers(params)
    assert isinstance(apart["encoder"]["layers"], tuple)
    assert_close(encode({"params": apart}, SOURCE), encode({"params": params}, SOURCE))


def test_parameters_are_float32_where_numbers_are_float64():
    with jax.enable_x64(True):
        ids = jnp.ones((1, 2), jnp.int32)
        params = jax.eval_shape(Transformer(CONFIGS["imported"]).init, jax.random.key(0), ids, ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
