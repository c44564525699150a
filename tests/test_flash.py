"""Attention by kernels of accelerators equals that by weights, with masks and in gradients."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxformer import SegmentMask, Transformer, TransformerConfig, dot_product_attention
from jaxformer.flash import flash_kernel

B, N, H = 2, 3, 64


def segments(length, *rows):
    """[B, length]: each row lists how long its segments are; the rest is padding."""
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    return jnp.asarray([np.pad(x, (0, length - len(x))) for x in ids], jnp.int32)


T, S = 128, 256
# As packed rows have them: a segment with targets but no source, and rows that end in padding.
QUERIES, KEYS = segments(T, [50, 7, 60], [128]), segments(S, [199, 50], [3])
MASKS = {
    "none": None,
    "padding": SegmentMask(jnp.ones((B, T), jnp.int32), (KEYS != 0).astype(jnp.int32)),
    "packed": SegmentMask(QUERIES, KEYS),
    "causal": SegmentMask(QUERIES, QUERIES, causal=True),
}


def inputs(mask):
    length = T if mask is None or mask.causal else S
    draw = np.random.default_rng(0)
    query, key, value, g = (
        jnp.asarray(draw.normal(size=(B, n, N, H)), jnp.bfloat16) for n in (T, length, length, T)
    )
    return (query, key, value), g


def with_gradients(attend, arrays, g):
    """Outputs and the gradients of query, key and value, in float32."""
    out, back = jax.vjp(attend, *arrays)
    return [np.asarray(x, np.float32) for x in (out, *back(g.astype(out.dtype)))]


def assert_attends_like_weights(kernel, mask):
    arrays, g = inputs(mask)
    found = with_gradients(lambda *qkv: kernel(*qkv, mask), arrays, g)
    exact = [x.astype(jnp.float32) for x in arrays]
    expected = with_gradients(lambda *qkv: dot_product_attention(*qkv, mask), exact, g)
    by_weights = with_gradients(
        lambda *qkv: dot_product_attention(*qkv, mask, flash="none"), arrays, g
    )
    for ours, theirs, same in zip(found, by_weights, expected, strict=True):
        assert np.all(np.isfinite(ours))
        error, usual = np.linalg.norm(ours - same), np.linalg.norm(theirs - same)
        assert error < 1.5 * usual < 0.02 * np.linalg.norm(same)
    if mask is not None:
        unseeing = ~np.any(mask.dense(), axis=-1)[:, 0]
        assert not np.any(found[0][unseeing]) and not np.any(found[1][unseeing])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_on_a_tpu(mask):
    (query, key, value), _ = inputs(mask)
    kernel = flash_kernel("pallas", query, key, value, mask)
    with pltpu.force_tpu_interpret_mode():  # on the CPU, step by step
        assert_attends_like_weights(kernel, mask)


def test_a_mask_of_keys_alone_is_spelled_out_for_cudnn(monkeypatch):
    """`padding_mask` gives [B, 1, 1, S]; cuDNN's kernel takes no mask that must be broadcast."""
    (query, key, value), _ = inputs(MASKS["padding"])
    attend, masks = jax.nn.dot_product_attention, []

    def spy(*arrays, mask, implementation):
        assert implementation == "cudnn"
        masks.append(mask)
        return attend(*arrays, mask=mask)

    monkeypatch.setattr("jaxformer.flash._cudnn_can", lambda *_: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    mask = jnp.arange(S) < jnp.array([S, S - 7])[:, None, None, None]
    out = flash_kernel("cudnn", query, key, value, mask)(query, key, value, mask)
    assert [mask.shape for mask in masks] == [(B, 1, T, S)]
    expected = attend(query, key, value, mask=mask)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("capability", "can"), [("9.0", True), ("7.5", False), ("gfx942", False), (None, False)]
)
def test_which_gpus_have_cudnns(monkeypatch, capability, can):
    """An AMD GPU names its capability in another way, and a CPU has none."""
    device = SimpleNamespace(compute_capability=capability)
    if capability is None:
        (device, *_) = jax.devices()
    query = jnp.zeros((B, 8, N, H), jnp.bfloat16)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert (flash_kernel("cudnn", query, query, query, None) is not None) == can


def test_on_several_chips_of_a_tpu_a_plain_jit_does_without(monkeypatch):
    """Only XLA knows what is split there, and XLA cannot split a kernel."""
    query = jnp.zeros((8, T, N, H), jnp.bfloat16)
    found = []

    def attend(query):
        found.append(flash_kernel("auto", query, query, query, None) is not None)
        return query

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.eval_shape(jax.jit(attend), query)
    jax.eval_shape(jax.pmap(attend), query[:, None])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows)
    jax.eval_shape(jax.jit(split), query)
    with nn.logical_axis_rules([("batch", None)]):
        jax.eval_shape(jax.jit(lambda x: attend(x)), query)
    with nn.logical_axis_rules([("batch", "data")]), jax.set_mesh(mesh):
        jax.eval_shape(jax.jit(lambda x: attend(x)), query)
    alone = jax.device_count() == 1
    assert found == [alone, True, True, True, alone]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_on_a_gpu(mask):
    (query, key, value), _ = inputs(mask)
    assert_attends_like_weights(flash_kernel("cudnn", query, key, value, mask), mask)


def test_which_cases_have_a_kernel():
    def has(whose, length=T, keys=S, width=H, value_width=None, dtype=jnp.bfloat16, mask=None):
        query, key = (jnp.zeros((B, n, N, width), dtype) for n in (length, keys))
        value = jnp.zeros((B, keys, N, value_width or width), dtype)
        return flash_kernel(whose, query, key, value, mask) is not None

    assert has("pallas") and has("pallas", width=256)
    assert not has("pallas", keys=100)
    assert not has("pallas", length=64)
    assert not has("pallas", width=192)
    assert not has("pallas", value_width=2 * H)
    assert not has("pallas", mask=jnp.ones((B, 1, T, S), bool))
    assert not has("pallas", dtype=jnp.float32)
    assert not has("none")
    assert has("auto") == (jax.default_backend() in ("gpu", "tpu"))
    if jax.default_backend() == "gpu":
        assert has("cudnn", length=34) and not has("cudnn", length=33)
        assert not has("cudnn", width=256) and not has("cudnn", dtype=jnp.float32)


CONFIG = TransformerConfig(
    vocab_size=32,
    d_model=2 * H,
    d_ff=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=1,
    dropout=0.0,
    dtype="bfloat16",
)


LONG = 1024  # longer than a kernel's blocks


def lowered(config, mutable=False):
    """The training step's gradient, as StableHLO for a TPU, on rows of two segments."""
    model = Transformer(config)
    ids = jnp.ones((B, LONG), jnp.int32)
    rows = segments(LONG, [60, 60], [60, 60])
    params = jax.eval_shape(model.init, jax.random.key(0), ids, ids)["params"]

    def loss(params):
        out = model.apply(
            {"params": params},
            ids,
            ids,
            ids,
            source_segment_ids=rows,
            target_segment_ids=rows,
            deterministic=False,
            rngs={"dropout": jax.random.key(1)},
            method="loss",
            mutable=mutable,
        )
        return (out[0] if mutable else out).loss

    traced = jax.jit(jax.grad(loss)).trace(params)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


def test_the_model_uses_them_where_it_can():
    kernel, scores = "tpu_custom_call", f"tensor<{B}x{CONFIG.num_heads}x{LONG}x{LONG}xf32>"
    flash = CONFIG.replace(flash_attention="pallas")
    program = lowered(flash)
    assert kernel in program and scores not in program
    for program in (
        lowered(CONFIG.replace(flash_attention="none")),
        lowered(flash.replace(dtype="float32")),
        lowered(flash.replace(attention_dropout=0.1)),
        lowered(flash, mutable=["intermediates"]),  # the weights are asked for
    ):
        assert kernel not in program and scores in program


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_a_model_trains_alike_on_a_gpu():
    ids = jnp.asarray(np.random.default_rng(0).integers(4, 32, (B, T)), jnp.int32)
    rows = segments(T, [60, 50], [20, 60])
    params = Transformer(CONFIG).init(jax.random.key(0), ids, ids)["params"]

    def gradients(config):
        def loss(params):
            sums = Transformer(config).apply(
                {"params": params},
                ids,
                ids,
                jnp.where(rows > 0, ids, 0),
                source_segment_ids=rows,
                target_segment_ids=rows,
                method="loss",
            )
            return sums.loss

        return jax.jit(jax.value_and_grad(loss))(params)

    exact = gradients(CONFIG.replace(dtype="float32"))

    def error(config):
        return [
            float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))
            for x, y in zip(jax.tree.leaves(gradients(config)), jax.tree.leaves(exact), strict=True)
        ]

    by_weights = error(CONFIG.replace(flash_attention="none"))
    for ours, theirs in zip(error(CONFIG), by_weights, strict=True):
        assert ours < 1.5 * theirs + 1e-3
