"""Floating-point operations that the paper's formulas ask for, whatever computes them."""

from jaxformer.config import TransformerConfig


def forward_flops(config: TransformerConfig, batch: int, source: int, target: int) -> int:
    """Multiplications and additions of all matrix products of a forward pass with logits.

    Softmax, LayerNorm and the other element-wise work are left out, as is usual, and masked
    positions are counted: they are computed too.

    Args:
      batch, source, target: B, S and T.
    """
    heads, key, value = config.num_heads, config.query_key_dim, config.head_value_dim
    width, hidden = config.d_model, config.d_ff
    query_and_output = width * heads * (key + value)  # as many as of keys and values
    feed_forward = width * hidden * (3 if config.activation.endswith("glu") else 2)

    def scores(queries: int, keys: int) -> int:
        return queries * keys * heads * (key + value)

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
        + target * width * config.vocab_size
    )
    return 2 * batch * products


def train_flops(config: TransformerConfig, batch: int, source: int, target: int) -> int:
    """Of forward and backward pass: each product has two more as its gradients.

    What `remat` computes twice is counted once.
    """
    return 3 * forward_flops(config, batch, source, target)
