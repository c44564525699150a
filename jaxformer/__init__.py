"""The Transformer of "Attention Is All You Need" as Flax linen modules and pure functions."""

from jaxformer.attention import MultiHeadAttention, attention_weights, dot_product_attention
from jaxformer.cache import DecoderCache
from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, PRESETS, UNK_ID, TransformerConfig
from jaxformer.dropout import dropout
from jaxformer.errors import UserError
from jaxformer.layers import Embedding, FeedForward, PositionalEncoding, Residual
from jaxformer.losses import cross_entropy, cross_entropy_sums
from jaxformer.schedules import warmup_inverse_sqrt
from jaxformer.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, Transformer
