"""CTranslate2 computes what jaxformer computes."""

import errno
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from jaxformer.checkpoints import save_params
from jaxformer.config import BOS_ID, EOS_ID, PAD_ID
from jaxformer.errors import UserError
from jaxformer.generation_config import GenerationConfig
from jaxformer.interop.ctranslate2 import _set_embedding, to_ctranslate2
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from random_run import CONFIG, SENTENCES, write_random_run
from small_run import trained_run

pytestmark = pytest.mark.usefixtures("one_program_a_search")

ctranslate2 = pytest.importorskip("ctranslate2")

TARGETS = ["Hunde laufen hier", "rot", "zwei alt Katzen sitzen jetzt", "", "blau"]

CONFIGS = {
    "paper": CONFIG,
    "pre_gelu_biases": CONFIG.replace(
        norm="pre", activation="gelu", attention_bias=True, output_bias=True
    ),
    "swish_head_dim": CONFIG.replace(activation="swish", head_dim=5),
    "swiglu_separate": CONFIG.replace(
        activation="swiglu", embeddings="separate", source_vocab_size=47
    ),
    "geglu_target_learned": CONFIG.replace(
        activation="geglu", embeddings="target", source_vocab_size=47, positions="learned"
    ),
    "reglu_pre_concat": CONFIG.replace(
        activation="reglu", norm="pre", positions="sinusoidal_concat"
    ),
    "glu_epsilon": CONFIG.replace(activation="glu", layer_norm_epsilon=0.1),
}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Export a random model once; return its run and the export's directory."""
    done = {}

    def export(name, **options):
        key = (name, *options.items())
        if key not in done:
            folder = tmp_path_factory.mktemp(name)
            write_random_run(folder / "run", CONFIGS[name])
            to_ctranslate2(folder / "run", folder / "ct2", **options)
            done[key] = folder / "run", folder / "ct2"
        return done[key]

    return export


def processors(directory):
    """Load the tokenizers as a user would."""
    names = ["tokenizer.source.model", "tokenizer.target.model"]
    if (directory / "tokenizer.model").exists():
        names = ["tokenizer.model"] * 2
    return [sentencepiece.SentencePieceProcessor(str(directory / name)) for name in names]


def scores(directory):
    """Log-probabilities of TARGETS given SENTENCES, by CTranslate2.

    Computed in float32: CTranslate2's sums of 8-bit products are not the same on all CPUs, and
    saturate on those without instructions for them.
    """
    source, target = processors(directory)
    results = ctranslate2.Translator(str(directory), compute_type="float32").score_batch(
        source.encode(SENTENCES[: len(TARGETS)], out_type=str),
        target.encode(TARGETS, out_type=str),
    )
    return np.concatenate([result.log_probs for result in results])


def expected_scores(run):
    """The same from our model, which is kept from generating pad and bos."""
    translator = Translator.load(run)
    source = [[*ids, EOS_ID] for ids in translator.source_tokenizer.encode_batch(SENTENCES)]
    target = [[*ids, EOS_ID] for ids in translator.target_tokenizer.encode_batch(TARGETS)]
    source_ids, labels = padded(source[: len(target)]), padded(target)
    target_ids = np.pad(labels, ((0, 0), (1, 0)), constant_values=BOS_ID)[:, :-1]
    variables = {"params": translator.params}
    logits = jax.jit(Transformer(translator.config).apply)(variables, source_ids, target_ids)
    log_probs = jax.nn.log_softmax(logits.at[:, :, jnp.array([PAD_ID, BOS_ID])].set(-jnp.inf))
    chosen = np.take_along_axis(np.asarray(log_probs), labels[:, :, None], axis=2)[:, :, 0]
    return chosen[labels != PAD_ID]


def padded(rows):
    ids = np.full((len(rows), max(map(len, rows))), PAD_ID, np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids


def search(directory, lines, **options):
    """Search for translations of lines, within the length limits of our `Translator`."""
    translator = ctranslate2.Translator(str(directory))
    results = []
    for pieces in processors(directory)[0].encode(lines, out_type=str):
        limit = GenerationConfig().max_length(len(pieces) + 1)
        results += translator.translate_batch(
            [pieces], min_decoding_length=0, max_decoding_length=limit, **options
        )
    return results


def translate(directory, lines, **options):
    """Return the best translations as text."""
    results = search(directory, lines, **options)
    return processors(directory)[1].decode([result.hypotheses[0] for result in results])


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_ours(export, name):
    run, directory = export(name)
    np.testing.assert_allclose(scores(directory), expected_scores(run), atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=["trained", "swiglu_separate"])
def exported(request, export, tmp_path_factory):
    """A model whose translations end, and one with separate vocabularies, where not all end."""
    if request.param != "trained":
        return export(request.param)
    run, directory = trained_run(tmp_path_factory), tmp_path_factory.mktemp("trained") / "ct2"
    to_ctranslate2(run, directory)
    return run, directory


def test_greedy_translations_are_ours(exported):
    run, directory = exported
    expected = Translator.load(run).translate(SENTENCES, beam_size=1)
    assert len(set(expected)) > 4, "the model says the same of everything"
    assert translate(directory, SENTENCES, beam_size=1) == expected


def test_beam_search_finds_what_ours_finds(exported):
    """Unless the limit cut off CTranslate2's best: there it may beat hypotheses that ended."""
    run, directory = exported
    options = {"beam_size": 4, "length_penalty": 1.0}
    ours = Translator.load(run).generate(
        SENTENCES, **options, length_penalty_form="power", early_stopping=True
    )
    results = search(directory, SENTENCES, **options, return_scores=True, return_end_token=True)
    ended = 0
    for result, (best, *_) in zip(results, ours, strict=True):
        *tokens, last = result.hypotheses[0]
        if last == "</s>":
            ended += 1
            assert tokens == best.tokens
            assert result.scores[0] == pytest.approx(best.score, abs=1e-4)
    assert ended >= 4


@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.5), ("float16", 0.01)])
def test_quantized_models_say_nearly_the_same(export, quantization, tolerance):
    run, directory = export("pre_gelu_biases", quantization=quantization)
    full = export("pre_gelu_biases")[1]
    assert (directory / "model.bin").stat().st_size < (full / "model.bin").stat().st_size
    assert np.max(np.abs(scores(directory) - expected_scores(run))) < tolerance
    assert len(translate(directory, SENTENCES, beam_size=2)) == len(SENTENCES)


def test_pad_and_bos_are_never_generated(tmp_path):
    params = write_random_run(tmp_path / "run", CONFIGS["pre_gelu_biases"])
    params["output_bias"][[PAD_ID, BOS_ID]] = 60.0
    save_params(tmp_path / "run", 2, params)
    for quantization in (None, "int8"):
        directory = tmp_path / f"ct2_{quantization}"
        to_ctranslate2(tmp_path / "run", directory, quantization=quantization, checkpoint=2)
        pieces = processors(directory)[0].encode(SENTENCES, out_type=str)
        results = ctranslate2.Translator(str(directory)).translate_batch(pieces, num_hypotheses=2)
        tokens = {token for result in results for tokens in result.hypotheses for token in tokens}
        assert tokens
        assert not {"<pad>", "<s>"} & tokens


def test_sinusoids_reach_beyond_the_longest_sentence():
    """Twice as far, as a translation may, and at least as far as CTranslate2 reads by default."""
    params = {"embedding": {"embedding": np.zeros((CONFIG.vocab_size, CONFIG.d_model))}}
    for max_length, at_least in ((32, 1024), (3000, 6000)):
        spec = SimpleNamespace(position_encodings=SimpleNamespace())
        config = CONFIG.replace(max_length=max_length)
        _set_embedding(spec, SimpleNamespace(), config, params, "target")
        assert len(spec.position_encodings.encodings) >= at_least


def test_unknown_words_are_unk(export):
    run, directory = export("paper")
    lines = ["red 漢字 dogs", "漢字"]
    expected = Translator.load(run).translate(lines, beam_size=1)
    assert translate(directory, lines, beam_size=1) == expected


# ---------------------------------------------------------------------------------------------
# What cannot be exported, and where it cannot be exported to
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_random_run(run, CONFIG)
    return run


def test_values_of_another_width_are_refused(tmp_path):
    write_random_run(tmp_path / "run", CONFIG.replace(value_dim=5))
    message = r"^TransformerConfig.value_dim is 5 and head_dim 8: .*; export to StableHLO instead$"
    with pytest.raises(UserError, match=message):
        to_ctranslate2(tmp_path / "run", tmp_path / "ct2")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unknown_quantization_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="quantization is 'int4': choose one of int8, int8_float32"):
        to_ctranslate2(run, tmp_path / "ct2", quantization="int4")


def test_what_is_there_stays(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.bin").write_text("mine")
    with pytest.raises(UserError, match="full exists and is not empty: give a new directory"):
        to_ctranslate2(run, tmp_path / "full")
    with pytest.raises(UserError, match=r"model.bin is a file: give a new directory"):
        to_ctranslate2(run, tmp_path / "full" / "model.bin")
    assert (tmp_path / "full" / "model.bin").read_text() == "mine"
    with pytest.raises(UserError, match=r"cannot write .*/ct2: File exists; choose"):
        to_ctranslate2(run, tmp_path / "full" / "model.bin" / "ct2")


def test_an_empty_directory_is_filled(run, tmp_path):
    """It is not replaced: it may be a link or a mount point."""
    (tmp_path / "there").mkdir()
    (tmp_path / "ct2").symlink_to("there")
    to_ctranslate2(run, tmp_path / "ct2")
    assert ctranslate2.contains_model(str(tmp_path / "there"))
    assert (tmp_path / "ct2").is_symlink()
    assert not [path for path in (tmp_path / "there").iterdir() if path.name.startswith(".")]


def test_a_broken_run_leaves_nothing_behind(run, tmp_path):
    for missing, message in (
        ("checkpoints", "has no checkpoint"),
        ("tokenizer.model", "tokenizer"),
    ):
        broken = tmp_path / f"no_{missing}"
        shutil.copytree(run, broken, ignore=shutil.ignore_patterns(missing))
        with pytest.raises(UserError, match=message):
            to_ctranslate2(broken, tmp_path / "ct2")
    assert not (tmp_path / "ct2").exists()


def test_a_full_disk_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def fail(self, directory):
        (Path(directory) / "model.bin").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ctranslate2.specs.TransformerSpec, "save", fail)
    with pytest.raises(UserError, match=r"cannot write .*/ct2: No space left on device; choose"):
        to_ctranslate2(run, tmp_path / "ct2")
    assert list(tmp_path.iterdir()) == []


def test_without_ctranslate2_the_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2.specs.model_spec", None)
    with pytest.raises(UserError, match="pip install ctranslate2"):
        to_ctranslate2(run, tmp_path / "ct2")


def test_the_checkpoint_that_is_asked_for_is_exported(tmp_path):
    params = write_random_run(tmp_path / "run", CONFIG)
    to_ctranslate2(tmp_path / "run", tmp_path / "only")
    save_params(tmp_path / "run", 2, jax.tree.map(np.zeros_like, params))
    to_ctranslate2(tmp_path / "run", tmp_path / "first", checkpoint=1)
    first, only = ((tmp_path / which / "model.bin").read_bytes() for which in ("first", "only"))
    assert first == only
