"""Text to token ids and back, with a sentencepiece model."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from jaxformer.errors import UserError


class Tokenizer:
    """A sentencepiece model whose pad, bos, eos and unk have the ids 0, 1, 2 and 3.

    Attributes:
      model: the serialized model, the bytes of a `tokenizer.model` file.
      vocabulary: the piece of each id, the four above first; "▁" stands for a space.
      vocab_size: the number of pieces.

    Raises:
      UserError: `model` is not a sentencepiece model, or gives the special pieces other ids.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        self._processor = _processor(model, name)
        self.model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.vocabulary: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        special = {
            "pad": (self._processor.pad_id(), PAD_ID),
            "bos": (self._processor.bos_id(), BOS_ID),
            "eos": (self._processor.eos_id(), EOS_ID),
            "unk": (self._processor.unk_id(), UNK_ID),
        }
        if wrong := [piece for piece, (found, expected) in special.items() if found != expected]:
            raise UserError(
                f"{name} has {', '.join(f'{piece}_id={special[piece][0]}' for piece in wrong)}: "
                f"train it with --pad_id={PAD_ID} --bos_id={BOS_ID} --eos_id={EOS_ID} "
                f"--unk_id={UNK_ID}"
            )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Return the tokenizer in a sentencepiece model file.

        Raises:
          UserError: the file cannot be read, or as for the class.
        """
        return cls(_read(path), str(path))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without bos and eos; white space around it is ignored."""
        return self._processor.encode(text)

    def encode_batch(
        self, texts: Sequence[str], *, dropout: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """Return `encode` of each text, computed on all cores.

        Args:
          texts: B of them.
          dropout: probability that a merge of byte-pair encoding is skipped, so that words fall
            into smaller pieces, different ones each time: BPE-dropout (Provilkov et al., 2020,
            arXiv 1910.13267). For training text; computed on one core.
          seed: of the skipped merges; the same seed and texts give the same ids.
        """
        return self._processor.encode(list(texts), **_sampling(dropout, seed))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of `ids` without pad, bos and eos; unk becomes " ⁇ "."""
        special = (PAD_ID, BOS_ID, EOS_ID)
        return self._processor.decode([int(i) for i in ids if int(i) not in special])

    def pieces(self, ids: Iterable[int] | np.ndarray) -> list[str]:
        """Return the vocabulary's piece of each id; "▁" in it stands for a space."""
        return [self.vocabulary[int(i)] for i in ids]


class VocabularyTokenizer(Tokenizer):
    """A sentencepiece model whose pieces are numbered by a list of their own, as Marian's are.

    The model splits text into pieces and the list gives their ids; a piece not in it is unk. A
    language code that begins a text, such as ">>deu<<", is one piece, whatever the model does.

    Attributes:
      model: the serialized model; its own numbering is ignored.
      vocabulary: the piece of each id, pad, bos, eos and unk first.
      vocab_size: the number of pieces.

    Raises:
      UserError: `model` is not a sentencepiece model.
    """

    def __init__(self, model: bytes, vocabulary: Sequence[str], name: str = "tokenizer"):
        self._processor = _processor(model, name)
        self.model = model
        self.vocabulary = list(vocabulary)
        self.vocab_size = len(self.vocabulary)
        # Special pieces have no entry, so that no text can spell them.
        self._ids = {piece: id for id, piece in enumerate(self.vocabulary) if id > UNK_ID}

    @classmethod
    def load_pair(cls, path: str | Path, vocabulary: str | Path) -> "VocabularyTokenizer":
        """Return the tokenizer of a sentencepiece model file and a JSON list of pieces.

        Raises:
          UserError: a file cannot be read, or as for the class.
        """
        try:
            pieces = json.loads(_read(vocabulary))
            json.dumps(pieces, ensure_ascii=False).encode()  # half a character has no UTF-8
        except (ValueError, RecursionError) as error:
            raise UserError(f"{vocabulary} is not valid JSON: {error}; restore the file") from error
        if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
            raise UserError(f"{vocabulary} is not a JSON list of strings: restore the file")
        return cls(_read(path), pieces, str(path))

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(
        self, texts: Sequence[str], *, dropout: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        split = [_split_language_code(text) for text in texts]
        pieces = self._processor.encode(
            [text for _, text in split], out_type=str, **_sampling(dropout, seed)
        )
        return [
            [self._ids.get(piece, UNK_ID) for piece in (*code, *rest)]
            for (code, _), rest in zip(split, pieces, strict=True)
        ]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        special = (PAD_ID, BOS_ID, EOS_ID)
        text = self._processor.decode(self.pieces(i for i in ids if int(i) not in special))
        # The model leaves pieces that it does not know as they are.
        return text.replace("▁", " ").strip()


def _sampling(dropout: float, seed: int) -> dict[str, Any]:
    """Options of sentencepiece's `encode`."""
    if not dropout:
        return {}
    import sentencepiece

    # The random generator belongs to the thread, and sentencepiece's own threads would divide the
    # work differently each time.
    sentencepiece.set_random_generator_seed(seed)
    return {"enable_sampling": True, "alpha": dropout, "nbest_size": -1, "num_threads": 1}


def _split_language_code(text: str) -> tuple[list[str], str]:
    """Take a language code off: ">>deu<< Hello" -> [">>deu<<"], " Hello"."""
    code, end, rest = text.partition("<<")
    return ([code + end], rest) if end and code.startswith(">>") else ([], text)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer {path}: {error.strerror}; give a sentencepiece model"
        ) from error


def _processor(model: bytes, name: str) -> Any:
    import sentencepiece  # here, because most of the library works without it

    try:
        if not model:
            raise RuntimeError("an empty one, which sentencepiece takes for none")
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(
            f"{name} is not a sentencepiece model: use the .model file of its training"
        ) from error
