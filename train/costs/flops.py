"""Floating-point operations that the paper's formulas ask for, whatever computes them."""

from jaxformer.config import TransformerConfig


def forward_flops(config: TransformerConfig, batch: int, source: int, target: int) -> int:
    """Multiplications and additions of all matrix products of a forward pass with logits.

    Softmax, LayerNorm and the other element-wise work are left out, as is usual, and masked
    positions are counted: they are computed too.

    Args:
      batch, source, target: B, S and T.
    """
    query_and_output, feed_forward = _weights(config)

    def scores(queries: int, keys: int) -> int:
        return _scores(config, queries, keys)

    encoder_layer = source * (2 * query_and_output + feed_forward) + scores(source, source)
    decoder_layer = (
        target * (3 * query_and_output + feed_forward)
        + source * query_and_output
        + scores(target, target)
        + scores(target, source)
    )
    products = (
        config.encoder_layers * encoder_layer
        + config.decoder_layers * decoder_layer
        + target * config.d_model * config.vocab_size
    )
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
    query_and_output, feed_forward = _weights(config)
    tokens = sentences * beams
    layer = tokens * (3 * query_and_output + feed_forward)
    layer += _scores(config, tokens, slots) + _scores(config, tokens, source)
    return 2 * (config.decoder_layers * layer + tokens * config.d_model * config.vocab_size)


def _weights(config: TransformerConfig) -> tuple[int, int]:
    """Weights of query and output projections (or key and value), and of the feed-forward net."""
    head = config.query_key_dim + config.head_value_dim
    matrices = 3 if config.is_gated else 2
    return config.d_model * config.num_heads * head, config.d_model * config.d_ff * matrices


def _scores(config: TransformerConfig, queries: int, keys: int) -> int:
    return queries * keys * config.num_heads * (config.query_key_dim + config.head_value_dim)
