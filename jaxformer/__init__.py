"""The Transformer of "Attention Is All You Need" as Flax linen modules and pure functions.

    import jaxformer as jf

    model = jf.Transformer(jf.PRESETS["base"].replace(vocab_size=32_000))
    params = model.init(rng, source_ids, target_ids)["params"]
    logits = model.apply({"params": params}, source_ids, target_ids)  # [B, T, V] float32

Dimension letters, in every shape: B batch, T target or query length, S source or key length,
N heads, H head_dim, D d_model, F d_ff, V vocabulary, K beams, L layers.
"""

from jaxformer.attention import MultiHeadAttention, attention_weights, dot_product_attention
from jaxformer.beam import BeamSearch, gnmt_length_penalty, power_length_penalty
from jaxformer.cache import DecoderCache, LayerCache
from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, PRESETS, UNK_ID, TransformerConfig
from jaxformer.decoder import Decoder, DecoderLayer
from jaxformer.decoding import beam_search, greedy_search, sample
from jaxformer.dropout import Dropout, dropout
from jaxformer.embedding import Embedding
from jaxformer.encoder import Encoder, EncoderLayer
from jaxformer.errors import UserError
from jaxformer.feed_forward import FeedForward
from jaxformer.generation import generate
from jaxformer.generation_config import GenerationConfig
from jaxformer.generator import Generator
from jaxformer.ids import shift_right
from jaxformer.linear import Linear
from jaxformer.losses import LossSums, cross_entropy, cross_entropy_sums
from jaxformer.masks import SegmentMask, causal_mask, padding_mask, segment_mask
from jaxformer.positions import PositionalEncoding, segment_positions, sinusoid
from jaxformer.quantization import quantize
from jaxformer.residual import Residual
from jaxformer.results import Alignment, Explanation, Hypothesis, Score
from jaxformer.sampling import Sampling
from jaxformer.schedules import cooldown, warmup_inverse_sqrt
from jaxformer.scoring import AttentionMaps, attention_alignment, attention_maps, token_log_probs
from jaxformer.search import BeamResult
from jaxformer.tokenizer import Tokenizer
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator

__version__ = "0.1.0"

__all__ = [
    "BOS_ID",
    "EOS_ID",
    "PAD_ID",
    "PRESETS",
    "UNK_ID",
    "Alignment",
    "AttentionMaps",
    "BeamResult",
    "BeamSearch",
    "Decoder",
    "DecoderCache",
    "DecoderLayer",
    "Dropout",
    "Embedding",
    "Encoder",
    "EncoderLayer",
    "Explanation",
    "FeedForward",
    "GenerationConfig",
    "Generator",
    "Hypothesis",
    "LayerCache",
    "Linear",
    "LossSums",
    "MultiHeadAttention",
    "PositionalEncoding",
    "Residual",
    "Sampling",
    "Score",
    "SegmentMask",
    "Tokenizer",
    "Transformer",
    "TransformerConfig",
    "Translator",
    "UserError",
    "attention_alignment",
    "attention_maps",
    "attention_weights",
    "beam_search",
    "causal_mask",
    "cooldown",
    "cross_entropy",
    "cross_entropy_sums",
    "dot_product_attention",
    "dropout",
    "generate",
    "gnmt_length_penalty",
    "greedy_search",
    "padding_mask",
    "power_length_penalty",
    "quantize",
    "sample",
    "segment_mask",
    "segment_positions",
    "shift_right",
    "sinusoid",
    "token_log_probs",
    "warmup_inverse_sqrt",
]
