"""Learning the vocabulary: sentencepiece on the training split, and on nothing else."""

import hashlib
import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from jaxformer.errors import UserError
from jaxformer.files import write_bytes, writing
from jaxformer.run_directory import SOURCE_TOKENIZER_FILE, TARGET_TOKENIZER_FILE, TOKENIZER_FILE
from jaxformer.terminal import say
from jaxformer.tokenizer import Tokenizer
from train.data.arrow import ADVICE, CACHE_VERSION, reading_cache
from train.data.corpus import text_digest
from train.data.normalization import is_blank, normalization_rules
from train.data.sources import iterate
from train.progress import Count

if TYPE_CHECKING:
    import datasets

# More sentences hardly change the pieces, but training on them takes memory and hours.
_MAX_SENTENCES = 2_000_000
# From this many sentences on, learning takes so long that it is announced.
_MANY_SENTENCES = 200_000

# If the text contains these, sentencepiece does not count their letters.
_OWN_PIECE = re.compile("<(?=(?:unk|pad|s|/s)>)")
# It leaves out every sentence with this letter.
_OWN_LETTER = "\u2585"


def learn_tokenizers(
    corpora: "Sequence[datasets.Dataset]",
    run: str | Path,
    *,
    vocab_size: int,
    joint: bool,
    model_type: Literal["bpe", "unigram"] = "bpe",
    cache: Path | None = None,
) -> tuple[Tokenizer, Tokenizer]:
    """Learn, write into the directory `run`, and return the source and the target tokenizer.

    Args:
      corpora: the training pairs, with the columns "source" and "target". If they have
        more than two million sentences, only so many are used, evenly spread.
      run: the run directory; made if it is not there.
      vocab_size: pieces of each vocabulary, the four special ones included.
      joint: one vocabulary of both languages, returned twice (§5.1), instead of one of each.
      model_type: byte-pair encoding, or sentencepiece's unigram language model.
      cache: a folder that keeps what was learned, for when the same is asked for again.

    Raises:
      UserError: `vocab_size` is more or less than this corpus allows; the message says how many.
    """
    files = (
        {TOKENIZER_FILE: ("source", "target")}
        if joint
        else {SOURCE_TOKENIZER_FILE: ("source",), TARGET_TOKENIZER_FILE: ("target",)}
    )
    settings = vocab_size, model_type
    tokenizers = [
        _learn(corpora, columns, *settings)
        if cache is None
        else _learn_once(cache, corpora, columns, *settings)
        for columns in files.values()
    ]
    for file, tokenizer in zip(files, tokenizers, strict=True):
        path = Path(run) / file
        write_bytes(path, tokenizer.model, advice="make room, or choose another --run")
    return tokenizers[0], tokenizers[-1]


def _learn_once(
    cache: Path, corpora: "Sequence[datasets.Dataset]", columns: tuple[str, ...], *settings: Any
) -> Tokenizer:
    """Do as `_learn`, unless `cache` has what was learned from the same text before."""
    name = hashlib.sha256(repr((CACHE_VERSION, columns, settings)).encode())
    name.update(normalization_rules().encode())
    for dataset in corpora:
        name.update(text_digest(dataset, cache))
    path = cache / f"tokenizer-{name.hexdigest()[:20]}.model"
    if path.exists():
        with reading_cache(path):
            return Tokenizer.load(path)
    tokenizer = _learn(corpora, columns, *settings)
    write_bytes(path, tokenizer.model, advice=ADVICE)
    return tokenizer


def _learn(
    corpora: "Sequence[datasets.Dataset]",
    columns: tuple[str, ...],
    vocab_size: int,
    model_type: str,
) -> Tokenizer:
    import sentencepiece

    model, side = io.BytesIO(), " and ".join(columns)
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
        with writing(rules.name, "make room, or set TMPDIR"):
            rules.write(normalization_rules())
            rules.flush()
        sentences = _sentences(corpora, columns)
        first = next(sentences, None)
        if first is None:  # sentencepiece would end the process
            raise UserError(f"the {side} text is blank: nothing to learn a vocabulary from")
        remembering = _Remembering(chain([first], sentences))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=remembering,
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=1.0,  # every character of the corpus becomes a piece
                normalization_rule_tsv=rules.name,
                pad_id=PAD_ID,
                bos_id=BOS_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                byte_fallback=False,
                max_sentence_length=1 << 20,  # bytes; longer ones are left out silently
                minloglevel=2,  # errors only, and those are raised
            )
        except RuntimeError as error:
            if remembering.error is not None:
                raise remembering.error from None
            raise UserError(_explain(str(error), vocab_size, side)) from error
    return Tokenizer(_without_file_name(model.getvalue()))


class _Remembering:
    """An iterator that keeps its error, such as Ctrl-C: sentencepiece passes on only its text."""

    def __init__(self, items: Iterator[str]) -> None:
        self._items = items
        self.error: BaseException | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        try:
            return next(self._items)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise


def _without_file_name(model: bytes) -> bytes:
    """Remove the path of the rules from a model: the same text then gives the same bytes."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto.FromString(model)
    proto.normalizer_spec.name = "nfc"
    proto.normalizer_spec.normalization_rule_tsv = ""
    return proto.SerializeToString(deterministic=True)


def _sentences(corpora: "Sequence[datasets.Dataset]", columns: tuple[str, ...]) -> Iterator[str]:
    """Yield the sentences of `columns`, or those of every n-th pair if there are very many."""
    pairs = sum(map(len, corpora))
    every = -(-pairs * len(columns) // _MAX_SENTENCES)
    count = Count("reading for the vocabulary", pairs)
    for dataset in corpora:
        first = 0  # the first row to take from the next batch
        for batch in iterate(dataset, 10_000):
            for column in columns:
                for text in batch[column][first::every]:
                    text = _OWN_PIECE.sub("< ", text).replace(_OWN_LETTER, " ")
                    if not is_blank(text):
                        yield text
            rows = len(batch[columns[0]])
            first = (first - rows) % every
            count.add(rows)
    if (number := pairs * len(columns) // every) >= _MANY_SENTENCES:
        say(f"learning the vocabulary on {number:,} sentences")


def _explain(error: str, vocab_size: int, side: str) -> str:
    if match := re.search(r"too high .* value <= (\d+)", error):
        limit = f"more than the {side} text can fill; the largest possible is {match[1]}"
    elif match := re.search(r"smaller than required_chars. \d+ vs (\d+)", error):
        limit = f"too few for its characters alone; the {side} text needs at least {match[1]}"
    else:
        return f"sentencepiece cannot learn {vocab_size} pieces from the {side} text: {error}"
    return f"model.vocab_size={vocab_size} is {limit}"
