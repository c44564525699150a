"""Loads what a translator is made of from run directories: models, parameters and tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.checkpoints import check_same_arrays, describe_arrays, find_checkpoint, load_params
from jaxformer.config import Precision, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.fields import check_choice
from jaxformer.quantization import quantize
from jaxformer.run_directory import load_tokenizers, read_model_config
from jaxformer.tokenizer import Tokenizer
from jaxformer.transformer import parameter_shapes

RunPaths = str | Path | Sequence[str | Path]
CheckpointNames = str | int | Sequence[str | int] | None
Member = tuple[TransformerConfig, Any]


def load_members(
    run: RunPaths, checkpoint: CheckpointNames, dtype: Precision | None
) -> tuple[list[Member], tuple[Tokenizer, Tokenizer]]:
    """Return the members of an ensemble, each (config, params), and their shared tokenizers.

    For the arguments and errors see `Translator.load`.
    """
    runs = [run] if isinstance(run, str | Path) else list(run)
    if not runs or checkpoint in ([], ()):
        raise UserError("there is no run or checkpoint to load: name at least one")
    checkpoints: Sequence[str | int | None] = (
        [checkpoint] if checkpoint is None or isinstance(checkpoint, str | int) else checkpoint
    )
    if dtype is not None:
        check_choice("dtype", dtype, Precision)
    members, tokenizers = [], []
    for directory in runs:
        config = read_model_config(directory)
        if dtype == "int8":
            config = config.replace(dtype="float32", quantized=True)
        elif dtype is not None:
            config = config.replace(dtype=dtype)
        tokenizers.append(load_tokenizers(directory, config))
        if any(map(_differ, tokenizers[0], tokenizers[-1])):
            raise UserError(
                f"{directory} has other tokenizers than {runs[0]}: an ensemble needs the same"
            )
        for name in checkpoints:
            params = load_params_of(config, directory, name)
            params = quantize(params) if config.quantized else params
            members.append((config, params))
    return members, tokenizers[0]


def load_params_of(
    config: TransformerConfig, run: str | Path, checkpoint: str | int | None
) -> dict[str, Any]:
    """Return what `load_params` does, checked against `config`; floats may be of any width.

    Raises:
      UserError: as for `load_params`, or the parameters do not fit `config`.
    """
    params = load_params(run, checkpoint)
    expected = _shapes(parameter_shapes(config.replace(quantized=False)))
    check_same_arrays(_shapes(params), expected, find_checkpoint(run, checkpoint))
    return params


def _shapes(params: Any) -> dict[str, str]:
    """Describe arrays without regard to dtype: a checkpoint may be in half precision."""
    return describe_arrays(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    )


def _differ(one: Tokenizer, other: Tokenizer) -> bool:
    return (one.model, one.vocabulary) != (other.model, other.vocabulary)
