"""Several models as one: their probabilities are averaged."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.config import BOS_ID, PAD_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.quantization import check_quantized, is_quantized
from jaxformer.transformer import Transformer

#: A Transformer, possibly with custom layers, or the configuration of one without.
Model = Transformer | TransformerConfig


def ensemble(
    models: Model | tuple[Model, ...], params: Any
) -> tuple[tuple[Transformer, ...], tuple[Any, ...]]:
    """The models and parameters of the members; a single model is an ensemble of one.

    Raises:
      UserError: these are not models and their parameters, or the models do not go together.
    """
    if isinstance(models, list):
        raise UserError("models are a list: give a tuple of models and a tuple of their parameters")
    if not isinstance(models, tuple):
        models, params = (models,), (params,)
    if not isinstance(params, tuple | list) or len(params) != len(models):
        raise UserError(f"there are {len(models)} models: give a tuple with the parameters of each")
    for member in params:
        if not isinstance(member, Mapping):
            kind = type(member).__name__
            raise UserError(f"parameters are a dictionary, not {kind}: give variables['params']")
        if "encoder" not in member:
            raise UserError(
                "these are not the parameters of a Transformer, but "
                f"{', '.join(map(str, member)) or 'nothing'}: give variables['params']"
            )
    members = tuple(map(as_transformer, models))
    for model, member in zip(members, params, strict=True):
        check_quantized(model.config.quantized, is_quantized(member))
    for name in ("vocab_size", "encoder_vocab_size"):
        sizes = {getattr(member.config, name) for member in members}
        if len(sizes) > 1:
            raise UserError(
                f"the models have {name} {', '.join(map(str, sorted(sizes)))}: give models that "
                "share one vocabulary"
            )
    return members, tuple(params)


def as_transformer(model: Model) -> Transformer:
    """The model, made if only its configuration is given; raises `UserError` for anything else.

    A bound one, such as a submodule, is unbound, as a static argument of a jitted function must be.
    """
    if not isinstance(model, Model):
        raise UserError(f"a model is a Transformer or its TransformerConfig, not {model!r}")
    if isinstance(model, TransformerConfig):
        return Transformer(model, parent=None)
    return model if model.scope is None else model.clone(parent=None, name=None)


def speakable(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits with pad and bos at -inf: the model scores them like any id, but must not say them."""
    return logits.at[..., jnp.array([PAD_ID, BOS_ID])].set(-jnp.inf)


def mean_of_probabilities(logits: list[Array]) -> Array:
    """Log of the members' mean probability, up to a constant; for a single member, its logits."""
    if len(logits) == 1:
        return logits[0]
    return jax.nn.logsumexp(jnp.stack([jax.nn.log_softmax(member) for member in logits]), axis=0)
