"""What a translator says about a sentence: plain data, no model behind it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Hypothesis(NamedTuple):
    """One translation of a line."""

    text: str
    score: float  # what ranks it: log_prob over the length penalty, less the coverage penalty
    log_prob: float  # of its tokens, and of eos if it is finished, natural logarithm
    tokens: list[str]  # pieces of the vocabulary, without eos
    ids: list[int]  # the ids of `tokens`
    finished: bool  # ended by eos, not cut off at the length limit


class Score(NamedTuple):
    """How probable the model finds a given translation."""

    log_prob: float  # the sum of `token_log_probs`, natural logarithm
    tokens: list[str]  # pieces of the vocabulary, eos last
    token_log_probs: list[float]


class Alignment(NamedTuple):
    """Where the model looks when it writes a given translation."""

    source_tokens: list[str]  # S pieces, eos last
    target_tokens: list[str]  # T pieces, eos last
    weights: np.ndarray  # [T, S], rows sum to 1

    def word_links(self) -> list[tuple[int, int]]:
        """The source word that each target word looked at most, as (source, target) from 0."""
        _, source = _words(self.source_tokens[:-1])
        _, target = _words(self.target_tokens[:-1])
        if not source or not target:
            return []
        weights = np.zeros((target[-1] + 1, source[-1] + 1))
        np.add.at(weights, np.ix_(target, source), self.weights[:-1, :-1])
        return [(int(row.argmax()), index) for index, row in enumerate(weights)]

    def joined(self) -> "Alignment":
        """The same alignment with pieces joined into words; eos is a word of its own."""
        source, target = (_words(side) for side in (self.source_tokens, self.target_tokens))
        return Alignment(source[0], target[0], _join(self.weights, target[1], source[1]))


class NamedAttention(NamedTuple):
    """One of the paper's three attentions, as `Explanation.attentions` yields them."""

    name: str
    weights: Float[np.ndarray, "L N T S"]
    queries: list[str]  # T pieces
    keys: list[str]  # S pieces
    causal: bool = False  # whether a query sees no later key

    @property
    def slug(self) -> str:
        """The name in a form that fits a URL or a file name."""
        return self.name.replace(" ", "-").lower()


@dataclass(frozen=True, eq=False)
class Explanation:
    """How a model arrived at a translation. Weights are float32 and sum to 1 for each query.

    Attributes:
      source: the sentence.
      hypotheses: its translations, best first or as drawn. All fields below are about the first.
      source_tokens: what the encoder read, S pieces, eos last.
      target_tokens: what the decoder wrote, T pieces, eos last even if the length limit came first.
      decoder_tokens: what the decoder read: bos, then the target without its last piece.
      token_log_probs: of each target piece given those before it, natural logarithm.
      encoder_self_attention: from source to source, query first.
      decoder_self_attention: from decoder input to decoder input, masked.
      cross_attention: from decoder input to source: row t is where the model looked, layer by
        layer and head by head, to write target piece t.
      alignment: how much each target piece looked at each source piece.
      positional_encoding: the vector added to the source's embeddings at each position, for as
        many positions as the longer of source and target has.
    """

    source: str
    hypotheses: list[Hypothesis]
    source_tokens: list[str]
    target_tokens: list[str]
    decoder_tokens: list[str]
    token_log_probs: Float[np.ndarray, "T"]
    encoder_self_attention: Float[np.ndarray, "Le N S S"]
    decoder_self_attention: Float[np.ndarray, "Ld N R R"]
    cross_attention: Float[np.ndarray, "Ld N T S"]
    alignment: Alignment
    positional_encoding: Float[np.ndarray, "P D"]

    def attentions(self) -> Iterator[NamedAttention]:
        """Yield the paper's three attentions."""
        source, read, written = self.source_tokens, self.decoder_tokens, self.target_tokens
        yield NamedAttention("Encoder self-attention", self.encoder_self_attention, source, source)
        yield NamedAttention(
            "Masked decoder self-attention", self.decoder_self_attention, read, read, causal=True
        )
        yield NamedAttention("Encoder-decoder attention", self.cross_attention, written, source)

    def joined(self) -> "Explanation":
        """The same explanation with pieces joined into words.

        A word is looked at as much as all its pieces together, and looks where they look on
        average; its log-probability is the sum of theirs. The positional encoding stays by pieces.
        """
        source_tokens, source = _words(self.source_tokens)
        target_tokens, target = _words(self.target_tokens)
        decoder_tokens, decoder = _words(self.decoder_tokens)
        log_probs = np.zeros(len(target_tokens), np.float32)
        np.add.at(log_probs, target, self.token_log_probs)
        return replace(
            self,
            source_tokens=source_tokens,
            target_tokens=target_tokens,
            decoder_tokens=decoder_tokens,
            token_log_probs=log_probs,
            encoder_self_attention=_join(self.encoder_self_attention, source, source),
            decoder_self_attention=_join(self.decoder_self_attention, decoder, decoder),
            cross_attention=_join(self.cross_attention, target, source),
            alignment=self.alignment.joined(),
        )


def _words(pieces: list[str]) -> tuple[list[str], list[int]]:
    """Return the words, and the index of each piece's word. Marks such as </s> are words, too.

    ["▁a", "b", "▁c", "</s>"] -> ["ab", "c", "</s>"], [0, 0, 1, 2]

    Every sentence in pieces begins with a "▁": where there is none, they are words already.
    """
    if not any(piece.startswith("▁") for piece in pieces):
        return list(pieces), list(range(len(pieces)))
    words: list[str] = []
    numbers: list[int] = []
    after_mark = True
    for piece in pieces:
        mark = piece in ("<s>", "</s>")
        if mark or after_mark or piece.startswith("▁"):
            words.append("")
        words[-1] += piece.removeprefix("▁")
        numbers.append(len(words) - 1)
        after_mark = mark
    return words, numbers


def _join(weights: np.ndarray, queries: list[int], keys: list[int]) -> np.ndarray:
    """Sum over the keys of a word and average over its queries: [..., T, S] to words."""
    to_key = np.equal.outer(keys, np.arange(max(keys) + 1)).astype(np.float32)
    to_query = np.equal.outer(np.arange(max(queries) + 1), queries).astype(np.float32)
    return to_query / to_query.sum(axis=1, keepdims=True) @ weights @ to_key
