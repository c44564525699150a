"""Linear maps, and models whose matrices are 8-bit integers."""

import dataclasses
from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import TransformerConfig
from jaxformer.encoder import EncoderLayer
from jaxformer.errors import UserError
from jaxformer.generation import generate
from jaxformer.linear import Linear, affine, kernel_first
from jaxformer.matrices import transpose_kernels
from jaxformer.quantization import int8_product, quantize, quantize_matrix
from jaxformer.stack import unstack_layers
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from random_run import CONFIG, random_params
from small_run import sentence_pairs, trained_run
from train.config import TrainConfig

SOURCE = jnp.array([[5, 9, 7, 2], [8, 4, 2, 0]])
TARGET = jnp.array([[1, 6, 5], [1, 30, 12]])


@pytest.mark.parametrize(
    ("shape", "features", "input_axes"),
    [((2, 3, 8), (4, 6), 1), ((2, 3, 4, 6), (8,), 2), ((8,), 5, 1)],
)
def test_is_what_linen_calls_dense_general(shape, features, input_axes):
    ours = Linear(features, input_axes=input_axes)
    theirs = nn.DenseGeneral(
        features,
        axis=tuple(range(-input_axes, 0)),
        kernel_init=nn.initializers.xavier_uniform(),
    )
    x = jax.random.normal(jax.random.key(0), shape)
    params = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(1), x))
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), rtol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "features", "input_axes"),
    [((2, 3, 8), (4, 6), 1), ((2, 3, 4, 6), (8,), 2), ((8,), (5,), 1)],
)
def test_bfloat16_has_the_gradients_of_the_plain_form(shape, features, input_axes, use_bias):
    layer = Linear(features, input_axes=input_axes, use_bias=use_bias, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    params = layer.init(jax.random.key(1), x)["params"]
    g = jax.random.normal(jax.random.key(2), layer.apply({"params": params}, x).shape)

    def ours(x, params):
        return jnp.sum(layer.apply({"params": params}, x) * g)

    def plain(x, params):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return jnp.sum(affine(x, params["kernel"], params.get("bias"), input_axes) * g)

    for found, expected in zip(
        jax.tree.leaves(jax.grad(ours, (0, 1))(x, params)),
        jax.tree.leaves(jax.grad(plain, (0, 1))(x, params)),
        strict=True,
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=0.02, atol=0.02)


def test_bfloat16_multiplies_for_the_gradient_in_the_order_that_is_fast():
    """This guards its speed: x comes before g, and their product is not transposed."""
    layer = Linear((4, 6), dtype=jnp.bfloat16)
    x = jnp.ones((2, 3, 8), jnp.bfloat16)
    params = layer.init(jax.random.key(1), x)
    gradient = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(layer.apply(params, x))))(params)
    operations = str(gradient)
    assert "(([0, 1], [0, 1])" in operations and "transpose" not in operations


def test_bfloat16_has_gradients_of_gradients():
    layer = Linear((4,), dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    params = layer.init(jax.random.key(1), x)

    def squared_gradient(x):
        gradient = jax.grad(lambda x: jnp.sum(layer.apply(params, x) ** 2))(x)
        return jnp.sum(gradient**2)

    # ∂/∂x |2 W Wᵀ x|² = 8 (W Wᵀ)² x
    product = params["params"]["kernel"] @ params["params"]["kernel"].T
    expected = 8 * x @ product @ product
    found = jax.grad(squared_gradient)(x)
    np.testing.assert_allclose(found, expected, atol=0.05 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize(
    ("name", "shape", "features", "input_axes"),
    [
        ("query", (8, 4, 256), (4, 6), 1),
        ("output", (8, 4, 4, 64), (8,), 2),
        ("hidden", (8, 3, 256), (5,), 1),  # 24 rows do not fill a tile of 32
        ("hidden", (16, 4, 256), (5,), 1),  # 64 rows are not few for 256 inputs
        ("hidden", (256,), (5,), 1),
    ],
)
def test_a_transposed_copy_of_the_kernel_comes_first_for_few_rows(
    name, shape, features, input_axes
):
    layer = Linear(features, input_axes=input_axes)
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)["params"]
    params["bias"] = jax.random.normal(jax.random.key(2), features)
    expected = layer.apply({"params": params}, x)
    part = "feed_forward" if name == "hidden" else "self_attention"
    both = transpose_kernels({part: {name: params}})[part][name]
    assert both["transposed"].shape == (np.prod(features), 256)
    comes_first = shape[:-input_axes] == (8, 4)
    unused = "kernel" if comes_first else "transposed"
    both[unused] = jnp.full_like(both[unused], jnp.nan)
    found = layer.apply({"params": both}, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_kernel_still_comes_first_when_it_is_compiled():
    """This guards its speed: XLA turns a transposed product around unless prevented."""
    x, transposed = jnp.ones((32, 256)), jnp.ones((48, 256))
    program = jax.jit(lambda x, w: kernel_first(x, w) + 1).lower(x, transposed).compile().as_text()
    assert "f32[48,32]{1,0} dot(" in program and "f32[32,48]{1,0} dot(" not in program


def test_whole_numbers_multiply_exactly():
    """With 127 as the largest value everywhere, a quantization step is 1: nothing is rounded."""
    draw = np.random.default_rng(0)
    x, kernel = draw.integers(-127, 128, (6, 40)), draw.integers(-127, 128, (40, 10))
    x[:, 0], kernel[0] = 127, -127
    steps, scale = quantize_matrix(jnp.asarray(kernel, jnp.float32))
    np.testing.assert_array_equal(steps, kernel.T)
    product = int8_product(jnp.asarray(x, jnp.float32), steps, scale)
    np.testing.assert_allclose(product, x @ kernel, rtol=1e-6)


@pytest.mark.parametrize("input_axes", [1, 2])
def test_rounding_is_at_most_half_a_step(input_axes):
    inputs, outputs = (30,) if input_axes == 1 else (5, 6), (4, 2)
    x = jax.random.normal(jax.random.key(0), (7, *inputs))
    kernel = jax.random.normal(jax.random.key(1), (*inputs, *outputs))
    steps, scale = quantize_matrix(kernel, input_axes)
    assert steps.dtype == jnp.int8 and scale.shape == outputs
    rounded = np.asarray(steps, np.float32).T.reshape(kernel.shape) * scale
    assert np.all(np.abs(rounded - kernel) <= 0.5001 * scale)
    exact = np.tensordot(x, rounded, input_axes)
    largest = np.max(np.abs(x), axis=tuple(range(1, x.ndim)))
    bound = 0.5 * largest / 127 * np.sum(np.abs(rounded), axis=tuple(range(input_axes))).max()
    error = np.abs(int8_product(x, steps, scale, input_axes) - exact)
    assert np.all(error <= bound[:, None, None] * 1.001)
    assert error.max() > 0  # it did round


def test_a_row_does_not_depend_on_the_others():
    x = jax.random.normal(jax.random.key(0), (5, 16)) * jnp.array([1e-3, 1, 50, 1e4, 0])[:, None]
    steps, scale = quantize_matrix(jax.random.normal(jax.random.key(1), (16, 3)))
    together = jax.jit(int8_product)(x, steps, scale)
    for row, alone in enumerate(x):
        np.testing.assert_array_equal(
            together[row], jax.jit(int8_product)(alone[None], steps, scale)[0]
        )
    np.testing.assert_array_equal(together[-1], 0)  # not NaN


@pytest.mark.parametrize(
    ("rows", "columns"), [((1, 1), 2), ((1, 5), 5), ((4, 2), 8), ((9,), None), ((16, 1), None)]
)
def test_a_kernel_of_integers_comes_first_for_few_rows(rows, columns):
    """This guards its speed; one row is multiplied as two, or XLA would convert the kernel."""
    x, kernel, scale = jnp.ones((*rows, 512)), jnp.ones((2048, 512), jnp.int8), jnp.ones(2048)
    program = jax.jit(int8_product).lower(x, kernel, scale).compile().as_text()
    assert "s32[2048,512]" not in program
    if columns is None:
        assert f"s32[2048,{np.prod(rows)}]" not in program
    else:
        assert f"s32[2048,{columns}]" in program


@pytest.mark.parametrize("input_axes", [1, 2])
def test_the_order_of_an_integer_product_does_not_change_a_bit(input_axes):
    inputs, outputs = (24,) if input_axes == 1 else (4, 6), (3, 5)
    x = jax.random.normal(jax.random.key(0), (12, 1, *inputs))
    kernel = jax.random.normal(jax.random.key(1), (*inputs, *outputs))
    product = partial(int8_product, input_axes=input_axes)
    many = jax.jit(product)(x, *quantize_matrix(kernel, input_axes))
    assert many.shape == (12, 1, *outputs)
    for some in (x[:0], x[:1], x[:5], x[:8]):
        few = jax.jit(product)(some, *quantize_matrix(kernel, input_axes))
        np.testing.assert_array_equal(few, many[: len(some)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embeddings": "separate", "source_vocab_size": 50, "positions": "learned"},
        {"activation": "swiglu", "norm": "pre", "attention_bias": True, "output_bias": True},
    ],
)
def test_a_quantized_transformer_computes_nearly_the_same(changes):
    config = CONFIG.replace(encoder_layers=2, decoder_layers=1, **changes)
    quantized = config.replace(quantized=True)
    params = jax.jit(Transformer(config).init)(jax.random.key(0), SOURCE, TARGET)["params"]
    small = quantize(params)
    expected = jax.eval_shape(Transformer(quantized).init, jax.random.key(0), SOURCE, TARGET)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), small) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected["params"]
    )
    logits = jax.jit(Transformer(config).apply)({"params": params}, SOURCE, TARGET)
    nearly = jax.jit(Transformer(quantized).apply)({"params": small}, SOURCE, TARGET)
    error = np.linalg.norm(nearly - logits) / np.linalg.norm(logits)
    assert 1e-5 < error < 0.04


def test_every_matrix_is_quantized_and_nothing_else():
    leaves = jax.tree_util.tree_leaves_with_path(quantize(random_params(CONFIG)))
    for path, leaf in leaves:
        matrix = path[-1].key in ("int8_kernel", "int8_embedding")
        assert leaf.dtype == (jnp.int8 if matrix else jnp.float32), path


def test_layers_apart_are_quantized_like_stacked_ones():
    params = random_params(CONFIG)
    apart, stacked = quantize(unstack_layers(params)), unstack_layers(quantize(params))
    jax.tree.map(np.testing.assert_array_equal, apart, stacked)


def test_an_integer_product_of_any_number_of_rows_can_be_exported():
    kernel, scale = quantize_matrix(jax.random.normal(jax.random.key(1), (16, 3)))
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
    program = jax.export.export(jax.jit(lambda x: int8_product(x, kernel, scale)))(x)
    for number in (1, 20):
        x = jax.random.normal(jax.random.key(0), (number, 16))
        np.testing.assert_array_equal(program.call(x), int8_product(x, kernel, scale))


def test_a_model_of_floats_refuses_int8():
    """Without their scales, int8 parameters are numbers from -127 to 127."""
    params = quantize(random_params(CONFIG))
    with pytest.raises(UserError, match="parameters of embedding are int8 and it is not: set"):
        Transformer(CONFIG).apply({"params": params}, SOURCE, TARGET)
    with pytest.raises(UserError, match="the parameters are int8 and the model is not"):
        generate(CONFIG, params, SOURCE)
    with pytest.raises(UserError, match="not the parameters of a Transformer"):
        quantize({"Dense_0": {"kernel": jnp.ones((2, 3))}})
    for small in (params, params["decoder"], unstack_layers(params)):
        with pytest.raises(UserError, match="the parameters are int8 already"):
            quantize(small)
    with pytest.raises(UserError, match="embedding is quantized and its parameters are not: give"):
        Transformer(CONFIG.replace(quantized=True)).apply(
            {"params": random_params(CONFIG)}, SOURCE, TARGET
        )


def test_matrices_of_parts_of_ones_own_stay():
    own = {"gate": {"kernel": jnp.ones((2, 3, 4, 5))}, "Dense_0": {"kernel": jnp.ones((2, 3, 4))}}
    stacked = {"layers": {"feed_forward": own | {"hidden": {"kernel": jnp.ones((2, 3, 4))}}}}
    small = quantize({"decoder": stacked})["decoder"]["layers"]["feed_forward"]
    assert small["hidden"]["int8_kernel"].dtype == jnp.int8
    assert small["gate"]["kernel"].dtype == small["Dense_0"]["kernel"].dtype == jnp.float32


class _Dense(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=True):
        return nn.Dense(x.shape[-1], name="output")(nn.relu(nn.Dense(20, name="hidden")(x)))


class _DenseLayer(EncoderLayer):
    def make_feed_forward(self, output_gain):
        return _Dense()


def test_matrices_of_parts_of_ones_own_are_not_taken_for_what_they_are_not():
    """Though they have the same names, they would use steps from -127 to 127 without a scale."""
    params = Transformer(CONFIG, _DenseLayer).init(jax.random.key(0), SOURCE, TARGET)["params"]
    quantized = Transformer(dataclasses.replace(CONFIG, quantized=True), _DenseLayer)
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match='parameter named "kernel"'):
        quantized.apply({"params": quantize(params)}, SOURCE, TARGET)


def test_a_layer_of_floats_refuses_int8():
    params = {"int8_kernel": jnp.ones((3, 2), jnp.int8), "scale": jnp.ones(3)}
    with pytest.raises(UserError, match="parameters of Linear are int8 and it is not"):
        Linear(3, use_bias=False).apply({"params": params}, jnp.ones(2))


@pytest.mark.slow
def test_translates_like_the_float_model(tmp_path_factory):
    run = trained_run(tmp_path_factory)
    lines = [source for source, _ in sentence_pairs(60)]
    devices = jax.devices()[:1]
    plain = Translator.load(run, devices=devices)
    small = Translator.load(run, dtype="int8", devices=devices)
    assert small.config.quantized and not plain.config.quantized
    options = {"beam_size": 2, "batch_tokens": 512}
    expected = plain.translate(lines, **options)
    found = list(small.generate(lines, **options))
    same = [ours[0].text == theirs for ours, theirs in zip(found, expected, strict=True)]
    assert np.mean(same) > 0.9
    # The search gives its translations the scores that the model gives them afterwards.
    scores = small.score(lines, [hypotheses[0].text for hypotheses in found])
    np.testing.assert_allclose(
        [score.log_prob for score in scores],
        [hypotheses[0].log_prob for hypotheses in found],
        atol=0.05,
    )


def test_is_not_to_be_trained():
    config = TransformerConfig(quantized=True)
    with pytest.raises(UserError, match="quantized is True, but int8 cannot be trained"):
        TrainConfig(model=config)
    small = dataclasses.replace(CONFIG, quantized=True)
    params = quantize(random_params(CONFIG))
    with pytest.raises(ValueError, match="a quantized model has no loss"):
        Transformer(small).apply({"params": params}, SOURCE, TARGET, TARGET, method="loss")
