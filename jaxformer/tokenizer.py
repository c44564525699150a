"""Text to token ids and back, by a sentencepiece model."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from jaxformer.errors import UserError


class Tokenizer:
    """A sentencepiece model whose pad, bos, eos and unk have the ids 0, 1, 2 and 3.

    Attributes:
      model: the serialized model, the bytes of a `tokenizer.model` file.
      vocab_size: number of pieces, the four above among them.

    Raises:
      UserError: `model` is no sentencepiece model, or numbers its special pieces otherwise.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        import sentencepiece  # here, because most of the library works without it

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{name} is not a sentencepiece model: use the .model file of its training"
            ) from error
        self.model = model
        self.vocab_size: int = self._processor.vocab_size()
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
          UserError: the file cannot be read, or see the class.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the tokenizer {path}: {error.strerror}; give a sentencepiece model"
            ) from error
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without bos and eos; white space around it does not count."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text, computed on all cores."""
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of `ids`, pad, bos and eos left out; unk becomes " ⁇ "."""
        special = (PAD_ID, BOS_ID, EOS_ID)
        return self._processor.decode([int(i) for i in ids if int(i) not in special])

    def pieces(self, ids: Iterable[int] | np.ndarray) -> list[str]:
        """Return the vocabulary's piece of each id; "▁" in it stands for a space."""
        return [self._processor.id_to_piece(int(i)) for i in ids]
