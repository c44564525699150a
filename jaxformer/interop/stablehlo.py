"""Export to StableHLO: functions for JAX that need none of this package's code.

    to_stablehlo("runs/multi30k", "multi30k_hlo", source_length=64, beam_size=4)

The directory holds

- `beam_search.bin` and `greedy_search.bin`: source_ids [B, S] -> sequences [B, M, T], where M is
  `n_best` or K, and scores, log_probs and lengths, each [B, M];
- `encode.bin`, then `decode_step.bin` for each token: the same in steps, for your own search;
- `params.npz`: the parameters, each function's first argument; all others are passed by name;
- `manifest.json`: every function's inputs and outputs, and the special ids;
- the tokenizers, `tokenizer.model`, or `tokenizer.source.model` and `tokenizer.target.model`. If
  `vocabulary.json`, or `vocabulary.source.json` and `vocabulary.target.json`, lies beside it, the
  id of a piece is its index in that list.

Each function runs on CPUs, NVIDIA GPUs and TPUs, and takes any number of sentences unless
`batch_size` was given. To translate, jax, numpy, flatbuffers and sentencepiece are needed:

    import jax, numpy as np, sentencepiece
    from jax import export

    params = jax.device_put(dict(np.load("multi30k_hlo/params.npz")))
    with open("multi30k_hlo/beam_search.bin", "rb") as file:
        beam_search = jax.jit(export.deserialize(bytearray(file.read())).call)

    tokenizer = sentencepiece.SentencePieceProcessor("multi30k_hlo/tokenizer.model")
    lines = ["Two men are outside."]
    source_ids = np.zeros((len(lines), 64), np.int32)  # 0 is padding
    for row, ids in enumerate(tokenizer.encode(lines)):
        source_ids[row, : len(ids) + 1] = [*ids, 2]  # 2 is eos
    result = beam_search(params, source_ids=source_ids)
    best = np.asarray(result["sequences"])[:, 0]
    print(tokenizer.decode([[int(i) for i in ids if i > 2] for ids in best]))

Or step by step, here greedily with every beam. `beams` holds the beam that each one continues:

    cache = encode(params, source_ids=source_ids)["cache"]
    tokens = np.full((len(lines), 4), 1, np.int32)  # K = 4, as exported; 1 is bos
    beams = np.tile(np.arange(4, dtype=np.int32), (len(lines), 1))
    for _ in range(20):
        result = decode_step(params, cache=cache, tokens=tokens, beams=beams)
        cache, tokens = result["cache"], result["logits"].argmax(-1).astype(np.int32)

These logits are the model's own; the searches also rule out pad and bos.

The parameters are an argument, not constants: four functions share one copy, there is no limit to
their size, and another checkpoint of the same model needs no new export.
"""

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import export

from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.generation import generate
from jaxformer.generation_config import GenerationConfig
from jaxformer.interop.directory import check_free, new_directory
from jaxformer.run_directory import save_tokenizers
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator

PARAMS_FILE = "params.npz"
MANIFEST_FILE = "manifest.json"

_PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(
    run: str | Path,
    directory: str | Path,
    *,
    source_length: int | None = None,
    batch_size: int | None = None,
    checkpoint: str | int | None = None,
    **options: Any,
) -> None:
    """Write the model of a run directory as StableHLO functions.

    Args:
      run: the directory that training wrote.
      directory: what to write; must be new or empty.
      source_length: S, positions of a source with eos and padding, at most the model's
        `max_length`; by default 128, or that if it is less.
      batch_size: B; None leaves it open, so that the functions take arrays of any batch size.
      checkpoint: as for `Translator.load`.
      **options: fields of `GenerationConfig`, `beam_size=4` and `length_penalty=0.6` among them.

    Raises:
      UserError: flatbuffers is not installed, a value is impossible, the run is incomplete, or
        `directory` cannot be written.
    """
    try:
        importlib.import_module("flatbuffers")  # jax.export writes with it
    except ImportError as error:
        raise UserError("the export needs flatbuffers: pip install flatbuffers") from error
    search = GenerationConfig.of(options)
    if search.sampling:
        raise UserError("sampling cannot be exported: leave it out, or sample with decode_step")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: give at least 1, or None to leave it open")
    check_free(directory)
    translator = Translator.load(run, checkpoint)
    config = translator.config
    if source_length is None:
        source_length = min(128, config.max_length)
    if not 2 <= source_length <= config.max_length:
        raise UserError(
            f"source_length is {source_length}: give 2 (a token and eos) to {config.max_length} "
            "(the model's max_length)"
        )
    params: dict[str, Any] = {
        # A checkpoint may be in a half precision that .npz files do not know.
        name: np.asarray(array, np.float32)
        for name, array in _flat(translator.params).items()
    }
    programs = export_programs(config, params, search, batch_size, source_length)
    with new_directory(directory) as partial:
        np.savez(partial / PARAMS_FILE, **params)
        for name, program in programs.items():
            (partial / f"{name}.bin").write_bytes(program.serialize())
        save_tokenizers(partial, translator.source_tokenizer, translator.target_tokenizer)
        manifest = {
            "version": 1,
            "jax": jax.__version__,
            "platforms": _PLATFORMS,
            "functions": {name: _describe(program) for name, program in programs.items()},
            "params": {"file": PARAMS_FILE, "arrays": _shapes(params)},
            "special_ids": {"pad": PAD_ID, "bos": BOS_ID, "eos": EOS_ID, "unk": UNK_ID},
            "search": dataclasses.asdict(search),
            "model": config.to_dict(),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (partial / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def export_programs(
    config: TransformerConfig,
    params: Mapping[str, Any],
    search: GenerationConfig,
    batch_size: int | None,
    source_length: int,
) -> dict[str, export.Exported]:
    """Return the four functions by name, lowered for all platforms.

    They take and return arrays and dictionaries of arrays, nothing for which this package would
    have to be imported.

    Args:
      config: of the model.
      params: its parameters, flat: {"encoder/layers/…": array}.
      search: how `beam_search` searches, and, except for the beams, `greedy_search`.
      batch_size: B, or None to leave it open.
      source_length: S.
    """
    config = config.replace(flash_attention="none")  # kernels are for one platform
    model = Transformer(config)
    batch = export.symbolic_shape("batch")[0] if batch_size is None else batch_size

    def lower(function: Any, **inputs: Any) -> export.Exported:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, inputs))
        return export.export(jax.jit(function), platforms=_PLATFORMS)(like[0], **like[1])

    def searching(options: GenerationConfig) -> Any:
        def program(params, source_ids):
            members = (unflatten_dict(params, sep="/"),)
            return generate((config,), members, source_ids, options)._asdict()

        return program

    def encoded_and_cache(params, source_ids):
        variables = {"params": unflatten_dict(params, sep="/")}
        encoded = model.apply(variables, source_ids, method="encode")
        sizes = {"beam_size": search.beam_size, "max_length": max_length}
        return encoded, model.apply(variables, encoded, source_ids, method="init_cache", **sizes)

    def encode(params, source_ids):
        encoded, cache = encoded_and_cache(params, source_ids)
        return {"encoded": encoded, "cache": _flat(cache)}

    def decode_step(params, cache, tokens, beams):
        # Only its structure is used, so that none of the computation is left in the program.
        nothing = jnp.zeros((tokens.shape[0], source_length), jnp.int32)
        _, like = encoded_and_cache(params, nothing)
        cache = jax.tree.unflatten(jax.tree.structure(like), [cache[name] for name in _flat(like)])
        variables = {"params": unflatten_dict(params, sep="/")}
        cache = cache.reorder(beams)
        logits, cache = model.apply(variables, tokens, cache, method="decode_step")
        return {"logits": logits, "cache": _flat(cache)}

    source_ids = jax.ShapeDtypeStruct((batch, source_length), jnp.int32)
    beams = jax.ShapeDtypeStruct((batch, search.beam_size), jnp.int32)
    greedy = dataclasses.replace(search, beam_size=1, n_best=1)
    with _without_folders():
        programs = {
            "beam_search": lower(searching(search), source_ids=source_ids),
            "greedy_search": lower(searching(greedy), source_ids=source_ids),
        }
        max_length = _outputs(programs["beam_search"])["sequences"].shape[2]
        programs["encode"] = lower(encode, source_ids=source_ids)
        cache = _outputs(programs["encode"])["cache"]
        programs["decode_step"] = lower(decode_step, cache=cache, tokens=beams, beams=beams)
    return programs


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Let programs name the source files they come from without the folders of this machine."""
    setting = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, setting)
    jax.config.update(setting, ".*/")
    try:
        yield
    finally:
        jax.config.update(setting, before)


def _flat(tree: Any) -> dict[str, Any]:
    """Name the leaves of a tree by their paths: {"layers/0/self_key": …}, in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _outputs(program: export.Exported) -> Any:
    return jax.tree.unflatten(program.out_tree, program.out_avals)


def _describe(program: export.Exported) -> dict[str, Any]:
    _, inputs = jax.tree.unflatten(program.in_tree, program.in_avals)
    return {"inputs": _shapes(inputs), "outputs": _shapes(_outputs(program))}


def _shapes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON, {"tokens": {"shape": ["batch", 4], "dtype": "int32"}}; open sizes are strings."""
    return {
        name: _shapes(array)
        if isinstance(array, Mapping)
        else {
            "shape": [size if isinstance(size, int) else str(size) for size in array.shape],
            "dtype": str(array.dtype),
        }
        for name, array in arrays.items()
    }
