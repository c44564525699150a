"""Marian's config.json from and to `TransformerConfig`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.interop.marian_weights import LAYER_NORM_EPSILON
from jaxformer.tokenizer import Tokenizer

# What a config.json that lacks these fields means.
_DEFAULTS = {
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "decoder_vocab_size": None,
    "dropout": 0.1,
    "max_position_embeddings": 1024,
    "scale_embedding": False,
    "share_encoder_decoder_embeddings": True,
    "tie_word_embeddings": True,
}

_STACKS = ("encoder", "decoder")

_INTEGERS = (
    "vocab_size",
    "decoder_vocab_size",
    "d_model",
    "max_position_embeddings",
    *(f"{stack}_{of}" for stack in _STACKS for of in ("layers", "attention_heads", "ffn_dim")),
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
)

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "swish", "silu": "swish"}

# (share_encoder_decoder_embeddings, tie_word_embeddings)
_SHARED_AND_TIED = {"shared": (True, True), "target": (False, True), "separate": (False, False)}


def complete_settings(theirs: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the config.json `theirs` with defaults for the fields that it leaves out.

    Raises:
      UserError: it is not Marian's, or a field that must be an integer is missing or is not one.
    """
    settings = {**_DEFAULTS, **theirs}
    settings["decoder_vocab_size"] = settings["decoder_vocab_size"] or settings.get("vocab_size")
    if "version" in settings and "model" in settings:
        raise UserError(f"{path} is that of a run: choose what to convert it to with --to")
    if settings.get("model_type") != "marian":
        raise UserError(
            f"{path} has model_type={settings.get('model_type')!r}: give a Marian model's directory"
        )
    for field in _INTEGERS:
        if type(settings.get(field)) is not int:
            raise UserError(f"{path} has {field}={settings.get(field)!r}: it must be an integer")
    return settings


def import_config(
    settings: Mapping[str, Any], orders: Mapping[str, np.ndarray], path: Path
) -> TransformerConfig:
    """Return our configuration of a Marian model; `output_bias` depends on its weights.

    Args:
      settings: as `complete_settings` returned them.
      orders: their id for each of ours, in the "source" and the "target" vocabulary.
      path: of their config.json.

    Raises:
      UserError: `TransformerConfig` cannot express the model; the message names their field.
    """

    def refuse(field: str, why: str) -> NoReturn:
        raise UserError(f"{path} has {field}={settings.get(field)!r}: {why}")

    for field in ("scale_embedding", "share_encoder_decoder_embeddings", "tie_word_embeddings"):
        if type(settings[field]) is not bool:
            refuse(field, "it must be true or false")
    for field in ("dropout", "attention_dropout", "activation_dropout"):
        if type(settings[field]) not in (int, float):
            refuse(field, "it must be a number")
    for field in ("encoder_layers", "decoder_layers"):
        if settings[field] > 10_000:
            refuse(field, "no model has so many")
    if not settings["scale_embedding"]:
        refuse("scale_embedding", "only models that scale their embeddings can be imported")
    if settings.get("activation_function") not in list(_ACTIVATIONS):  # may be any JSON
        refuse("activation_function", f"only {', '.join(_ACTIVATIONS)} can be imported")
    for field in ("attention_heads", "ffn_dim"):
        encoder, decoder = (settings[f"{stack}_{field}"] for stack in _STACKS)
        if encoder != decoder:
            refuse(f"encoder_{field}", f"that of the decoder must be the same, not {decoder}")
    share, tie = settings["share_encoder_decoder_embeddings"], settings["tie_word_embeddings"]
    if share and not tie:
        refuse(
            "tie_word_embeddings", "only models whose shared embeddings are tied can be imported"
        )
    if share and orders["source"].tolist() != orders["target"].tolist():
        refuse("share_encoder_decoder_embeddings", "impossible with these two vocabularies")
    embeddings = "shared" if share else "target" if tie else "separate"
    try:
        return TransformerConfig.from_dict(
            {
                "vocab_size": len(orders["target"]),
                "source_vocab_size": None if share else len(orders["source"]),
                "d_model": settings["d_model"],
                "d_ff": settings["encoder_ffn_dim"],
                "num_heads": settings["encoder_attention_heads"],
                "encoder_layers": settings["encoder_layers"],
                "decoder_layers": settings["decoder_layers"],
                "dropout": float(settings["dropout"]),
                "attention_dropout": float(settings["attention_dropout"]),
                "activation_dropout": float(settings["activation_dropout"]),
                "activation": _ACTIVATIONS[settings["activation_function"]],
                "embeddings": embeddings,
                "positions": "sinusoidal_concat",
                "max_length": settings["max_position_embeddings"],
                "attention_bias": True,
                "layer_norm_epsilon": LAYER_NORM_EPSILON,
            }
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def check_expressible(config: TransformerConfig, path: Path) -> None:
    """Raise `UserError` if Marian cannot express a model, naming the field of its config.json."""

    def refuse(field: str, only: str) -> NoReturn:
        raise UserError(
            f"{path}: Marian cannot express model.{field}={getattr(config, field)!r}, only {only}: "
            "choose another format"
        )

    choices: Mapping[str, Sequence[str]] = {
        "norm": ("post",),
        "activation": ("relu", "gelu", "swish"),
        "positions": ("sinusoidal", "sinusoidal_concat"),
    }
    for field, possible in choices.items():
        if getattr(config, field) not in possible:
            refuse(field, ", ".join(possible))
    if config.query_key_dim * config.num_heads != config.d_model:
        refuse("head_dim", "d_model / num_heads")
    if config.head_value_dim != config.query_key_dim:
        refuse("value_dim", "d_model / num_heads")
    # The error that `fit_residual_stream` has to leave grows with it.
    if config.layer_norm_epsilon > 2 * LAYER_NORM_EPSILON:
        refuse("layer_norm_epsilon", f"up to {2 * LAYER_NORM_EPSILON:g}")


def own_section(config: TransformerConfig, source: Tokenizer, target: Tokenizer) -> dict[str, Any]:
    """What `from_marian` would have noted in one of our runs, had the model come from Marian."""
    share, tie = _SHARED_AND_TIED[config.embeddings]
    of_stacks = {
        f"{stack}_{field}": value
        for stack, layers in zip(
            _STACKS, (config.encoder_layers, config.decoder_layers), strict=True
        )
        for field, value in (
            ("layers", layers),
            ("attention_heads", config.num_heads),
            ("ffn_dim", config.d_ff),
        )
    }
    ids = {
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "decoder_start_token_id": BOS_ID,
        "forced_eos_token_id": EOS_ID,
    }
    return {
        "config": {
            "architectures": ["MarianMTModel"],
            "model_type": "marian",
            "is_encoder_decoder": True,
            "vocab_size": config.encoder_vocab_size,
            "decoder_vocab_size": config.vocab_size,
            "d_model": config.d_model,
            **of_stacks,
            "num_hidden_layers": config.encoder_layers,
            "activation_function": config.activation,
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "activation_dropout": config.activation_dropout,
            "scale_embedding": True,
            "static_position_embeddings": True,
            "max_position_embeddings": config.max_length,
            "share_encoder_decoder_embeddings": share,
            "tie_word_embeddings": tie,
            "torch_dtype": "float32",
            **ids,
        },
        # The settings that bring `generate` closest to `Translator`.
        "generation_config": {
            **ids,
            "bad_words_ids": [[PAD_ID], [BOS_ID]],
            "renormalize_logits": True,
            "num_beams": 4,
            "length_penalty": 0.6,
            "early_stopping": "never",
            "max_length": config.max_length,
        },
        "tokenizer_config": {
            "tokenizer_class": "MarianTokenizer",
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": config.max_length,
            "separate_vocabs": source.vocabulary != target.vocabulary,
            "clean_up_tokenization_spaces": False,
        },
        "special_ids": {side: [PAD_ID, BOS_ID, EOS_ID, UNK_ID] for side in ("source", "target")},
        "dtype": "float32",
    }
