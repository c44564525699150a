"""Programs exported to StableHLO compute what jaxformer computes, without needing it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.checkpoints import save_params
from jaxformer.config import BOS_ID, EOS_ID, PAD_ID
from jaxformer.errors import UserError
from jaxformer.generation import generate
from jaxformer.generation_config import GenerationConfig
from jaxformer.interop import stablehlo
from jaxformer.interop.stablehlo import export_programs, to_stablehlo
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from random_run import CONFIG, SENTENCES, random_params, write_random_run

SOURCE_LENGTH, BEAMS = 24, 3
SEARCH = GenerationConfig(beam_size=BEAMS, n_best=2, length_penalty=0.9, max_length_extra=7)

# The program of a user with only jax, numpy and sentencepiece; prints one translation per line.
PROGRAM = """
import json, sys
sys.modules["jaxformer"] = sys.modules["flax"] = None  # importing them fails
import jax, numpy as np, sentencepiece
from jax import export

folder, function, *lines = sys.argv[1:]
manifest = json.load(open(f"{folder}/manifest.json"))
shape = manifest["functions"][function]["inputs"]["source_ids"]["shape"]
params = dict(np.load(f"{folder}/params.npz"))
with open(f"{folder}/{function}.bin", "rb") as file:
    search = jax.jit(export.deserialize(bytearray(file.read())).call)
tokenizer = sentencepiece.SentencePieceProcessor(f"{folder}/tokenizer.model")
source_ids = np.zeros((len(lines), shape[1]), np.int32)
for row, ids in enumerate(tokenizer.encode(lines)):
    source_ids[row, : len(ids) + 1] = [*ids, manifest["special_ids"]["eos"]]
best = np.asarray(search(params, source_ids=source_ids)["sequences"])[:, 0]
for ids in best:
    print(tokenizer.decode([int(i) for i in ids if i > 2]))
"""


def flat(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def source_ids(number):
    """Sentences with eos; the last row is nothing but padding."""
    draw = np.random.default_rng(0)
    ids = np.full((number, SOURCE_LENGTH), PAD_ID, np.int32)
    for row in range(number - 1):
        length = draw.integers(2, SOURCE_LENGTH)
        ids[row, :length] = [*draw.integers(4, CONFIG.vocab_size, length - 1), EOS_ID]
    return jnp.array(ids)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def programs(params):
    """The functions with the batch size left open, to be run with `call`."""
    return export_programs(CONFIG, flat(params), SEARCH, None, SOURCE_LENGTH)


def test_programs_name_no_folder_of_this_machine(programs):
    import jaxformer

    for program in programs.values():
        module = program.mlir_module_serialized
        assert str(Path(jaxformer.__file__).parent).encode() not in module
        assert b"transformer.py" in module


@pytest.mark.parametrize("name", ["beam_search", "greedy_search"])
def test_searches_find_what_ours_find(programs, params, name):
    search = jax.jit(programs[name].call)
    options = SEARCH
    if name == "greedy_search":
        options = dataclasses.replace(SEARCH, beam_size=1, n_best=1)
    for number in (5, 2):
        ids = source_ids(number)
        found = search(flat(params), source_ids=ids)
        expected = generate((CONFIG,), (params,), ids, options)
        assert found.keys() == set(expected._fields)
        for exact in ("sequences", "lengths"):
            np.testing.assert_array_equal(found[exact], getattr(expected, exact))
        for close in ("scores", "log_probs"):
            np.testing.assert_allclose(found[close], getattr(expected, close), rtol=1e-5)


def test_steps_score_what_the_model_scores(programs, params):
    """Three steps of three beams; after two of them, all continue from the last beam."""
    ids = source_ids(4)[:-1]
    result = programs["encode"].call(flat(params), source_ids=ids)
    model, variables = Transformer(CONFIG), {"params": params}
    expected = model.apply(variables, ids, method="encode")
    np.testing.assert_allclose(result["encoded"], expected, atol=1e-4)
    decode_step = jax.jit(programs["decode_step"].call)
    steps = [([BOS_ID] * 3, [0, 1, 2]), ([5, 6, 7], [0, 1, 2]), ([8, 9, 8], [2, 2, 2])]
    for tokens, beams in steps:
        tokens, beams = (np.tile(np.array(row, np.int32), (3, 1)) for row in (tokens, beams))
        result = decode_step(flat(params), cache=result["cache"], tokens=tokens, beams=beams)
    for beam, last in enumerate([8, 9, 8]):
        target_ids = jnp.tile(jnp.array([BOS_ID, 7, last], jnp.int32), (3, 1))
        expected = model.apply(variables, ids, target_ids)[:, -1]
        np.testing.assert_allclose(result["logits"][:, beam], expected, atol=1e-4)


def test_programs_are_for_all_platforms_and_any_batch(programs):
    for program in programs.values():
        assert program.platforms == ("cpu", "cuda", "tpu")
    (sequences,) = (aval for aval in programs["beam_search"].out_avals if aval.ndim == 3)
    assert [str(size) for size in sequences.shape] == ["batch", "2", str(SOURCE_LENGTH + 7)]


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_random_run(run, CONFIG)
    return run


def translate_elsewhere(folder, function):
    """Translate SENTENCES in a process that has no jaxformer."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), function, *SENTENCES],
        capture_output=True,
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_parameters_of_half_precision_are_written_in_full(tmp_path, monkeypatch):
    """NumPy's file format has no bfloat16."""
    fake_serialization(monkeypatch)
    monkeypatch.setattr(stablehlo, "export_programs", lambda *_: {})
    params = write_random_run(tmp_path / "run", CONFIG)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    save_params(tmp_path / "run", 2, half)
    to_stablehlo(tmp_path / "run", tmp_path / "hlo", checkpoint=2)  # S is at most the model's
    written = np.load(tmp_path / "hlo/params.npz")
    np.testing.assert_array_equal(
        written["embedding/embedding"], half["embedding"]["embedding"].astype(np.float32)
    )


@pytest.mark.parametrize("batch_size", [None, len(SENTENCES)])
def test_a_process_without_jaxformer_translates_alike(run, tmp_path, batch_size):
    pytest.importorskip("flatbuffers")
    sizes = {"source_length": 32, "batch_size": batch_size}  # all of the sentences fit
    to_stablehlo(run, tmp_path / "hlo", **sizes, beam_size=BEAMS, max_length_extra=7)
    translator = Translator.load(run)
    for function, beam_size in (("beam_search", BEAMS), ("greedy_search", 1)):
        expected = translator.translate(SENTENCES, beam_size=beam_size, max_length_extra=7)
        assert translate_elsewhere(tmp_path / "hlo", function) == expected


def fake_serialization(monkeypatch):
    """Replace flatbuffers, which may not be installed: the files hold nothing useful."""
    monkeypatch.setitem(sys.modules, "flatbuffers", ModuleType("flatbuffers"))
    monkeypatch.setattr(
        jax.export.Exported, "serialize", lambda self: bytearray(self.mlir_module_serialized)
    )


def test_the_directory_says_what_it_holds(run, tmp_path, monkeypatch):
    fake_serialization(monkeypatch)
    folder = tmp_path / "hlo"
    to_stablehlo(run, folder, source_length=SOURCE_LENGTH, beam_size=BEAMS)
    manifest = json.loads((folder / "manifest.json").read_text())
    functions = manifest["functions"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", "params.npz", "tokenizer.model", *(f"{name}.bin" for name in functions)]
    )
    ids = {"source_ids": {"shape": ["batch", SOURCE_LENGTH], "dtype": "int32"}}
    assert functions["beam_search"] == {
        "inputs": ids,
        "outputs": {
            "lengths": {"shape": ["batch", BEAMS], "dtype": "int32"},
            "log_probs": {"shape": ["batch", BEAMS], "dtype": "float32"},
            "scores": {"shape": ["batch", BEAMS], "dtype": "float32"},
            "sequences": {"shape": ["batch", BEAMS, SOURCE_LENGTH + 50], "dtype": "int32"},
        },
    }
    assert functions["encode"]["inputs"] == ids
    assert functions["decode_step"]["inputs"].keys() == {"cache", "tokens", "beams"}
    cache = functions["decode_step"]["inputs"]["cache"]
    assert cache == functions["encode"]["outputs"]["cache"]
    assert cache == functions["decode_step"]["outputs"]["cache"]
    assert manifest["special_ids"] == {"pad": 0, "bos": 1, "eos": 2, "unk": 3}
    with np.load(folder / "params.npz") as params:
        assert {name: list(array.shape) for name, array in params.items()} == {
            name: array["shape"] for name, array in manifest["params"]["arrays"].items()
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_length": 33}, r"source_length is 33: give 2 \(a token and eos\) to 32"),
        ({"source_length": 1}, "source_length is 1: give 2"),
        ({"batch_size": 0}, "batch_size is 0: give at least 1"),
        ({"beam_size": 0}, "beam_size is 0: give at least 1"),
        ({"sampling": True}, "sampling cannot be exported"),
    ],
)
def test_impossible_options(run, tmp_path, monkeypatch, options, message):
    fake_serialization(monkeypatch)
    with pytest.raises(UserError, match=message):
        to_stablehlo(run, tmp_path / "hlo", **options)
    assert list(tmp_path.iterdir()) == []


def test_without_flatbuffers_the_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match="pip install flatbuffers"):
        to_stablehlo(run, tmp_path / "hlo")


def test_what_is_there_stays(run, tmp_path, monkeypatch):
    fake_serialization(monkeypatch)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        to_stablehlo(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_broken_run_leaves_nothing_behind(run, tmp_path, monkeypatch):
    fake_serialization(monkeypatch)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match="has no checkpoint"):
        to_stablehlo(tmp_path / "run", tmp_path / "hlo")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_checkpoint_that_is_asked_for_is_exported(tmp_path, monkeypatch):
    fake_serialization(monkeypatch)
    monkeypatch.setattr(stablehlo, "export_programs", lambda *_: {})
    params = write_random_run(tmp_path / "run", CONFIG)
    save_params(tmp_path / "run", 2, jax.tree.map(np.zeros_like, params))
    to_stablehlo(tmp_path / "run", tmp_path / "hlo", source_length=8, checkpoint=1)
    written = np.load(tmp_path / "hlo/params.npz")
    np.testing.assert_array_equal(written["embedding/embedding"], params["embedding"]["embedding"])
