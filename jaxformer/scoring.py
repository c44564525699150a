"""What a model thinks of a given translation: log-probabilities, and which word is from which."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.config import BOS_ID, PAD_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.positions import PositionalEncoding
from jaxformer.transformer import Transformer

#: A Transformer, perhaps with layers of one's own, or the configuration of one that has none.
Model = Transformer | TransformerConfig


def ensemble(
    models: Model | tuple[Model, ...], params: Any
) -> tuple[tuple[Transformer, ...], tuple[Any, ...]]:
    """Models and parameters of the members: one model is an ensemble of one.

    Raises:
      UserError: something else was given in their place.
    """
    if not isinstance(models, tuple):
        models, params = (models,), (params,)
    if not isinstance(params, tuple | list) or len(params) != len(models):
        raise UserError(f"there are {len(models)} models: give a tuple of as many parameters")
    for member in params:
        if "encoder" not in member:
            raise UserError(
                f"these are no parameters of a Transformer, but {', '.join(member) or 'nothing'}: "
                "give variables['params']"
            )
    return tuple(map(_transformer, models)), tuple(params)


def _transformer(model: Model) -> Transformer:
    if not isinstance(model, Model):
        raise UserError(f"a model is a Transformer or its TransformerConfig, not {model!r}")
    return model if isinstance(model, Transformer) else Transformer(model)


@partial(jax.jit, static_argnums=0)
def token_log_probs(
    models: Model | tuple[Model, ...],
    params: Any,
    source_ids: Int[Array, "B S"],
    labels: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Log-probability of each target token given those before it; 0 at padding.

    Their sum is `BeamResult.log_probs` of a hypothesis that is the same tokens: pad and bos have no
    probability. Logits exist for one sentence at a time.

    Args:
      models, params: as for `generate`.
      source_ids, labels: sentences with eos, then padding.
    """
    models, params = ensemble(models, params)

    def member(model: Transformer, variables: Any) -> Array:
        model = model.bind({"params": variables})
        hidden = model.hidden(source_ids, shift_right(labels))

        def sentence(row: tuple[Array, Array]) -> Array:
            hidden, ids = row
            log_probs = jax.nn.log_softmax(speakable(model.logits(hidden)))
            return jnp.take_along_axis(log_probs, ids[:, None], axis=1)[:, 0]

        return jax.lax.map(sentence, (hidden, labels))

    members = jnp.stack(list(map(member, models, params)))
    mean = jax.nn.logsumexp(members, axis=0) - jnp.log(len(models))
    return jnp.where(labels != PAD_ID, mean, 0.0)


def speakable(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits without pad and bos: the model can score them as it can any id, but not say them."""
    return logits.at[..., jnp.array([PAD_ID, BOS_ID])].set(-jnp.inf)


class AttentionMaps(NamedTuple):
    """The weights of all three attentions, every layer and head; queries before keys."""

    encoder_self: Float[Array, "Le B N S S"]
    decoder_self: Float[Array, "Ld B N T T"]
    cross: Float[Array, "Ld B N T S"]


@partial(jax.jit, static_argnums=0)
def attention_maps(
    model: Model,
    params: Any,
    source_ids: Int[Array, "B S"],
    labels: Int[Array, "B T"],
) -> AttentionMaps:
    """Where the model looks when it reads a sentence and writes a given translation.

    Position t of the decoder's input writes token t of the target, so row t of the encoder-decoder
    attention is where the model looked to write it. Rows and columns of padding mean nothing.

    Args:
      model: or its configuration.
      source_ids, labels: sentences with eos, then padding.

    Raises:
      UserError: an attention of one's own keeps no weights.
    """
    _, sown = _transformer(model).apply(
        {"params": params},
        source_ids,
        shift_right(labels),
        method="hidden",
        mutable="intermediates",
    )
    kept = sown.get("intermediates", {})
    try:
        encoder, decoder = (kept[stack]["layers"] for stack in ("encoder", "decoder"))
        parts = encoder["self_attention"], decoder["self_attention"], decoder["cross_attention"]
        return AttentionMaps(*(attention["attention_weights"][0] for attention in parts))
    except KeyError:
        raise UserError("an attention of this model sows no attention_weights to show") from None


def alignment_layer(config: TransformerConfig) -> int:
    """The decoder layer to read word alignments from, from 0: the last but one.

    Its attention agrees best with alignments made by people (Garg et al. 2019).
    """
    return max(0, config.decoder_layers - 2)


@partial(jax.jit, static_argnums=(0, 4))
def attention_alignment(
    model: Model,
    params: Any,
    source_ids: Int[Array, "B S"],
    labels: Int[Array, "B T"],
    layer: int | None = None,
) -> Float[Array, "B T S"]:
    """How much each target token looked at each source token when it was written, heads averaged.

    Args:
      model: or its configuration.
      source_ids, labels: sentences with eos, then padding.
      layer: decoder layer, from 0; by default that of `alignment_layer`.

    Raises:
      UserError: there is no such layer.
    """
    config = _transformer(model).config
    layer = alignment_layer(config) if layer is None else layer
    if not 0 <= layer < config.decoder_layers:
        raise UserError(f"layer is {layer}: give 0 to {config.decoder_layers - 1}, of the decoder")
    return jnp.mean(attention_maps(model, params, source_ids, labels).cross[layer], axis=1)


def positional_encoding(
    config: TransformerConfig, params: Any, length: int
) -> Float[np.ndarray, "P D"]:
    """What is added to the source's embeddings at positions 0 … length - 1."""
    model = PositionalEncoding(config.positions, config.max_length)
    variables = {"params": params.get("source_positions", {})}
    return np.asarray(model.apply(variables, jnp.zeros((1, length, config.d_model))))[0]


def shift_right(labels: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The decoder's input: bos, then the target without its last token."""
    return jnp.pad(labels, ((0, 0), (1, 0)), constant_values=BOS_ID)[:, :-1]
