"""The same numbers as PyTorch: model, gradients, loss and optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.config import BOS_ID, PAD_ID, TransformerConfig
from jaxformer.losses import cross_entropy
from jaxformer.transformer import Transformer
from train.config import OptimizerConfig
from train.optimizer import make_optimizer, make_schedule

torch = pytest.importorskip("torch")

B, S, T = 3, 8, 6
CONFIG = TransformerConfig(
    vocab_size=23,
    d_model=12,
    d_ff=17,
    num_heads=3,
    encoder_layers=1,
    decoder_layers=2,
    attention_bias=True,
    layer_norm_epsilon=1e-5,
)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Programs run once, on little data: optimising them would take longer than all the rest."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_params(config):
    """Random biases and scales too, so that each must be in its place."""
    rng = np.random.default_rng(0)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), ids, ids)["params"]

    def fill(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_ids():
    """Source ids, target ids shifted right, labels; with padding on both sides."""
    rng = np.random.default_rng(1)
    source_ids, labels = rng.integers(4, 23, (B, S)), rng.integers(4, 23, (B, T))
    source_ids[1, 5:] = source_ids[2, 3:] = PAD_ID
    labels[0, 4:] = labels[2, 5:] = PAD_ID
    bos = np.full((B, 1), BOS_ID)
    target_ids = np.where(labels == PAD_ID, PAD_ID, np.concatenate([bos, labels[:, :-1]], axis=1))
    return source_ids.astype(np.int32), target_ids.astype(np.int32), labels.astype(np.int32)


def to_torch_names(tree, config):
    """Our parameters, or their gradients, as `torch.nn.Transformer` names and lays them out."""
    out = {}

    def linear(name, ours):
        out[f"{name}.weight"], out[f"{name}.bias"] = ours["kernel"].T, ours["bias"]

    def norm(name, ours):
        out[f"{name}.weight"], out[f"{name}.bias"] = ours["scale"], ours["bias"]

    def attention(name, ours):
        d_model = config.d_model
        parts = [ours[part] for part in ("query", "key", "value")]
        # A head is a block of columns in our kernels and of rows in torch's.
        out[f"{name}.in_proj_weight"] = np.concatenate(
            [part["kernel"].reshape(d_model, -1).T for part in parts]
        )
        out[f"{name}.in_proj_bias"] = np.concatenate([part["bias"].reshape(-1) for part in parts])
        output = ours["output"]
        linear(
            f"{name}.out_proj",
            {"kernel": output["kernel"].reshape(-1, d_model), "bias": output["bias"]},
        )

    tree = jax.tree.map(np.asarray, tree)
    out["embedding"] = tree["embedding"]["embedding"]
    if config.output_bias:
        out["output_bias"] = tree["output_bias"]
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for i in range(layers):
            ours = jax.tree.map(lambda leaf, i=i: leaf[i], tree[stack]["layers"])
            prefix = f"{stack}.layers.{i}"
            attention(f"{prefix}.self_attn", ours["self_attention"])
            linear(f"{prefix}.linear1", ours["feed_forward"]["hidden"])
            linear(f"{prefix}.linear2", ours["feed_forward"]["output"])
            residuals = ["self_attention_residual", "feed_forward_residual"]
            if stack == "decoder":
                attention(f"{prefix}.multihead_attn", ours["cross_attention"])
                residuals.insert(1, "cross_attention_residual")
            for number, residual in enumerate(residuals, start=1):
                norm(f"{prefix}.norm{number}", ours[residual]["layer_norm"])
        if config.norm == "pre":
            norm(f"{stack}.norm", tree[stack]["layer_norm"])
    return out


def torch_transformer(config):
    """Built from its stacks: torch's own model puts a norm after post-norm stacks as well."""
    pre = config.norm == "pre"
    sizes = (config.d_model, config.num_heads, config.d_ff)
    options = {
        "dropout": 0.0,
        "activation": config.activation,
        "layer_norm_eps": config.layer_norm_epsilon,
        "batch_first": True,
        "norm_first": pre,
    }

    def final_norm():
        return torch.nn.LayerNorm(config.d_model, config.layer_norm_epsilon) if pre else None

    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(*sizes, **options),
        config.encoder_layers,
        final_norm(),
        enable_nested_tensor=False,
    )
    decoder = torch.nn.TransformerDecoder(
        torch.nn.TransformerDecoderLayer(*sizes, **options), config.decoder_layers, final_norm()
    )
    return torch.nn.Transformer(
        *sizes[:2], custom_encoder=encoder, custom_decoder=decoder, batch_first=True
    )


def torch_logits(module, embedding, source_ids, target_ids):
    """Embeddings, positions and softmax are not part of torch's module."""
    d_model = embedding.shape[1]
    source_ids, target_ids = (torch.from_numpy(ids).long() for ids in (source_ids, target_ids))

    def embed(ids):
        position, i = np.arange(ids.shape[1])[:, None], np.arange(0, d_model, 2)
        angles = position / 10_000 ** (i / d_model)
        encoding = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(-1, d_model)
        return embedding[ids] * d_model**0.5 + torch.from_numpy(encoding).float()

    hidden = module(
        embed(source_ids),
        embed(target_ids),
        tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(1),  # True = may not attend
        src_key_padding_mask=source_ids == PAD_ID,
        tgt_key_padding_mask=target_ids == PAD_ID,
        memory_key_padding_mask=source_ids == PAD_ID,
    )
    return hidden @ embedding.T


def assert_close(actual, expected, name="", within=1e-5):
    """Within that share of the largest number."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    largest = np.max(np.abs(expected))
    np.testing.assert_allclose(
        actual / largest, expected / largest, rtol=0, atol=within, err_msg=name
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "pre", "activation": "gelu", "scan_layers": True},
        {"output_bias": True},
        {"dtype": "bfloat16"},
    ],
    ids=["post", "pre", "output bias", "bfloat16"],
)
def test_transformer_and_its_gradients(changes):
    config = CONFIG.replace(**changes)
    exact = config.dtype == "float32"
    within = 1e-5 if exact else 0.1  # a unit may be on the other side of 0 for ReLU
    model, params = Transformer(config), random_params(config)
    source_ids, target_ids, labels = random_ids()

    @jax.jit
    def run(params, source_ids, target_ids, labels):
        def loss(params):
            variables = {"params": params}
            sums = model.apply(variables, source_ids, target_ids, labels, method="loss")
            return sums.loss, model.apply(variables, source_ids, target_ids)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), gradients = run(params, source_ids, target_ids, labels)

    module = torch_transformer(config)
    weights = {name: torch.tensor(leaf) for name, leaf in to_torch_names(params, config).items()}
    outside = {
        name: weights.pop(name).requires_grad_() for name in weights.keys() - module.state_dict()
    }
    module.load_state_dict(weights, strict=True)
    expected = torch_logits(module, outside["embedding"], source_ids, target_ids)
    expected = expected + outside.get("output_bias", 0.0)
    expected_loss = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1),
        torch.from_numpy(labels).long().flatten(),
        ignore_index=PAD_ID,
        label_smoothing=config.label_smoothing,
        reduction="sum",
    )
    expected_loss.backward()

    real = labels != PAD_ID
    assert_close(logits[real], expected.detach()[torch.from_numpy(real)], within=within)
    assert float(loss) == pytest.approx(expected_loss.item(), rel=1e-6 if exact else 0.01)
    ours = to_torch_names(gradients, config)
    theirs = {
        name: parameter.grad for name, parameter in [*module.named_parameters(), *outside.items()]
    }
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], name, within)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_label_smoothed_cross_entropy(label_smoothing):
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(31, 5)).astype(np.float32)
    embedding = rng.normal(size=(11, 5)).astype(np.float32)
    labels = rng.integers(0, 11, 31).astype(np.int32)
    fused = functools.partial(cross_entropy, label_smoothing=label_smoothing, chunk_size=7)
    (loss, weight), gradients = jax.jit(jax.value_and_grad(fused, argnums=(0, 1), has_aux=True))(
        hidden, embedding, labels
    )

    theirs = [torch.tensor(array, requires_grad=True) for array in (hidden, embedding)]
    expected = torch.nn.functional.cross_entropy(
        theirs[0] @ theirs[1].T,
        torch.from_numpy(labels).long(),
        ignore_index=PAD_ID,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert weight == np.sum(labels != PAD_ID)
    for gradient, their in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(gradient, their.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "clip_norm": 0.5}], ids=["paper", "decay and clipping"]
)
def test_adam_with_the_warmup_schedule(options):
    """Five updates around the peak, with gradients from large to as small as Adam's epsilon."""
    d_model, warmup_steps, updates = 512, 3, 5
    config = OptimizerConfig(warmup_steps=warmup_steps, **options)
    rng = np.random.default_rng(3)
    start = rng.normal(size=(7, 5)).astype(np.float32)
    scales = 10.0 ** rng.uniform(-9, 1, size=(7, 5))
    gradients = (rng.normal(size=(updates, 7, 5)) * scales).astype(np.float32)

    optimizer = make_optimizer(config, make_schedule(config, d_model, 99))
    params, state = jnp.asarray(start), optimizer.init(jnp.asarray(start))
    update = jax.jit(optimizer.update)

    def rate(count):
        """Equation 3; optax and torch both count from 0."""
        step = max(count, 1)
        return d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)

    parameter = torch.nn.Parameter(torch.tensor(start))
    torch_adam = torch.optim.Adam
    if config.weight_decay:
        torch_adam = functools.partial(torch.optim.AdamW, weight_decay=config.weight_decay)
    torch_optimizer = torch_adam([parameter], lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch_optimizer, rate)
    for gradient in gradients:
        changes, state = update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, changes)

        parameter.grad = torch.tensor(gradient)
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_([parameter], config.clip_norm)
        torch_optimizer.step()
        scheduler.step()
        np.testing.assert_allclose(params, parameter.detach(), rtol=1e-5, atol=1e-7)
    # Far enough from the start for rates and momenta to show.
    assert np.min(np.abs(params - start)) > 1e-3
