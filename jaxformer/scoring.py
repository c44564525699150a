"""How a model scores a given translation: log-probabilities, attention and word alignment."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.config import PAD_ID, TransformerConfig
from jaxformer.ensemble import Model, as_transformer, ensemble, speakable
from jaxformer.errors import UserError
from jaxformer.ids import as_ids, shift_right
from jaxformer.transformer import Transformer


def token_log_probs(
    models: Model | tuple[Model, ...],
    params: Any,
    source_ids: Int[Array | np.ndarray, "B S"],
    labels: Int[Array | np.ndarray, "B T"],
) -> Float[Array, "B T"]:
    """Log-probability of each target token given those before it; 0 at padding.

    Their sum is `BeamResult.log_probs` of a hypothesis of the same tokens: pad and bos have no
    probability. An id outside the vocabulary gets NaN. Logits exist for one sentence at a time.

    Args:
      models, params: as for `generate`.
      source_ids, labels: sentences with eos, then padding.

    Raises:
      UserError: `models` are not models, `params` are not theirs, or the ids are not integers.
    """
    models, params = ensemble(models, params)
    return _token_log_probs(models, params, source_ids, as_ids(labels, "labels"))


@partial(jax.jit, static_argnums=0)
def _token_log_probs(
    models: tuple[Transformer, ...],
    params: tuple[Any, ...],
    source_ids: Int[Array, "B S"],
    labels: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    def member(model: Transformer, variables: Any) -> Array:
        model = model.bind({"params": variables})
        hidden = model.hidden(source_ids, shift_right(labels))

        def sentence(row: tuple[Array, Array]) -> Array:
            hidden, ids = row
            log_probs = jax.nn.log_softmax(speakable(model.logits(hidden)))
            ids = jnp.where(ids < 0, log_probs.shape[1], ids)  # below 0 would count from the end
            return jnp.take_along_axis(log_probs, ids[:, None], axis=1)[:, 0]

        return jax.lax.map(sentence, (hidden, labels))

    members = jnp.stack(list(map(member, models, params)))
    # The -inf at padding would turn the gradients of all parameters into NaN.
    members = jnp.where(labels != PAD_ID, members, 0.0)
    mean = jax.nn.logsumexp(members, axis=0) - jnp.log(len(models))
    return jnp.where(labels != PAD_ID, mean, 0.0)


class AttentionMaps(NamedTuple):
    """The weights of all three attentions, every layer and head; queries before keys."""

    encoder_self: Float[Array, "Le B N S S"]
    decoder_self: Float[Array, "Ld B N T T"]
    cross: Float[Array, "Ld B N T S"]


def attention_maps(
    model: Model,
    params: Any,
    source_ids: Int[Array | np.ndarray, "B S"],
    labels: Int[Array | np.ndarray, "B T"],
) -> AttentionMaps:
    """Where the model looks when it reads a sentence and writes a given translation.

    Position t of the decoder's input writes token t of the target, so row t of the encoder-decoder
    attention is where the model looked to write it. Rows and columns of padding mean nothing.

    Args:
      model: the model or its configuration.
      source_ids, labels: sentences with eos, then padding.

    Raises:
      UserError: `model` is not a model, or it has a custom attention that sows no weights.
    """
    return _attention_maps(as_transformer(model), params, source_ids, labels)


@partial(jax.jit, static_argnums=0)
def _attention_maps(
    model: Transformer, params: Any, source_ids: Int[Array, "B S"], labels: Int[Array, "B T"]
) -> AttentionMaps:
    _, sown = model.apply(
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
        raise UserError(
            "an attention of this model sows no attention_weights to show: let it sow them"
        ) from None


def alignment_layer(config: TransformerConfig) -> int:
    """The index, from 0, of the decoder layer to read word alignments from: the last but one.

    Its attention agrees best with alignments made by people (Garg et al. 2019).
    """
    return max(0, config.decoder_layers - 2)


def attention_alignment(
    model: Model,
    params: Any,
    source_ids: Int[Array | np.ndarray, "B S"],
    labels: Int[Array | np.ndarray, "B T"],
) -> Float[Array, "B T S"]:
    """How much each target token looked at each source token in `alignment_layer`, heads averaged.

    Args:
      model: the model or its configuration.
      source_ids, labels: sentences with eos, then padding.

    Raises:
      UserError: as for `attention_maps`.
    """
    return _attention_alignment(as_transformer(model), params, source_ids, labels)


@partial(jax.jit, static_argnums=0)
def _attention_alignment(
    model: Transformer, params: Any, source_ids: Int[Array, "B S"], labels: Int[Array, "B T"]
) -> Float[Array, "B T S"]:
    cross = _attention_maps(model, params, source_ids, labels).cross
    return jnp.mean(cross[alignment_layer(model.config)], axis=1)
