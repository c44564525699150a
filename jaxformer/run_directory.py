"""The run directory: all that a trained model needs, also on another machine.

```
run/
  config.json               {"version": 1, "model": {...}, ...}, as resolved when training began
  tokenizer.model           or tokenizer.source.model and tokenizer.target.model
  vocabulary.json           or vocabulary.source.json and vocabulary.target.json: the piece of each
                            id, only if the tokenizer's own numbering is not the model's
  lengths.json              digests by which the trainer recognises its text
  metrics.jsonl             one JSON object per record; TensorBoard events lie beside it
  checkpoints/
    2000/                   params/, optimizer/, info/ with the fingerprints of both and, if it was
                            evaluated, metrics/
    average/                params/ and info/, which names the steps that were averaged
```

The trainer or an import writes it and `Translator.load` reads it; `jaxformer.checkpoints` handles
what is in checkpoints/.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformer.config import TransformerConfig
from jaxformer.errors import UserError
from jaxformer.files import write_text
from jaxformer.tokenizer import Tokenizer, VocabularyTokenizer

CONFIG_VERSION = 1

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
SOURCE_TOKENIZER_FILE = "tokenizer.source.model"
TARGET_TOKENIZER_FILE = "tokenizer.target.model"
_VOCABULARY_FILES = {
    TOKENIZER_FILE: "vocabulary.json",
    SOURCE_TOKENIZER_FILE: "vocabulary.source.json",
    TARGET_TOKENIZER_FILE: "vocabulary.target.json",
}
METRICS_FILE = "metrics.jsonl"


def check_name(run: str | Path) -> None:
    """Raise `UserError` if checkpoints in this directory could not be read again.

    orbax and tensorstore need UTF-8, take some signs for patterns and a URL for a local folder.
    """
    path = str(Path(run).absolute())
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} is not UTF-8: rename it, or use a UTF-8 locale") from error
    if re.match(r"\w+:/", str(run)):
        raise UserError(f"{run} is a URL: give a directory, for example where a bucket is mounted")
    if sign := next((sign for sign in "[]\\" if sign in path), None):
        raise UserError(
            f"{path} contains {sign!r}, so checkpoints in it could not be read: rename it"
        )


def write_config(run: str | Path, config: Mapping[str, Any]) -> None:
    """Write `config`, JSON-ready and with the model's fields under "model", as config.json.

    Raises:
      UserError: the directory cannot be written to.
    """
    path = Path(run) / CONFIG_FILE
    text = json.dumps({"version": CONFIG_VERSION, **config}, indent=2, ensure_ascii=False)
    write_text(path, text + "\n", advice="choose another run directory")


def read_config(run: str | Path) -> dict[str, Any]:
    """Return config.json as a dictionary.

    Raises:
      UserError: `run` is not a run directory, or config.json is unreadable or of another version.
    """
    run, path = Path(run), Path(run) / CONFIG_FILE
    if not run.is_dir():
        raise UserError(f"{run} is not a directory: give the directory of a training run")
    if not path.is_file():
        raise UserError(f"{run} is not a run directory: it has no {CONFIG_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno} is not valid JSON: {error.msg}; restore the file"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; restore the file") from error
    version = config.get("version") if isinstance(config, dict) else None
    if version is None and isinstance(config, dict) and "model_type" in config:
        raise UserError(
            f"{path} is that of a Hugging Face model: make a run of it with jaxformer convert"
        )
    if version != CONFIG_VERSION:
        raise UserError(
            f"{path} has version {version!r}, this jaxformer reads version {CONFIG_VERSION}: "
            "use the jaxformer that trained the model"
        )
    return config


def read_model_config(run: str | Path) -> TransformerConfig:
    """Return the configuration of the run's model; raises `UserError` like `read_config`."""
    path, fields = Path(run) / CONFIG_FILE, read_config(run).get("model")
    if not isinstance(fields, dict):
        raise UserError(f'{path} has no "model" section: use the config.json of a training run')
    try:
        return TransformerConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def load_tokenizers(
    run: str | Path, config: TransformerConfig | None = None
) -> tuple[Tokenizer, Tokenizer]:
    """Return the source and the target tokenizer: one object twice if the vocabulary is joint.

    Args:
      run: the run directory.
      config: of the model whose vocabulary sizes they must have, if that is known.

    Raises:
      UserError: the directory holds neither a joint tokenizer nor a pair, or they do not fit the
        model.
    """
    source, target = _load_tokenizers(Path(run))
    if config is None:
        return source, target
    for name, expected, tokenizer in (
        ("source", config.encoder_vocab_size, source),
        ("target", config.vocab_size, target),
    ):
        if tokenizer.vocab_size != expected:
            raise UserError(
                f"{run}: the {name} tokenizer has {tokenizer.vocab_size} pieces and the model "
                f"{expected}: copy the tokenizer that the model was trained with"
            )
    return source, target


def _load_tokenizers(run: Path) -> tuple[Tokenizer, Tokenizer]:
    if (run / TOKENIZER_FILE).is_file():
        joint = _load_tokenizer(run, TOKENIZER_FILE)
        return joint, joint
    pair = run / SOURCE_TOKENIZER_FILE, run / TARGET_TOKENIZER_FILE
    for path in pair:
        if not path.is_file():
            raise UserError(
                f"{run} has no tokenizer: neither {TOKENIZER_FILE} nor {path.name} is there; "
                "copy it from where the model was trained"
            )
    return _load_tokenizer(run, pair[0].name), _load_tokenizer(run, pair[1].name)


def _load_tokenizer(run: Path, file: str) -> Tokenizer:
    vocabulary = run / _VOCABULARY_FILES[file]
    if vocabulary.is_file():
        return VocabularyTokenizer.load_pair(run / file, vocabulary)
    return Tokenizer.load(run / file)


def save_tokenizers(run: Path, source: Tokenizer, target: Tokenizer) -> None:
    """Write tokenizers for `load_tokenizers` to read; give one object twice if it is joint."""
    files = (
        {TOKENIZER_FILE: source}
        if source is target
        else {SOURCE_TOKENIZER_FILE: source, TARGET_TOKENIZER_FILE: target}
    )
    for file, tokenizer in files.items():
        (run / file).write_bytes(tokenizer.model)
        if isinstance(tokenizer, VocabularyTokenizer):
            text = json.dumps(tokenizer.vocabulary, ensure_ascii=False, indent=0)
            (run / _VOCABULARY_FILES[file]).write_text(text + "\n", encoding="utf-8")
