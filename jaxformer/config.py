"""The hyper-parameters of a Transformer, checked, and the models of the paper by name."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from jaxformer.errors import UserError
from jaxformer.fields import check_fields

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3

Norm = Literal["post", "pre"]
Activation = Literal["relu", "gelu", "swish", "glu", "reglu", "geglu", "swiglu"]
Embeddings = Literal["shared", "target", "separate"]
Positions = Literal["sinusoidal", "sinusoidal_concat", "learned"]
DType = Literal["float32", "bfloat16"]
FlashAttention = Literal["auto", "cudnn", "pallas", "none"]
Precision = Literal[DType, "int8"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything that determines a Transformer's function. The defaults are the paper's base model.

    Args:
      vocab_size: V, pieces of the target vocabulary, and of the source's if they share one.
      source_vocab_size: pieces of the source vocabulary; None means `vocab_size`.
      d_model: D, width of the residual stream.
      d_ff: F, width inside the feed-forward network (of each half, for the GLU variants).
      num_heads: N, attention heads.
      head_dim: H, the paper's d_k, width of a head's queries and keys; None means D / N.
      value_dim: the paper's d_v, width of a head's values; None means that of the keys.
      encoder_layers, decoder_layers: depth of the two stacks.
      dropout: rate on each sub-layer's output and on embeddings + positions (§5.4).
      attention_dropout: rate on the attention weights; the paper has none.
      activation_dropout: rate on the feed-forward network's hidden layer; the paper has none.
      label_smoothing: ε of §5.4, spread evenly over the whole vocabulary.
      norm: "post", LayerNorm(x + Sublayer(x)) as in the paper, or "pre",
        x + Sublayer(LayerNorm(x)) with one more LayerNorm after each stack.
      activation: function in the feed-forward network; the last four are the gated forms of Shazeer
        (2020), with sigmoid, relu, gelu and swish gates.
      embeddings: "shared", one matrix for source, target and softmax (§3.4); "target", one for
        target and softmax; "separate", three matrices.
      positions: the paper's interleaved sinusoid, its layout with all sines before all cosines
        (Marian's; Tensor2Tensor has that layout too, but other frequencies), or learned vectors
        (Table 3 (E)).
      max_length: longest sequence in tokens that learned positions hold, and where a
        `Translator` splits its input. Sinusoids themselves have no limit.
      attention_bias: whether the four attention projections add a bias; the paper's do not.
      output_bias: whether the logits get a bias, Marian's `final_logits_bias`; the paper's do not.
      layer_norm_epsilon: added to the variance.
      dtype: precision of the computation. Parameters, softmax, logits, loss and LayerNorm
        statistics are float32 in any case.
      quantized: matrices are int8 with a scale for each output, as `quantize` makes them, and
        products with them are of int8: to translate with, not to train.
      flash_attention: whose kernel attends without weights in memory, where it can do the case
        (see `jaxformer.flash`): cuDNN's on a GPU, one in Pallas on a TPU, "auto" that of JAX's
        default backend. Gradients of gradients and `jax.jvp` need "none".
      remat: recompute each layer's activations in the backward pass instead of keeping them.
      scan_layers: compile one layer and loop over it, instead of unrolling the stack. Parameters
        are stacked, [L, ...], either way.

    Raises:
      UserError: a value is impossible; the message names the field, the value and the fix.
    """

    vocab_size: int = 37_000
    source_vocab_size: int | None = None
    d_model: int = 512
    d_ff: int = 2048
    num_heads: int = 8
    head_dim: int | None = None
    value_dim: int | None = None
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    label_smoothing: float = 0.1
    norm: Norm = "post"
    activation: Activation = "relu"
    embeddings: Embeddings = "shared"
    positions: Positions = "sinusoidal"
    max_length: int = 1024
    attention_bias: bool = False
    output_bias: bool = False
    layer_norm_epsilon: float = 1e-6
    dtype: DType = "float32"
    quantized: bool = False
    flash_attention: FlashAttention = "auto"
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and not isinstance(self.dtype, str):  # numpy's None is float64
            with contextlib.suppress(TypeError):  # jnp.bfloat16, as other modules are given it
                object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
        check_fields(self, "TransformerConfig.")
        for name in ("d_model", "d_ff", "num_heads", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                self._reject(name, "give at least 1")
        for name in ("head_dim", "value_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                self._reject(name, "give at least 1, or None for the default")
        for name in ("vocab_size", "source_vocab_size"):
            if getattr(self, name) is not None and getattr(self, name) <= UNK_ID:
                self._reject(name, "give at least 4: ids 0 to 3 are pad, bos, eos and unk")
        for name in ("dropout", "attention_dropout", "activation_dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                self._reject(name, "give a fraction from 0 up to, not including, 1")
        if self.head_dim is None and self.d_model % self.num_heads:
            self._reject(
                "num_heads",
                f"give a divisor of d_model={self.d_model}, or set head_dim, to any width",
            )
        if self.positions != "learned" and self.d_model % 2:
            self._reject("d_model", "give an even number: sinusoids come in sine, cosine pairs")
        if self.max_length < 2:
            self._reject("max_length", "give at least 2, a token and eos")
        if not 0.0 < self.layer_norm_epsilon < 1.0:
            self._reject("layer_norm_epsilon", "give a small positive number such as 1e-6")
        if self.embeddings == "shared" and self.source_vocab_size not in (None, self.vocab_size):
            self._reject(
                "source_vocab_size",
                f'give {self.vocab_size} (vocab_size) or set embeddings to "target" or "separate"',
            )

    def _reject(self, field: str, fix: str) -> None:
        raise UserError(f"TransformerConfig.{field} is {getattr(self, field)!r}: {fix}")

    @property
    def query_key_dim(self) -> int:
        """H, resolved: width of one head's queries and keys."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def head_value_dim(self) -> int:
        """Width of one head's values, resolved."""
        return self.value_dim or self.query_key_dim

    @property
    def encoder_vocab_size(self) -> int:
        """`source_vocab_size`, or `vocab_size` if that is None."""
        return self.source_vocab_size or self.vocab_size

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward network has a gate: a third matrix."""
        return self.activation.endswith("glu")

    @property
    def num_positions(self) -> int | None:
        """`max_length` if positions are learned; otherwise None, as there is no limit."""
        return self.max_length if self.positions == "learned" else None

    def replace(self, **changes: Any) -> TransformerConfig:
        """Return a copy with some fields changed; raises `UserError` like the constructor."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UserError(f"TransformerConfig has no field {name!r}: choose one of {known}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TransformerConfig:
        """Inverse of `to_dict`. Missing fields have their default values."""
        return cls().replace(**fields)


_BASE = TransformerConfig()
_BIG = _BASE.replace(d_model=1024, d_ff=4096, num_heads=16, dropout=0.3)

#: The models of the paper, with its 37k vocabulary, and `tiny`, the text-only Multi30k model of
#: Wu et al. (2021), "Good for Misconceived Reasons". Names such as "C_d256" are rows of Table 3.
PRESETS: Mapping[str, TransformerConfig] = MappingProxyType(
    {
        "tiny": _BASE.replace(
            vocab_size=10_000,
            d_model=128,
            d_ff=256,
            num_heads=4,
            encoder_layers=4,
            decoder_layers=4,
            dropout=0.3,
        ),
        "base": _BASE,
        "big": _BIG,
        "A_h1": _BASE.replace(num_heads=1),
        "A_h4": _BASE.replace(num_heads=4),
        "A_h16": _BASE.replace(num_heads=16),
        "A_h32": _BASE.replace(num_heads=32),
        "B_dk16": _BASE.replace(head_dim=16, value_dim=64),
        "B_dk32": _BASE.replace(head_dim=32, value_dim=64),
        "C_N2": _BASE.replace(encoder_layers=2, decoder_layers=2),
        "C_N4": _BASE.replace(encoder_layers=4, decoder_layers=4),
        "C_N8": _BASE.replace(encoder_layers=8, decoder_layers=8),
        "C_d256": _BASE.replace(d_model=256),
        "C_d1024": _BASE.replace(d_model=1024),
        "C_ff1024": _BASE.replace(d_ff=1024),
        "C_ff4096": _BASE.replace(d_ff=4096),
        "D_dropout0.0": _BASE.replace(dropout=0.0),
        "D_dropout0.2": _BASE.replace(dropout=0.2),
        "D_smoothing0.0": _BASE.replace(label_smoothing=0.0),
        "D_smoothing0.2": _BASE.replace(label_smoothing=0.2),
        "E_learned": _BASE.replace(positions="learned"),
    }
)
