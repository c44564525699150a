"""Export to CTranslate2, which translates in C++ on CPUs and GPUs.

    to_ctranslate2("runs/multi30k", "multi30k_ct2", quantization="int8")

The directory holds the model, its vocabularies and the tokenizers. Using it takes neither this
package nor JAX:

    import ctranslate2, sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor("multi30k_ct2/tokenizer.model")
    translator = ctranslate2.Translator("multi30k_ct2")
    pieces = tokenizer.encode(["Two men are outside."], out_type=str)
    results = translator.translate_batch(pieces, beam_size=4, length_penalty=0.6)
    print(tokenizer.decode([result.hypotheses[0] for result in results]))

With two vocabularies, `tokenizer.source.model` encodes and `tokenizer.target.model` decodes.
CTranslate2 adds bos and eos, and never generates pad or bos. A language code at the beginning of a
line, such as ">>deu<<", is a piece of its own: take it off before encoding the rest.

In float32 its log-probabilities are those of `Transformer`, and greedy search (`beam_size=1`) gives
the tokens of our `Translator`, except for these differences:

- `min_decoding_length=1`, the default, forbids empty translations; 0 allows them, as we do.
- Beam search divides by length ** length_penalty, and a sentence is done with its K-th finished
  hypothesis: ours does so with `length_penalty_form="power", early_stopping=True`. A hypothesis
  that the length limit cuts off may beat those that have ended; in ours it ranks after them.
- Output ends at `max_decoding_length=256` tokens by default and input at `max_input_length=1024`;
  our output ends at the source's length + 50, and we translate longer lines in parts. Both limits
  must be at most `max_length` if the model has learned positions: longer sentences fail otherwise.
- An empty line is translated like any other: leave it out.
- The type of the computation is chosen on loading, `Translator(…, compute_type="bfloat16")`,
  whatever `TransformerConfig.dtype` says.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.interop.directory import check_free, new_directory
from jaxformer.positions import sinusoid
from jaxformer.run_directory import save_tokenizers
from jaxformer.tokenizer import Tokenizer
from jaxformer.translator import Translator

# CTranslate2's own names, which its default configuration takes for granted.
_SPECIAL_TOKENS = {PAD_ID: "<pad>", BOS_ID: "<s>", EOS_ID: "</s>", UNK_ID: "<unk>"}

_ACTIVATIONS = {
    "relu": "RELU",
    "gelu": "GELU",
    "swish": "SWISH",
    "glu": "Sigmoid",
    "reglu": "RELU",
    "geglu": "GELU",
    "swiglu": "SWISH",
}

# Sinusoids are stored as a table: room for twice what CTranslate2 reads by default.
_NUM_POSITIONS = 2048

# Added to logits that must not win. Its exponential is 0 in every type, and float16 can hold it.
_NEVER = -1e4


def to_ctranslate2(
    run: str | Path,
    directory: str | Path,
    *,
    quantization: str | None = None,
    checkpoint: str | int | None = None,
) -> None:
    """Write the model of a run directory as a CTranslate2 model.

    Args:
      run: the directory that training wrote.
      directory: what to write; must be new or empty.
      quantization: type of the stored weights: None for float32, "float16", "bfloat16", "int16",
        or "int8" and its mixtures "int8_float32", "int8_float16", "int8_bfloat16".
      checkpoint: as for `Translator.load`.

    Raises:
      UserError: CTranslate2 is not installed, cannot express the model, or does not know the
        quantization; the run is incomplete; or `directory` cannot be written.
    """
    try:
        from ctranslate2.specs.model_spec import ACCEPTED_MODEL_TYPES
    except ImportError as error:
        raise UserError("the export needs CTranslate2: pip install ctranslate2") from error
    if quantization not in (None, *ACCEPTED_MODEL_TYPES):
        raise UserError(
            f"quantization is {quantization!r}: choose one of {', '.join(ACCEPTED_MODEL_TYPES)}"
        )
    check_free(directory)
    translator = Translator.load(run, checkpoint)
    params = jax.tree.map(np.asarray, translator.params)
    spec = _model_spec(translator.config, params)
    spec.register_source_vocabulary(_vocabulary(translator.source_tokenizer))
    spec.register_target_vocabulary(_vocabulary(translator.target_tokenizer))
    spec.validate()
    spec.optimize(quantization=quantization)
    with new_directory(directory) as partial:
        spec.save(str(partial))
        save_tokenizers(partial, translator.source_tokenizer, translator.target_tokenizer)


def _vocabulary(tokenizer: Tokenizer) -> list[str]:
    return [_SPECIAL_TOKENS.get(i, piece) for i, piece in enumerate(tokenizer.vocabulary)]


def _model_spec(config: TransformerConfig, params: Mapping[str, Any]) -> Any:
    """Return a `ctranslate2.specs.TransformerSpec` with all its weights, but no vocabulary yet."""
    from ctranslate2.specs import common_spec, transformer_spec

    if config.head_value_dim != config.query_key_dim:
        raise UserError(
            f"TransformerConfig.value_dim is {config.head_value_dim} and head_dim "
            f"{config.query_key_dim}: CTranslate2 needs them equal; export to StableHLO instead"
        )
    architecture = {
        "num_heads": config.num_heads,
        "head_dim": config.query_key_dim,
        "pre_norm": config.norm == "pre",
        "activation": common_spec.Activation[_ACTIVATIONS[config.activation]],
        "ffn_glu": config.is_gated,
    }
    encoder = transformer_spec.TransformerEncoderSpec(config.encoder_layers, **architecture)
    decoder = transformer_spec.TransformerDecoderSpec(config.decoder_layers, **architecture)
    spec = transformer_spec.TransformerSpec(encoder, decoder)
    spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = config.layer_norm_epsilon

    _set_encoder(encoder, config, params)
    _set_decoder(decoder, config, params)
    return spec


def _set_encoder(spec: Any, config: TransformerConfig, params: Mapping[str, Any]) -> None:
    _set_embedding(spec, spec.embeddings[0], config, params, "source")
    for layer, weights in _layers(spec, params["encoder"]):
        _set_self_attention(layer.self_attention, weights)
        _set_feed_forward(layer.ffn, weights)
    if config.norm == "pre":
        _set_layer_norm(spec.layer_norm, params["encoder"]["layer_norm"])


def _set_decoder(spec: Any, config: TransformerConfig, params: Mapping[str, Any]) -> None:
    _set_embedding(spec, spec.embeddings, config, params, "target")
    for layer, weights in _layers(spec, params["decoder"]):
        _set_self_attention(layer.self_attention, weights)
        _set_cross_attention(layer.attention, weights)
        _set_feed_forward(layer.ffn, weights)
    if config.norm == "pre":
        _set_layer_norm(spec.layer_norm, params["decoder"]["layer_norm"])
    bias = _array(params.get("output_bias", np.zeros(config.vocab_size)))
    bias[[PAD_ID, BOS_ID]] = _NEVER
    spec.projection.weight = _array(_table(params, "output_embedding"))
    spec.projection.bias = bias


def _layers(spec: Any, params: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Pair the specification of each layer with its slice of the parameters [L, …]."""
    for index, layer in enumerate(spec.layer):
        yield layer, jax.tree.map(lambda stacked, index=index: stacked[index], params["layers"])


def _set_embedding(
    spec: Any, embedding: Any, config: TransformerConfig, params: Mapping[str, Any], side: str
) -> None:
    """Set a stack's embedding and positions. CTranslate2 stores equal tables once by itself."""
    embedding.weight = _array(_table(params, f"{side}_embedding"))
    spec.scale_embeddings = True  # times √D
    if config.positions == "learned":
        encodings = params[f"{side}_positions"]["embedding"]
    else:
        positions = jnp.arange(max(_NUM_POSITIONS, 2 * config.max_length))
        interleaved = config.positions == "sinusoidal"
        encodings = sinusoid(positions, config.d_model, interleaved=interleaved)
    spec.position_encodings.encodings = _array(encodings)


def _table(params: Mapping[str, Any], name: str) -> Any:
    """The table [V, D] of that name, or the shared one that `Transformer` uses instead."""
    return params.get(name, params["embedding"])["embedding"]


def _set_self_attention(spec: Any, weights: Mapping[str, Any]) -> None:
    attention = weights["self_attention"]
    _set_linear(spec.linear[0], *(attention[name] for name in ("query", "key", "value")))
    _set_linear(spec.linear[1], attention["output"], inputs=2)
    _set_layer_norm(spec.layer_norm, weights["self_attention_residual"]["layer_norm"])


def _set_cross_attention(spec: Any, weights: Mapping[str, Any]) -> None:
    attention = weights["cross_attention"]
    _set_linear(spec.linear[0], attention["query"])
    _set_linear(spec.linear[1], attention["key"], attention["value"])
    _set_linear(spec.linear[2], attention["output"], inputs=2)
    _set_layer_norm(spec.layer_norm, weights["cross_attention_residual"]["layer_norm"])


def _set_feed_forward(spec: Any, weights: Mapping[str, Any]) -> None:
    feed_forward = weights["feed_forward"]
    if "gate" in feed_forward:
        _set_linear(spec.linear_0, feed_forward["gate"])
        _set_linear(spec.linear_0_noact, feed_forward["hidden"])
    else:
        _set_linear(spec.linear_0, feed_forward["hidden"])
    _set_linear(spec.linear_1, feed_forward["output"])
    _set_layer_norm(spec.layer_norm, weights["feed_forward_residual"]["layer_norm"])


def _set_linear(spec: Any, *maps: Mapping[str, Any], inputs: int = 1) -> None:
    """Set a weight [out, in] from one or more maps of the same input, stacked.

    Args:
      spec: a `LinearSpec`.
      *maps: kernels whose first `inputs` axes are the input, with biases or without.
      inputs: 2 for attention's output, whose input is the heads [N, H].
    """

    def matrix(kernel: Any) -> np.ndarray:
        return np.reshape(kernel, (math.prod(kernel.shape[:inputs]), -1)).T

    spec.weight = _array(np.concatenate([matrix(each["kernel"]) for each in maps]))
    if "bias" in maps[0]:
        spec.bias = _array(np.concatenate([np.ravel(each["bias"]) for each in maps]))


def _set_layer_norm(spec: Any, weights: Mapping[str, Any]) -> None:
    spec.gamma, spec.beta = _array(weights["scale"]), _array(weights["bias"])


def _array(weights: Any) -> np.ndarray:
    """A copy, because quantization works in place."""
    return np.array(weights, np.float32, order="C")
