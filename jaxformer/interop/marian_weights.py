"""Marian's tensors: reading them, and converting them from and to our parameters."""

import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxformer.config import TransformerConfig
from jaxformer.errors import UserError, first_line
from jaxformer.positions import sinusoid
from jaxformer.transformer import parameter_shapes

Tensors = dict[str, np.ndarray]

#: PyTorch's default, which Marian's LayerNorms always have.
LAYER_NORM_EPSILON = 1e-5

# Our embeddings by `TransformerConfig.embeddings`; for each, the name that it is saved under, then
# the names of tied tensors that older files hold as well.
_EMBEDDINGS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "shared": {
        "embedding": (
            "model.shared.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
    },
    "target": {
        "source_embedding": ("model.encoder.embed_tokens.weight",),
        "embedding": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    },
    "separate": {
        "source_embedding": ("model.encoder.embed_tokens.weight",),
        "embedding": ("model.decoder.embed_tokens.weight",),
        "output_embedding": ("lm_head.weight",),
    },
}

# The modules of a layer.
_MODULES = {
    "self_attention/query": "self_attn.q_proj",
    "self_attention/key": "self_attn.k_proj",
    "self_attention/value": "self_attn.v_proj",
    "self_attention/output": "self_attn.out_proj",
    "self_attention_residual/layer_norm": "self_attn_layer_norm",
    "cross_attention/query": "encoder_attn.q_proj",
    "cross_attention/key": "encoder_attn.k_proj",
    "cross_attention/value": "encoder_attn.v_proj",
    "cross_attention/output": "encoder_attn.out_proj",
    "cross_attention_residual/layer_norm": "encoder_attn_layer_norm",
    "feed_forward/hidden": "fc1",
    "feed_forward/output": "fc2",
    "feed_forward_residual/layer_norm": "final_layer_norm",
}


class _Leaf(NamedTuple):
    """A parameter of all layers of a stack: one array here, one tensor per layer in Marian."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # [L, …]
    names: list[str]  # theirs, layer by layer
    their_shape: tuple[int, ...]  # [outputs, inputs] of a linear map


def _layer_leaves(config: TransformerConfig) -> Iterator[_Leaf]:
    shapes = parameter_shapes(config.replace(attention_bias=True))  # Marian's always have them
    for path, leaf in flatten_dict(shapes).items():
        if path[0] not in ("encoder", "decoder"):
            continue
        stack, _, *module, kind = path
        name = _MODULES["/".join(module)]
        layers, *shape = leaf.shape
        their_shape: tuple[int, ...] = (math.prod(shape),)
        if kind == "kernel":  # [D, N, H], [N, H, D], [D, F] or [F, D]
            inputs = 2 if name.endswith("out_proj") else 1
            their_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        suffix = "bias" if kind == "bias" else "weight"
        names = [f"model.{stack}.layers.{i}.{name}.{suffix}" for i in range(layers)]
        yield _Leaf(path, leaf.shape, names, their_shape)


def import_params(
    tensors: Tensors, path: Path, config: TransformerConfig, orders: Mapping[str, np.ndarray]
) -> tuple[TransformerConfig, dict[str, Any]]:
    """Return our parameters, and `config` with `output_bias` if the logits have one.

    Args:
      tensors: theirs by name.
      path: of the file that they are from.
      config: our configuration.
      orders: their id for each of ours, in the "source" and the "target" vocabulary.

    Raises:
      UserError: a tensor is missing, superfluous or of the wrong shape or dtype.
    """
    left = dict(tensors)

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in left:
            raise UserError(f"{path} has no tensor {name}: download the model again")
        tensor = left.pop(name)
        if tensor.shape != shape or not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(
                f"{path} has {name} as {tensor.dtype.name} {list(tensor.shape)}, but config.json "
                f"expects float {list(shape)}: use the files of one model"
            )
        return tensor.astype(np.float32)

    flat: dict[tuple[str, ...], np.ndarray] = {}
    for ours, names in _EMBEDDINGS[config.embeddings].items():
        order = orders[_side(ours)]
        present = [name for name in names if name in left] or names[:1]
        table, *copies = [take(name, (_size(order), config.d_model)) for name in present]
        if not all(np.array_equal(table, copy) for copy in copies):
            raise UserError(f"{path}: {' and '.join(present)} differ, but config.json ties them")
        flat[ours, "embedding"] = table[order]

    if "final_logits_bias" in left:
        order = orders["target"]
        (bias,) = take("final_logits_bias", (1, _size(order)))
        if np.any(bias):
            config = config.replace(output_bias=True)
            flat[("output_bias",)] = bias[order]
    for stack in ("encoder", "decoder"):
        # Older files store the positions, which are computed today.
        if (name := f"model.{stack}.embed_positions.weight") in left:
            positions = jnp.arange(config.max_length)
            expected = np.asarray(sinusoid(positions, config.d_model, interleaved=False))
            if not np.allclose(take(name, expected.shape), expected, rtol=0, atol=4e-3):  # bfloat16
                raise UserError(f"{path}: {name} is not a sinusoid and cannot be imported")

    for leaf in _layer_leaves(config):
        layers = [take(name, leaf.their_shape) for name in leaf.names]
        flat[leaf.path] = np.stack([x.T.reshape(leaf.shape[1:]) for x in layers])
    if left:
        raise UserError(f"{path} has a tensor {min(left)}, which cannot be imported")
    return config, unflatten_dict(flat)


def export_params(
    params: Mapping[str, Any], config: TransformerConfig, orders: Mapping[str, np.ndarray]
) -> Tensors:
    """Convert our parameters to their tensors; biases that the model lacks are 0.

    Args: as for `import_params`.
    """
    flat = flatten_dict(params)

    def reorder(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        out = np.empty((_size(order), *rows.shape[1:]), rows.dtype)
        # Where pad and bos are one piece in Marian, bos, the later one, overwrites pad: nothing
        # ever depends on pad.
        out[order] = rows
        return out

    tensors = {
        names[0]: reorder(flat[ours, "embedding"], orders[_side(ours)])
        for ours, names in _EMBEDDINGS[config.embeddings].items()
    }
    bias = flat.get(("output_bias",), np.zeros(config.vocab_size, np.float32))
    tensors["final_logits_bias"] = reorder(bias, orders["target"])[None]
    for leaf in _layer_leaves(config):
        stacked = flat.get(leaf.path, np.zeros(leaf.shape, np.float32))
        for name, layer in zip(leaf.names, stacked, strict=True):
            tensors[name] = layer.reshape(leaf.their_shape[::-1]).T
    return tensors


def _side(embedding: str) -> str:
    return "source" if embedding == "source_embedding" else "target"


def _size(order: np.ndarray) -> int:
    return int(order.max()) + 1


def fit_residual_stream(tensors: Tensors, config: TransformerConfig) -> Tensors:
    """Change exported weights so that Marian's positions and LayerNorm give the same logits.

    Positions: the paper's sinusoid alternates sines and cosines, Marian's has all sines first. That
    permutes the D axis, so every tensor that reads or writes the residual stream is permuted too.

    LayerNorm: Marian adds 1e-5 to the variance, the model ε. But
    LayerNorm_ε(x) = LayerNorm_{c²ε}(c · x), so the stream is scaled by c = √(1e-5 / ε): what writes
    it is multiplied, what reads it divided by c. Only positions cannot be scaled; so a stack is
    not scaled before its first LayerNorm, whose output is then off by a factor of
    1 - (1e-5 - ε) / 2σ². With the variance σ² of embeddings + positions, about 1, that is 5e-6.
    The last LayerNorm is not scaled either, because the logits are made from its output.
    """
    order = np.arange(config.d_model)
    if config.positions == "sinusoidal":
        order = np.concatenate([order[0::2], order[1::2]])
    scale = np.float32((LAYER_NORM_EPSILON / config.layer_norm_epsilon) ** 0.5)
    last = f"decoder.layers.{config.decoder_layers - 1}.final_layer_norm."

    def fit(name: str, tensor: np.ndarray) -> np.ndarray:
        if name == "final_logits_bias":
            return tensor
        if ".layers." not in name:  # an embedding
            return tensor[:, order]
        c = 1 if ".layers.0.self_attn." in name or last in name else scale
        module, kind = name.split(".")[-2:]
        if module in ("out_proj", "fc2") or module.endswith("layer_norm"):
            return tensor[order] * c
        return tensor[:, order] / c if kind == "weight" else tensor

    return {name: fit(name, tensor) for name, tensor in tensors.items()}


def read_tensors(directory: Path) -> tuple[Path, Tensors]:
    """Return the file of a model's weights and its tensors by name.

    Raises:
      UserError: there is no such file, it is damaged, or the package to read it is not installed.
    """
    path = directory / "model.safetensors"
    read: Callable[[Path], Tensors]
    if path.is_file():
        read = _read_safetensors
    elif (path := directory / "model.safetensors.index.json").is_file():
        read = partial(_read_shards, _read_safetensors)
    elif (path := directory / "pytorch_model.bin").is_file():
        read = _read_pickle
    elif (path := directory / "pytorch_model.bin.index.json").is_file():
        read = partial(_read_shards, _read_pickle)
    else:
        raise UserError(
            f"{directory} has neither model.safetensors nor pytorch_model.bin: "
            "download the model again"
        )
    try:
        return path, read(path)
    except ImportError as error:
        raise UserError(f"{path} needs {error.name}: pip install {error.name}") from error
    except UserError:
        raise
    except Exception as error:  # zipfile, pickle, torch and safetensors each raise their own
        raise UserError(
            f"cannot read {path}: {first_line(error)}; download it again, or save it in float32"
        ) from error


def _read_safetensors(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_shards(read: Callable[[Path], Tensors], path: Path) -> Tensors:
    files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: Tensors = {}
    for file in files:
        tensors |= read(path.with_name(file))
    return tensors


def _read_pickle(path: Path) -> Tensors:
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its advice is to load what may run code
        raise UserError(
            f"{path} is not a file of weights alone: download it again, or save it as safetensors"
        ) from error
    return {
        # numpy has no bfloat16
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in tensors.items()
    }
