"""Import and export of Marian models of Hugging Face Transformers, such as those of OPUS-MT.

    from_marian("opus-mt-en-de", "runs/opus-mt-en-de")
    to_marian("runs/multi30k", "multi30k-marian")

The first makes a run directory from what `MarianMTModel.save_pretrained` wrote, the second writes
what `MarianMTModel.from_pretrained` and `MarianTokenizer.from_pretrained` load. Transformers itself
is not needed. A round trip gives the same bits, except that float64 is rounded to float32. In both
directions the logits are the same up to rounding, and so are tokens and text, except for this:

- `MarianTokenizer` takes "</s>", "<unk>" and "<pad>" in a text for the special pieces, and always a
  ">>…<<" at its beginning for a language code, which `Tokenizer` does only in imported runs. Its
  `decode` can leave unknown pieces out; `Tokenizer.decode` shows them as " ⁇ ". Here tokens that
  were added to a `MarianTokenizer` are split like any text. With `clean_up_tokenization_spaces`
  its `decode` removes the space before a full stop or comma.
- Their `generate` divides a hypothesis's log-probability by length ** length_penalty, the "power"
  form of `Translator`. It lets a hypothesis end only if that is among the K best candidates of a
  step, ours among 2K. It stops at a fixed length, ours at the source's length + 50.

Ids: ours begin with pad, bos, eos and unk; theirs may be anywhere. Marian has no bos: its decoder
starts from pad. So bos becomes a copy of pad, and their V pieces become V + 1 here.

Marian's positions and LayerNorm differ from those of our default configuration. The weights that
`to_marian` writes compensate for that, see `fit_residual_stream`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.checkpoints import save_params
from jaxformer.config import BOS_ID, PAD_ID
from jaxformer.errors import UserError, one_line
from jaxformer.interop.directory import check_free, new_directory
from jaxformer.interop.marian_config import (
    check_expressible,
    complete_settings,
    import_config,
    own_section,
)
from jaxformer.interop.marian_weights import (
    export_params,
    fit_residual_stream,
    import_params,
    read_tensors,
)
from jaxformer.loading import load_params_of
from jaxformer.run_directory import (
    CONFIG_FILE,
    check_name,
    load_tokenizers,
    read_config,
    read_model_config,
    save_tokenizers,
    write_config,
)
from jaxformer.tokenizer import Tokenizer, VocabularyTokenizer


def from_marian(directory: str | Path, run: str | Path) -> None:
    """Make a run directory from a Marian model, for `Translator.load` to read.

    Args:
      directory: holds config.json, model.safetensors or pytorch_model.bin, source.spm, target.spm,
        vocab.json and, for two vocabularies, target_vocab.json.
      run: what to write; must be new or empty.

    Raises:
      UserError: a file is missing, damaged, or does not fit the others; the model is one that
        `TransformerConfig` cannot express; or `run` cannot be written.
    """
    check_free(run)
    check_name(run)
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give the one of a Marian model")
    theirs = _read_json(directory / "config.json")
    settings = complete_settings(theirs, directory / "config.json")
    tokenizer_config = _read_json_if_there(directory / "tokenizer_config.json")
    separate = (tokenizer_config or {}).get("separate_vocabs")
    if separate is None and not settings["share_encoder_decoder_embeddings"]:
        separate = (directory / "target_vocab.json").is_file()
    target_file = "vocab.json"
    if separate:
        target_file = "target_vocab.json"
        tokenizer_config = {**(tokenizer_config or {}), "separate_vocabs": True}
    vocabularies = {
        "source": _read_vocabulary(directory / "vocab.json", settings["vocab_size"]),
        "target": _read_vocabulary(directory / target_file, settings["decoder_vocab_size"]),
    }
    special_ids = _special_ids(vocabularies, settings, directory / "config.json")
    orders = {side: _order(special_ids[side], len(vocabularies[side])) for side in vocabularies}
    config = import_config(settings, orders, directory / "config.json")
    source, target = (
        VocabularyTokenizer(
            _read_bytes(directory / f"{side}.spm"),
            _import_pieces(vocabularies[side], orders[side]),
            str(directory / f"{side}.spm"),
        )
        for side in ("source", "target")
    )
    joint = (source.model, source.vocabulary) == (target.model, target.vocabulary)
    path, tensors = read_tensors(directory)
    config, params = import_params(tensors, path, config, orders)
    section = {
        "config": theirs,
        "generation_config": _read_json_if_there(directory / "generation_config.json"),
        "tokenizer_config": tokenizer_config,
        "special_ids": special_ids,
        "dtype": np.result_type(*tensors.values()).name,
    }
    with new_directory(run) as partial:
        write_config(partial, {"model": config.to_dict(), "marian": section})
        save_tokenizers(partial, source, source if joint else target)
        save_params(partial, 0, params)


def to_marian(run: str | Path, directory: str | Path, checkpoint: str | int | None = None) -> None:
    """Write a run's model and tokenizers for `MarianMTModel` and `MarianTokenizer` to load.

    For a run that `from_marian` made, the original ids and settings are restored.

    Args:
      run: the run directory.
      directory: what to write; must be new or empty.
      checkpoint: as for `Translator.load`.

    Raises:
      UserError: Marian cannot express the model (the message names the field of its
        configuration); the run is incomplete; or `directory` cannot be written.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError("the export needs safetensors: pip install safetensors") from error
    check_free(directory)
    config = read_model_config(run)
    check_expressible(config, Path(run) / CONFIG_FILE)
    source, target = load_tokenizers(run, config)
    section = read_config(run).get("marian") or own_section(config, source, target)
    if not isinstance(section, dict):
        raise UserError(f'"marian" of {Path(run) / CONFIG_FILE} is no object: convert it again')
    special_ids, tokenizer_config = section["special_ids"], section["tokenizer_config"] or {}
    orders = {}
    for side, size in (
        ("source", config.encoder_vocab_size),
        ("target", config.vocab_size),
    ):
        # Our pad and bos may both be their pad.
        orders[side] = _order(special_ids[side], size - 4 + len(set(special_ids[side])))
    tensors = export_params(load_params_of(config, run, checkpoint), config, orders)
    tensors = fit_residual_stream(tensors, config)
    source_vocabulary = _export_vocabulary(source, orders["source"], run)
    target_vocabulary = _export_vocabulary(target, orders["target"], run)

    with new_directory(directory) as partial:
        for name in ("config", "generation_config", "tokenizer_config"):
            if section[name] is not None:
                _write_json(partial / f"{name}.json", section[name])
        (partial / "source.spm").write_bytes(source.model)
        (partial / "target.spm").write_bytes(target.model)
        _write_json(partial / "vocab.json", source_vocabulary)
        if tokenizer_config.get("separate_vocabs"):
            _write_json(partial / "target_vocab.json", target_vocabulary)
        # Safetensors writes an array's memory as it is laid out.
        tensors = {name: np.ascontiguousarray(x, section["dtype"]) for name, x in tensors.items()}
        try:
            # Transformers refuses the file without the format.
            weights = partial / "model.safetensors"
            save_file(tensors, weights, metadata={"format": "pt"})
            # Safetensors lets nobody else read it; what applies is the umask, as for other files.
            weights.chmod((partial / "vocab.json").stat().st_mode)
        except SafetensorError as error:
            raise UserError(
                f"cannot write {directory}: {one_line(error)}; choose another directory"
            ) from error


def _order(special: Sequence[int], size: int) -> np.ndarray:
    """Their id for each of ours: pad, bos, eos and unk, then the rest of their `size` in turn.

    >>> _order([4, 4, 0, 1], 5).tolist()
    [4, 4, 0, 1, 2, 3]
    """
    return np.array([*special, *(i for i in range(size) if i not in special)])


def _special_ids(
    vocabularies: Mapping[str, Mapping[str, int]], settings: Mapping[str, Any], path: Path
) -> dict[str, list[int]]:
    """Their ids of pad, the piece that the decoder starts from, eos and unk, on each side."""
    target = vocabularies["target"]
    for field, piece in (("pad_token_id", "<pad>"), ("eos_token_id", "</s>")):
        if settings[field] != target[piece]:
            raise UserError(
                f"{path} has {field}={settings[field]}, but the vocabulary has {piece} at "
                f"{target[piece]}: use the files of one model"
            )
    start_id = settings["decoder_start_token_id"]
    start = {id: piece for piece, id in target.items()}.get(start_id, "not a piece")
    if start in ("not a piece", "</s>", "<unk>"):
        raise UserError(
            f"{path} has decoder_start_token_id={start_id}, {start}: only models that start from "
            "<pad> or from a piece of their own can be imported"
        )
    return {
        side: [ids["<pad>"], ids.get(start, ids["<pad>"]), ids["</s>"], ids["<unk>"]]
        for side, ids in vocabularies.items()
    }


def _import_pieces(vocabulary: Mapping[str, int], order: np.ndarray) -> list[str]:
    theirs = sorted(vocabulary, key=vocabulary.__getitem__)
    ours = [theirs[i] for i in order]
    if order[BOS_ID] == order[PAD_ID]:
        ours[BOS_ID] = "<s>"
    return ours


def _export_vocabulary(tokenizer: Tokenizer, order: np.ndarray, run: str | Path) -> dict[str, int]:
    pieces = list(tokenizer.vocabulary)
    if not isinstance(tokenizer, VocabularyTokenizer):
        pieces[:4] = "<pad>", "<s>", "</s>", "<unk>"  # the names that MarianTokenizer knows
    if len(pieces) != len(order):
        raise UserError(
            f"{run}: a tokenizer has {len(pieces)} pieces and the model {len(order)}: "
            "copy the tokenizer that the model was trained with"
        )
    numbered = list(zip(pieces, order.tolist(), strict=True))
    if order[BOS_ID] == order[PAD_ID]:
        del numbered[BOS_ID]
    vocabulary = dict(sorted(numbered, key=lambda piece_and_id: piece_and_id[1]))
    if len(vocabulary) < len(numbered):
        raise UserError(
            f"{run}: a tokenizer has a piece twice, as Marian's cannot: choose another format"
        )
    return vocabulary


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; download the model again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    data = _read_bytes(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; download the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: download the model again")
    return content


def _read_json_if_there(path: Path) -> dict[str, Any] | None:
    return _read_json(path) if path.is_file() else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_vocabulary(path: Path, size: int) -> dict[str, int]:
    """Read a vocabulary, piece -> id; check that it has `size` pieces and the special ones."""
    vocabulary = _read_json(path)
    try:
        "".join(vocabulary).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} has a piece that is not text: download the model again") from error
    for piece in ("<pad>", "</s>", "<unk>"):
        if piece not in vocabulary:
            raise UserError(f"{path} has no piece {piece}: download the model again")
    if len(vocabulary) != size:
        if path.with_name("added_tokens.json").is_file():
            raise UserError(
                f"{path.with_name('added_tokens.json')}: a tokenizer with tokens that were added "
                "later cannot be imported"
            )
        raise UserError(
            f"{path} has {len(vocabulary)} pieces and config.json expects {size}: "
            "use the files of one model"
        )
    ids = vocabulary.values()
    if not all(type(id) is int for id in ids) or set(ids) != set(range(size)):
        raise UserError(
            f"{path} does not number its pieces from 0 to {size - 1}: download the model again"
        )
    return vocabulary
