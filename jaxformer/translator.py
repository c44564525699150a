"""A trained model: strings in, strings out."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.config import EOS_ID, PAD_ID, TransformerConfig
from jaxformer.decoding import BeamResult, beam_search, gnmt_length_penalty, power_length_penalty
from jaxformer.errors import UserError
from jaxformer.run import load_params, load_tokenizers, read_model_config
from jaxformer.tokenizer import Tokenizer
from jaxformer.transformer import Transformer

PenaltyForm = Literal["gnmt", "power"]

#: §6.1: "We set the maximum output length during inference to input length + 50."
EXTRA_LENGTH = 50

# Lines that are read, sorted by length and translated together: enough to fill batches with
# sentences of like length, few enough that memory stays flat and output soon begins.
_WINDOW = 4096

# Batches have a few fixed shapes, so that a few compiled programs serve any input.
_SMALL_BATCHES = (1, 8)


class _Piece(NamedTuple):
    """A sentence, or a part of one that is too long for the model."""

    line: int
    ids: list[int]


def _print_warning(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


class Translator:
    """Translates lines of text with a trained model.

        Translator.load("runs/multi30k").translate(["Two men are outside."], beam_size=4)

    Args:
      config: of the model.
      params: its parameters.
      source_tokenizer, target_tokenizer: the same object if the vocabulary is joint.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: Any,
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
    ) -> None:
        self.config = config
        self.params = params
        self.source_tokenizer = source_tokenizer
        self.target_tokenizer = target_tokenizer

    @classmethod
    def load(cls, run: str | Path, checkpoint: str | int | None = None) -> "Translator":
        """Load a run directory.

        Args:
          run: the directory that training wrote.
          checkpoint: "average", "best", "last" or a step; by default the average, unless training
            went on after it was made, otherwise the best, otherwise the last.

        Raises:
          UserError: the directory is incomplete or damaged; the message says what is missing.
        """
        config = read_model_config(run)
        source, target = load_tokenizers(run)
        for name, expected, tokenizer in (
            ("source", config.source_vocab_size or config.vocab_size, source),
            ("target", config.vocab_size, target),
        ):
            if tokenizer.vocab_size != expected:
                raise UserError(
                    f"{run}: the {name} tokenizer has {tokenizer.vocab_size} pieces and the model "
                    f"{expected}: copy the tokenizer that the model was trained with"
                )
        params = jax.device_put(load_params(run, checkpoint))
        return cls(config, params, source, target)

    def translate(self, lines: Sequence[str], **options: Any) -> list[str]:
        """Translate lines; the result has as many, in the same order.

        Args:
          lines: one sentence each. An empty one gives an empty one.
          **options: as for `translate_stream`.
        """
        return list(self.translate_stream(lines, **options))

    def translate_stream(
        self,
        lines: Iterable[str],
        *,
        beam_size: int = 4,
        length_penalty: float = 0.6,
        length_penalty_form: PenaltyForm = "gnmt",
        batch_tokens: int = 4096,
        warn: Callable[[str], None] = _print_warning,
    ) -> Iterator[str]:
        """Translate lines as they come, a window at a time: input may be of any size.

        Args:
          lines: one sentence each.
          beam_size: K; 1 is greedy search.
          length_penalty: alpha; higher favours longer translations.
          length_penalty_form: "gnmt", ((5 + length) / 6)^alpha (§6.1), or "power", length^alpha.
          batch_tokens: source positions that are translated at once.
          warn: called with a message that names the line if a line is longer than
            `config.max_length` pieces and so translated in parts.

        Yields:
          One translation for each line, in order.
        """
        decode = partial(
            _translate_batch,
            self.params,
            config=self.config,
            beam_size=beam_size,
            length_penalty=float(length_penalty),
            length_penalty_form=length_penalty_form,
        )
        lines = iter(lines)
        first_line = 1
        while window := list(islice(lines, _WINDOW)):
            parts = self._pieces(window, first_line, warn)
            texts: list[list[str]] = [[] for _ in window]
            translations = self._translate_pieces(
                decode, [part.ids for part in parts], batch_tokens
            )
            for part, text in zip(parts, translations, strict=True):
                texts[part.line].append(text)
            yield from (" ".join(text) for text in texts)
            first_line += len(window)

    def _pieces(
        self, lines: list[str], first_line: int, warn: Callable[[str], None]
    ) -> list[_Piece]:
        """Token ids of each line without eos: none if it is empty, several if it is too long."""
        limit = self.config.max_length - 1  # and eos
        pieces = []
        for index, ids in enumerate(self.source_tokenizer.encode_batch(lines)):
            if len(ids) > limit:
                warn(
                    f"line {first_line + index} has {len(ids)} pieces, more than the model's "
                    f"{limit}: translated in parts"
                )
            for part in self._split(ids, limit):
                pieces.append(_Piece(index, part))
        return pieces

    def _split(self, ids: list[int], limit: int) -> Iterator[list[int]]:
        """Cut at the last beginning of a word before the limit, or else at the limit."""
        while len(ids) > limit:
            starts = [
                i
                for i, piece in enumerate(self.source_tokenizer.pieces(ids[: limit + 1]))
                if i > 0 and piece.startswith("▁")
            ]
            cut = starts[-1] if starts else limit
            yield ids[:cut]
            ids = ids[cut:]
        if ids:
            yield ids

    def _translate_pieces(
        self, decode: Callable[..., BeamResult], sources: list[list[int]], batch_tokens: int
    ) -> list[str]:
        """Translate token ids, the longest first, in batches of like length."""
        texts = [""] * len(sources)
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        while order:
            length = min(_bucket(len(sources[order[0]]) + 1), self.config.max_length)
            rows = _rows(len(order), max(1, batch_tokens // length))
            chosen, order = order[:rows], order[rows:]
            source_ids = np.full((rows, length), PAD_ID, np.int32)
            limits = np.zeros(rows, np.int32)
            for row, index in enumerate(chosen):
                ids = [*sources[index], EOS_ID]
                source_ids[row, : len(ids)] = ids
                limits[row] = len(ids) + EXTRA_LENGTH
            result = decode(source_ids, limits)
            best = np.asarray(result.sequences[:, 0])
            for row, index in enumerate(chosen):
                texts[index] = self.target_tokenizer.decode(best[row])
        return texts


def _bucket(length: int) -> int:
    """The least of 8, 12, 16, 24, 32, 48, … that holds `length` source tokens."""
    power = 8
    while True:
        if length <= power:
            return power
        if length <= power * 3 // 2:
            return power * 3 // 2
        power *= 2


def _rows(waiting: int, full: int) -> int:
    """Rows of the next batch: full ones while there are enough, then one that fits the rest."""
    for rows in _SMALL_BATCHES:
        if waiting <= rows <= full:
            return rows
    return full


@partial(jax.jit, static_argnames=("config", "beam_size", "length_penalty", "length_penalty_form"))
def _translate_batch(
    params: Any,
    source_ids: jax.Array,
    length_limits: jax.Array,
    *,
    config: TransformerConfig,
    beam_size: int,
    length_penalty: float,
    length_penalty_form: PenaltyForm,
) -> BeamResult:
    """Beam search over the Transformer. Rows of limit 0 are filling and cost no step."""
    model = Transformer(config)
    variables = {"params": params}
    batch_size, source_length = source_ids.shape
    max_length = source_length + EXTRA_LENGTH
    if config.positions == "learned":
        max_length = min(max_length, config.max_length)  # there are no more
    encoded = model.apply(variables, source_ids, method="encode")
    cache = model.apply(
        variables,
        encoded,
        source_ids,
        beam_size=beam_size,
        max_length=max_length,
        method="init_cache",
    )

    def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits, cache = model.apply(variables, tokens, cache, method="decode_step")
        # The model can score pad as it can any id, but it stands for nothing.
        return logits.at[:, :, PAD_ID].set(-jnp.inf), cache

    penalty = gnmt_length_penalty if length_penalty_form == "gnmt" else power_length_penalty
    return beam_search(
        step,
        cache,
        batch_size=batch_size,
        beam_size=beam_size,
        max_length=max_length,
        length_limits=length_limits,
        length_penalty=penalty(length_penalty),
        reorder=lambda cache, beams: cache.reorder(beams),
    )
