"""Floating-point operations that the paper's formulas ask for, whatever computes them."""

from jaxformer.config import TransformerConfig


def forward_flops(config: TransformerConfig, batch: int, source: int, target: int) -> int:
    """Multiplications and additions of all matrix products of a forward pass with logits.

    Softmax, LayerNorm and the other element-wise work are left out, as is usual, and masked
    positions are counted: they are computed too.

    Args:
      batch, source, target: B, S and T.
    """
    decoder = _decoder_flops(config, batch * target, target + source)
    return prefill_flops(config, batch, source) + decoder


def prefill_flops(config: TransformerConfig, batch: int, source: int) -> int:
    """FLOP of encoding B sources of S positions, and of their keys and values for the decoder."""
    query_and_output, feed_forward = _weights(config)
    encoder_layer = source * (2 * query_and_output + feed_forward) + _scores(config, source, source)
    keys_and_values = source * query_and_output
    products = config.encoder_layers * encoder_layer + config.decoder_layers * keys_and_values
    return 2 * batch * products


def train_flops(config: TransformerConfig, batch: int, source: int, target: int) -> int:
    """FLOP of a forward and a backward pass, where each product has two more for gradients.

    What `remat` computes a second time is not counted.
    """
    return 3 * forward_flops(config, batch, source, target)


def decode_step_flops(
    config: TransformerConfig, sentences: int, beams: int, source: int, slots: int
) -> int:
    """FLOP of decoding one token of every beam, with logits and the cache of `jaxformer.cache`.

    Args:
      sentences, beams, source: B, K and S; the cache has keys and values of the source already.
      slots: P, of a sentence; each of its beams is scored against all of them.
    """
    return _decoder_flops(config, sentences * beams, slots + source)


def search_flops(config: TransformerConfig, source: int, target: int, beams: int) -> int:
    """FLOP of translating a sentence by K beams: what no implementation can save.

    Args:
      source, target: S, and T tokens of the translation, each side with eos.
      beams: K. The first token is decoded once, as the beams are still equal; each of the K at
        position t has t keys of its own, whatever a cache has room for.
    """
    steps = _decoder_flops(config, 1 + beams * (target - 1), source)
    own_keys = 1 + beams * sum(range(2, target + 1))
    own_scores = 2 * config.decoder_layers * _scores(config, 1, own_keys)
    return prefill_flops(config, 1, source) + steps + own_scores


def _decoder_flops(config: TransformerConfig, tokens: int, keys: int) -> int:
    """FLOP of the decoder for a number of tokens, each of which is scored against `keys` keys."""
    query_and_output, feed_forward = _weights(config)
    layer = tokens * (3 * query_and_output + feed_forward) + _scores(config, tokens, keys)
    return 2 * (config.decoder_layers * layer + tokens * config.d_model * config.vocab_size)


def _weights(config: TransformerConfig) -> tuple[int, int]:
    """Weights of query and output projections (or key and value), and of the feed-forward net."""
    head = config.query_key_dim + config.head_value_dim
    matrices = 3 if config.is_gated else 2
    return config.d_model * config.num_heads * head, config.d_model * config.d_ff * matrices


def _scores(config: TransformerConfig, queries: int, keys: int) -> int:
    return queries * keys * config.num_heads * (config.query_key_dim + config.head_value_dim)
