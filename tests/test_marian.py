"""Marian of Hugging Face Transformers: the same logits, tokens and text there and here."""

import functools
import io
import json
import random
import resource
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from jaxformer.checkpoints import load_params, save_params
from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.interop.ctranslate2 import to_ctranslate2
from jaxformer.interop.marian import from_marian, to_marian
from jaxformer.interop.marian_config import complete_settings
from jaxformer.run_directory import (
    load_tokenizers,
    read_model_config,
    save_tokenizers,
    write_config,
)
from jaxformer.tokenizer import Tokenizer
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from random_run import CONFIG, write_random_run
from small_run import LEXICON, sentence_pairs, trained_run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.numpy").load_file
save_file = pytest.importorskip("safetensors.numpy").save_file
save_torch = pytest.importorskip("safetensors.torch").save_file
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # for models this small, more threads only wait for one another

pytestmark = [
    pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses"),
    pytest.mark.usefixtures("one_program_a_search"),
]

PAIRS = sentence_pairs(80)
SOURCES = [source for source, _ in PAIRS[:10]]


def sentencepiece_model(sentences, vocab_size, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@functools.cache
def source_model(**options):
    return sentencepiece_model([en for en, _ in PAIRS], 60, model_type="bpe", **options)


@functools.cache
def target_model(**options):
    return sentencepiece_model([de for _, de in PAIRS], 35, **options)


def padded(rows, filling=PAD_ID):
    width = max(map(len, rows))
    return np.array([[*row, *[filling] * (width - len(row))] for row in rows], np.int32)


# ---------------------------------------------------------------------------------------------
# Their models
# ---------------------------------------------------------------------------------------------

VARIANTS = {
    "shared": {"encoder_layers": 2, "decoder_layers": 1, "activation_function": "swish"},
    "target": {
        "share_encoder_decoder_embeddings": False,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "activation_function": "relu",
    },
    "separate": {
        "share_encoder_decoder_embeddings": False,
        "tie_word_embeddings": False,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "activation_function": "gelu",
    },
}


def opus_files(folder, separate):
    """Write tokenizers like OPUS-MT's: ids differ from sentencepiece's, and pad is the last."""
    models = {
        "source": source_model(pad_id=-1, bos_id=-1, eos_id=0, unk_id=1),
        "target": target_model(),  # sentencepiece's own numbering: <unk>, <s>, </s>
    }
    pieces = {}
    for side, model in models.items():
        (folder / f"{side}.spm").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        names = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
        # The vocabulary lacks "x".
        pieces[side] = set(names) - {"<unk>", "<s>", "</s>", "x"}

    def vocabulary(pieces):
        names = sorted(pieces)
        random.Random(0).shuffle(names)
        return {name: i for i, name in enumerate(["</s>", "<unk>", *names, "<pad>"])}

    codes = {">>deu<<", ">>swe<<"}
    joint = vocabulary(pieces["source"] | pieces["target"] | codes)
    source = vocabulary(pieces["source"] | codes) if separate else joint
    target = vocabulary(pieces["target"] | {"▁more"}) if separate else joint
    (folder / "vocab.json").write_text(json.dumps(source))
    if separate:
        (folder / "target_vocab.json").write_text(json.dumps(target))
    settings = {"source_lang": "en", "target_lang": "de", "separate_vocabs": separate}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return source, target


def marian(folder, variant):
    """Write a model trained just enough for its output to depend on the sentence, and to end."""
    source, target = opus_files(folder, separate=variant == "target")
    torch.manual_seed(0)
    pad_id = target["<pad>"]
    config = transformers.MarianConfig(
        vocab_size=len(source),
        decoder_vocab_size=len(target),
        d_model=24,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        max_position_embeddings=64,
        scale_embedding=True,
        dropout=0.0,
        pad_token_id=pad_id,
        decoder_start_token_id=pad_id,
        eos_token_id=0,
        forced_eos_token_id=0,
        **VARIANTS[variant],
    )
    model = transformers.MarianMTModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.normal_(float("norm.weight" in name), 0.2)
        if variant != "target":
            model.final_logits_bias.normal_()
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    sources, targets = ([pair[side] for pair in PAIRS] for side in (0, 1))
    batch = tokenizer(sources, return_tensors="pt", padding=True)
    labels = padded(tokenizer(text_target=targets).input_ids, -100)
    batch["labels"] = torch.from_numpy(labels).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        rows = torch.arange(step % 4, len(PAIRS), 4)
        model(**{name: ids[rows] for name, ids in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.bad_words_ids = [[pad_id]]
    model.eval().save_pretrained(folder)
    return model


def imported(variant, folder):
    model = marian(folder, variant)
    run = folder.parent / f"{folder.name}_run"
    from_marian(folder, run)
    source, target = load_tokenizers(run)
    return SimpleNamespace(
        folder=folder,
        run=run,
        model=model,
        tokenizer=transformers.MarianTokenizer.from_pretrained(folder),
        config=read_model_config(run),
        source=source,
        target=target,
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return functools.cache(lambda variant: imported(variant, tmp_path_factory.mktemp(variant)))


@pytest.fixture(params=VARIANTS)
def case(request, cases):
    return cases(request.param)


@pytest.fixture
def shared(cases):
    return cases("shared")


def theirs_of_ours(case, tokenizer):
    """Their id of each of our ids."""
    side = "source" if tokenizer is case.source else "target"
    file = "vocab.json"
    if side == "target" and (case.folder / "target_vocab.json").is_file():
        file = "target_vocab.json"
    vocabulary = json.loads((case.folder / file).read_text())
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    assert pieces[:4] == ["<pad>", "<s>", "</s>", "<unk>"]
    ids = [vocabulary[piece] for piece in ["<pad>", "<pad>", *pieces[2:]]]
    assert sorted(ids[1:]) == list(range(len(vocabulary)))
    return np.array(ids)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, source_ids, target_ids):
    return model.apply({"params": params}, source_ids, target_ids)


def assert_logits_agree(run, model, source_order, target_order, source, tolerance=1e-4):
    """On sentences of different lengths, with random inputs to the decoder."""
    config = read_model_config(run)
    source_ids = padded([[*source.encode(line), EOS_ID] for line in SOURCES])
    target_ids = np.random.default_rng(0).integers(EOS_ID, config.vocab_size, (len(SOURCES), 9))
    target_ids[:, 0] = BOS_ID
    ours = apply(Transformer(config), load_params(run), source_ids, target_ids.astype(np.int32))
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(source_order[source_ids]),
            attention_mask=torch.from_numpy(source_ids != PAD_ID).long(),
            decoder_input_ids=torch.from_numpy(target_order[target_ids]),
        ).logits.numpy()
    assert np.ptp(theirs) > 3
    np.testing.assert_allclose(ours, theirs[:, :, target_order], rtol=0, atol=tolerance)


def test_logits_of_imported_models(case):
    orders = theirs_of_ours(case, case.source), theirs_of_ours(case, case.target)
    assert_logits_agree(case.run, case.model, *orders, case.source)
    assert case.config.output_bias == bool(torch.any(case.model.final_logits_bias != 0))


def generate(model, tokenizer, lines, **options):
    """Their token ids of each line, without the start token and eos."""
    batch = tokenizer(lines, return_tensors="pt", padding=True)
    with torch.no_grad():
        sequences = model.generate(**batch, **options)
    assert torch.all(sequences[:, 0] == model.config.decoder_start_token_id)
    rows = []
    for row in sequences[:, 1:].tolist():
        assert model.config.eos_token_id in row, "did not end by itself"
        rows.append(row[: row.index(model.config.eos_token_id)])
    return rows


@pytest.mark.parametrize("beam_size", [1, 4])
def test_searches_of_imported_models(case, beam_size):
    """Some rules of the two searches differ, which does not matter here.

    At the length limit their hypothesis is made to end and ours is cut off. Such lines are left
    out, because on some CPUs the trained model repeats a word. A hypothesis that ends while not
    among the K best of a step is lost in their search. They divide by the length including eos, as
    we do.

    Other rules had to be made alike: our log-probabilities are normalised without pad, and we stop
    when nothing better is in reach, not even a longer hypothesis.
    """
    lines = [">>deu<< " + line if i % 2 else line for i, line in enumerate(SOURCES)]
    theirs = generate(
        case.model,
        case.tokenizer,
        lines,
        num_beams=beam_size,
        do_sample=False,
        length_penalty=1.0,
        early_stopping="never",
        renormalize_logits=True,
        max_length=64,
    )
    assert len({tuple(row) for row in theirs}) > len(lines) / 2 and max(map(len, theirs)) > 4
    translator = Translator.load(case.run)
    options = {"beam_size": beam_size, "length_penalty": 1.0, "length_penalty_form": "power"}
    options |= {"max_length_ratio": 0.0, "max_length_extra": 63}
    found = [hypotheses[0] for hypotheses in translator.generate(lines, **options)]
    order = theirs_of_ours(case, case.target)
    ids = {
        piece: id for piece, id in zip(case.target.pieces(range(len(order))), order, strict=True)
    }
    ended = [(best, row) for best, row in zip(found, theirs, strict=True) if len(row) < 62]
    assert len(ended) > len(lines) / 2
    for best, row in ended:
        assert [ids[piece] for piece in best.tokens] == row
        if "<unk>" not in best.tokens:
            assert best.text == case.tokenizer.decode(row, skip_special_tokens=True)


def test_an_imported_model_goes_on_to_ctranslate2(case, tmp_path):
    """With its vocabularies, whose ids are not sentencepiece's own."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    to_ctranslate2(case.run, tmp_path / "ct2")
    source, target = load_tokenizers(tmp_path / "ct2")
    lines = [">>deu<< " + line if i % 2 else line for i, line in enumerate(SOURCES)]
    results = ctranslate2.Translator(str(tmp_path / "ct2")).translate_batch(
        [source.pieces(ids) for ids in source.encode_batch(lines)],
        beam_size=1,
        max_decoding_length=63,
    )
    options = {"beam_size": 1, "max_length_ratio": 0.0, "max_length_extra": 63}
    found = [best for (best,) in Translator.load(case.run).generate(lines, **options)]
    assert len({best.text for best in found}) > len(lines) / 2
    for best, result in zip(found, results, strict=True):
        assert result.hypotheses[0] == best.tokens
        ids = [target.vocabulary.index(piece) for piece in result.hypotheses[0]]
        assert target.decode(ids) == best.text


# ---------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------

TEXTS = [
    *SOURCES,
    "",
    "   ",
    " two  red\tdogs ",
    "漢字 dogs 🙂🙂 now",
    "naïve ﬁne ½ Ⅳ",
    "e\u0301 é",
    "a\u200bb\u2028c\u00a0d",
    "x, fox, six",  # a piece that the vocabulary lacks
    ">>deu<< two red dogs",
    ">>deu<<two",
    ">>xyz<< two",
    ">>deu<<",
    " >>deu<< two",
    "two >>deu<< dogs",
    ">> two << dogs",
    ">>deu two",
    ">>deu<< >>swe<< two",
    "▁two▁dogs",
    "<s> two",
]


def test_tokenizers_split_text_alike(case):
    theirs = [case.tokenizer(text).input_ids[:-1] for text in TEXTS]
    order = theirs_of_ours(case, case.source)
    ours = case.source.encode_batch(TEXTS)
    assert ours == [case.source.encode(text) for text in TEXTS]
    assert [order[ids].tolist() for ids in ours] == theirs
    assert any(3 in ids for ids in ours)
    targets = [target for _, target in PAIRS]
    theirs = case.tokenizer(text_target=targets).input_ids
    order = theirs_of_ours(case, case.target)
    assert [[*order[ids].tolist(), 0] for ids in case.target.encode_batch(targets)] == theirs


def test_tokenizers_join_pieces_alike(case):
    order = theirs_of_ours(case, case.target)
    draw = random.Random(0)
    for length in range(1, 30):
        ids = [draw.randrange(4, len(order)) for _ in range(length)]
        theirs = case.tokenizer.decode(order[ids], skip_special_tokens=True)
        assert case.target.decode([BOS_ID, *ids, EOS_ID, PAD_ID]) == theirs


def test_text_cannot_spell_special_pieces(shared):
    for text in ("</s> two", "<pad>", "two <unk>", "(<pad>)", "<s>"):
        assert not {PAD_ID, BOS_ID, EOS_ID} & set(shared.source.encode(text))


# ---------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------


def assert_same_model(one, other):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(ours[name], tensor, name)
    names = {path.name for path in other.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in one.iterdir()} == names
    for name in names - {"model.safetensors"}:
        if name.endswith(".json"):
            assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes()


def test_there_and_back_is_the_same_model(case, tmp_path):
    to_marian(case.run, tmp_path / "back")
    assert_same_model(tmp_path / "back", case.folder)
    weights, settings = (tmp_path / "back" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == settings.stat().st_mode
    model = transformers.MarianMTModel.from_pretrained(tmp_path / "back")
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_files_of_older_versions(shared, tmp_path):
    """A pickle with every name of a tied tensor, and with tensors that are computed today."""
    folder = tmp_path / "old"
    shutil.copytree(shared.folder, folder)
    (folder / "model.safetensors").unlink()
    state = shared.model.state_dict()
    assert {"lm_head.weight", "model.encoder.embed_positions.weight"} <= set(state)
    torch.save(state, folder / "pytorch_model.bin")
    from_marian(folder, tmp_path / "run")
    to_marian(tmp_path / "run", tmp_path / "back")
    assert_same_model(tmp_path / "back", shared.folder)

    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"shared\.weight and .*lm_head\.weight differ, but config"):
        from_marian(folder, tmp_path / "other")


@pytest.mark.parametrize("form", ["shards", "shards of pickles", "bfloat16", "bfloat16 pickle"])
def test_other_files_that_transformers_writes(shared, tmp_path, form):
    folder = tmp_path / "theirs"
    shutil.copytree(shared.folder, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    expected = load_params(shared.run)
    if form == "shards":
        shared.model.save_pretrained(folder, max_shard_size="20KB")
        assert not (folder / "model.safetensors").exists()
    elif form == "shards of pickles":
        state = {name: x.clone() for name, x in shared.model.state_dict().items()}
        shard_of = {
            name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(state)
        }
        for file in set(shard_of.values()):
            torch.save({n: x for n, x in state.items() if shard_of[n] == file}, folder / file)
        index = json.dumps({"metadata": {}, "weight_map": shard_of})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    else:
        state = {name: x.bfloat16() for name, x in shared.model.state_dict().items()}
        if form == "bfloat16":
            tensors = {name: state[name] for name in load_file(shared.folder / "model.safetensors")}
            save_torch(tensors, folder / "model.safetensors")
        else:
            torch.save(state, folder / "pytorch_model.bin")
        expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), expected)
    from_marian(folder, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "run"), expected)


def test_half_precision_files_stay_half_precision(shared, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(shared.folder, folder)
    tensors = load_file(shared.folder / "model.safetensors")
    save_file(
        {name: tensor.astype(np.float16) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    from_marian(folder, tmp_path / "run")
    assert {leaf.dtype for leaf in jax.tree.leaves(load_params(tmp_path / "run"))} == {
        np.dtype(np.float32)
    }
    to_marian(tmp_path / "run", tmp_path / "back")
    assert_same_model(tmp_path / "back", folder)


# ---------------------------------------------------------------------------------------------
# Our models
# ---------------------------------------------------------------------------------------------

OURS = TransformerConfig(
    vocab_size=130,
    d_model=16,
    d_ff=20,
    num_heads=2,
    encoder_layers=2,
    decoder_layers=2,
    max_length=64,
)
OWN = {
    "default": OURS,
    "target": OURS.replace(
        vocab_size=35,
        source_vocab_size=60,
        embeddings="target",
        positions="sinusoidal_concat",
        activation="gelu",
        attention_bias=True,
        layer_norm_epsilon=1e-5,
        decoder_layers=1,
    ),
    "separate": OURS.replace(
        vocab_size=35,
        source_vocab_size=60,
        embeddings="separate",
        activation="swish",
        output_bias=True,
        encoder_layers=1,
    ),
}


def random_run(folder, config, *, small=False):
    """Write a run of random parameters; with `small`, all activations but logits are small."""
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    if config.source_vocab_size:
        tokenizers = Tokenizer(source_model(**ids)), Tokenizer(target_model(**ids))
    else:
        sentences = [sentence for pair in PAIRS for sentence in pair]
        tokenizers = (Tokenizer(sentencepiece_model(sentences, 130, model_type="bpe", **ids)),) * 2
    rng = np.random.default_rng(1)
    shape = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), shape, shape)["params"]

    def fill(path, leaf):
        values = rng.normal(float(path[-1].key == "scale"), 0.5, leaf.shape)
        if small and path[-1].key == "bias":
            values *= 0.0
        if small and path[-1].key == "scale":
            last = path[0].key == "decoder" and path[2].key == "feed_forward_residual"
            values[: -1 if last else None] *= 0.01
        return values.astype(np.float32)

    folder.mkdir()
    write_config(folder, {"model": config.to_dict()})
    save_tokenizers(folder, *tokenizers)
    save_params(folder, 3, jax.tree_util.tree_map_with_path(fill, shapes))
    return folder


@pytest.mark.parametrize("name", OWN)
def test_logits_of_exported_models(name, tmp_path):
    run = random_run(tmp_path / "run", OWN[name])
    to_marian(run, tmp_path / "out")
    model = transformers.MarianMTModel.from_pretrained(tmp_path / "out")
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path / "out")
    source, target = load_tokenizers(run)
    orders = np.arange(source.vocab_size), np.arange(target.vocab_size)
    assert_logits_agree(run, model, *orders, source)
    lines = [*SOURCES, "漢字 dogs 🙂", ""]
    assert tokenizer(lines).input_ids == [[*source.encode(line), EOS_ID] for line in lines]
    targets = [line for _, line in PAIRS]
    ids = target.encode_batch(targets)
    assert tokenizer(text_target=targets).input_ids == [[*row, EOS_ID] for row in ids]
    rows = [[BOS_ID, *row, EOS_ID, PAD_ID] for row in ids]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == targets

    # An export is a Marian model like any other.
    from_marian(tmp_path / "out", tmp_path / "again")
    assert read_model_config(tmp_path / "again").vocab_size == OWN[name].vocab_size
    to_marian(tmp_path / "again", tmp_path / "out again")
    assert_same_model(tmp_path / "out again", tmp_path / "out")


def test_layer_norm_epsilon_is_made_up_for(tmp_path):
    """In a residual stream so small that 1e-5 instead of 1e-6 would change everything."""
    run = random_run(tmp_path / "run", OURS, small=True)
    to_marian(run, tmp_path / "out")
    model = transformers.MarianMTModel.from_pretrained(tmp_path / "out")
    source, order = load_tokenizers(run)[0], np.arange(OURS.vocab_size)
    assert_logits_agree(run, model, order, order, source)
    write_config(run, {"model": OURS.replace(layer_norm_epsilon=1e-5).to_dict()})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logits_agree(run, model, order, order, source, tolerance=1e-2)


def test_text_in_and_text_out_of_an_exported_run(tmp_path_factory, tmp_path):
    run = trained_run(tmp_path_factory)
    to_marian(run, tmp_path / "out")
    model = transformers.MarianMTModel.from_pretrained(tmp_path / "out")
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path / "out")
    order = np.arange(model.config.vocab_size)
    assert_logits_agree(run, model, order, order, load_tokenizers(run)[0])
    translator = Translator.load(run)
    for options in ({"num_beams": 1}, {}):
        rows = generate(model, tokenizer, SOURCES, **options)
        theirs = tokenizer.batch_decode(rows, skip_special_tokens=True)
        ours = translator.translate(
            SOURCES, beam_size=options.get("num_beams", 4), length_penalty_form="power"
        )
        assert theirs == ours
    right = [
        LEXICON[word] in text
        for line, text in zip(SOURCES, ours, strict=True)
        for word in line.split()
    ]
    assert np.mean(right) > 0.5


# ---------------------------------------------------------------------------------------------
# What cannot be converted
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "pre"},
        {"activation": "swiglu"},
        {"positions": "learned"},
        {"head_dim": 5},
        {"value_dim": 7},
        {"layer_norm_epsilon": 1e-3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_marian_cannot_express_is_refused(changes, tmp_path):
    write_config(tmp_path / "run", {"model": OURS.replace(**changes).to_dict()})
    ((field, value),) = changes.items()
    with pytest.raises(UserError, match=f"cannot express model.{field}={value!r}, only") as caught:
        to_marian(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def edit(name, change):
    """Return a function that edits a JSON file of a folder."""

    def apply(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(content)))

    return apply


def config(**changes):
    return edit("config.json", lambda content: content | changes)


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change):
    def apply(folder):
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def added(folder):
    """Add a token that the vocabulary lacks, as `add_tokens` does."""
    (folder / "added_tokens.json").write_text('{"<ent>": 60}')
    config(vocab_size=70, decoder_vocab_size=70)(folder)


SHARED, FC1 = "model.shared.weight", "model.encoder.layers.1.fc1.weight"
BROKEN = [
    (remove("config.json"), r"cannot read .*config\.json: No such file"),
    (write("config.json", b"{"), r"config\.json is not valid JSON"),
    (write("config.json", b"[]"), r"config\.json is not a JSON object"),
    (config(model_type="bart"), "model_type='bart'"),
    (write("config.json", b"[" * 100_000), r"config\.json is not valid JSON"),
    (config(activation_function=["relu"]), r"activation_function=\['relu'\]: only"),
    (config(scale_embedding="false"), "scale_embedding='false': it must be true or false"),
    (config(dropout=None), "dropout=None: it must be a number"),
    (config(encoder_layers=10**9), "encoder_layers=1000000000: no model has so many"),
    (config(d_model=None), "d_model=None: it must be an integer"),
    (config(d_model=26), r"config\.json: TransformerConfig\.num_heads is 3"),
    (config(scale_embedding=False), "scale_embedding=False"),
    (config(activation_function="gelu_new"), "activation_function='gelu_new'"),
    (config(decoder_ffn_dim=24), "encoder_ffn_dim=20: .* 24"),
    (config(decoder_attention_heads=4), "encoder_attention_heads=3: .* 4"),
    (config(tie_word_embeddings=False), "tie_word_embeddings=False"),
    (config(pad_token_id=5), "pad_token_id=5, but the vocabulary has <pad> at"),
    (config(eos_token_id=5), "eos_token_id=5, but the vocabulary has </s> at 0"),
    (config(decoder_start_token_id=0), "decoder_start_token_id=0, </s>: only"),
    (config(decoder_start_token_id=9999), "decoder_start_token_id=9999, not a piece"),
    (config(vocab_size=70, decoder_vocab_size=70), r"vocab\.json has \d+ pieces .* expects 70"),
    (remove("vocab.json"), r"cannot read .*vocab\.json"),
    (edit("vocab.json", lambda v: v | {"more": 7}), r"vocab\.json has \d+ pieces"),
    (edit("vocab.json", lambda v: v | {"</s>": 1}), "does not number its pieces"),
    (edit("vocab.json", lambda v: v | {"</s>": "0"}), "does not number its pieces"),
    (edit("vocab.json", lambda v: {p: i for p, i in v.items() if p != "<pad>"}), "no piece <pad>"),
    (
        edit("vocab.json", lambda v: {p or "\ud800": i for p, i in v.items()} | {"\ud800": 1}),
        "not text",
    ),
    (added, r"added_tokens\.json: a tokenizer with tokens that were added"),
    (remove("source.spm"), r"cannot read .*source\.spm"),
    (write("target.spm", b"junk"), r"target\.spm is not a sentencepiece model"),
    (remove("model.safetensors"), "neither model.safetensors nor pytorch_model.bin"),
    (write("model.safetensors", b"junk"), r"cannot read .*model\.safetensors"),
    (tensors(lambda t: t.pop(FC1)), rf"has no tensor {FC1}"),
    (tensors(lambda t: t.pop(SHARED)), rf"has no tensor {SHARED}"),
    (tensors(lambda t: t.update({FC1: t[FC1].T.copy()})), rf"{FC1} as float32 \[24, 20\]"),
    (tensors(lambda t: t.update({SHARED: t[SHARED][1:].copy()})), rf"{SHARED} as float32"),
    (tensors(lambda t: t.update({FC1: t[FC1].astype(np.int8)})), rf"{FC1} as int8"),
    (tensors(lambda t: t.update({"model.layernorm": t[FC1]})), "a tensor model.layernorm, which"),
    (
        tensors(
            lambda t: t.update({"model.encoder.embed_positions.weight": np.zeros((64, 24), "f4")})
        ),
        "not a sinusoid",
    ),
]


@pytest.mark.parametrize("damage, message", BROKEN, ids=[message for _, message in BROKEN])
def test_a_broken_directory_is_refused_with_one_line(damage, message, shared, tmp_path):
    shutil.copytree(shared.folder, tmp_path / "broken")
    damage(tmp_path / "broken")
    with pytest.raises(UserError, match=message) as caught:
        from_marian(tmp_path / "broken", tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_pickle_of_code_is_refused(shared, tmp_path):
    shutil.copytree(shared.folder, tmp_path / "evil")
    (tmp_path / "evil" / "model.safetensors").unlink()
    torch.save({"model.shared.weight": print}, tmp_path / "evil" / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin is not a file of weights alone: "
    ) as caught:
        from_marian(tmp_path / "evil", tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_nothing_is_overwritten(shared, tmp_path):
    (tmp_path / "file").write_text("precious")
    for convert, source in ((from_marian, shared.folder), (to_marian, shared.run)):
        with pytest.raises(UserError, match="not empty"):
            convert(source, tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        from_marian(tmp_path / "nowhere", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_checkpoint_that_is_asked_for_is_exported(tmp_path):
    params = write_random_run(tmp_path / "run", CONFIG)
    to_marian(tmp_path / "run", tmp_path / "only")
    save_params(tmp_path / "run", 2, jax.tree.map(np.zeros_like, params))
    to_marian(tmp_path / "run", tmp_path / "first", checkpoint=1)
    first, only = (
        (tmp_path / which / "model.safetensors").read_bytes() for which in ("first", "only")
    )
    assert first == only


@pytest.mark.parametrize(
    "change", [{"encoder_layers": 3}, {"d_ff": 40}, {"embeddings": "separate"}]
)
def test_parameters_of_another_configuration_are_not_exported(tmp_path, change):
    write_random_run(tmp_path / "run", CONFIG)
    write_config(tmp_path / "run", {"model": CONFIG.replace(**change).to_dict()})
    with pytest.raises(UserError, match="is of another configuration"):
        to_marian(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_place_elsewhere_or_nowhere_is_refused(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, message in (
        ("s3://bucket/run", "s3://bucket/run"),
        ("a[b]", r"/a\[b\] contains"),
        ("", "empty"),
    ):
        with pytest.raises(UserError, match=message):
            from_marian(shared.folder, place)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="that of a Hugging Face model: make a run of it"):
        to_marian(shared.folder, tmp_path / "out")


@pytest.mark.parametrize("to", ["run", "marian"])
def test_a_full_disk_is_told_in_one_line(shared, tmp_path, to):
    convert, source = (from_marian, shared.folder) if to == "run" else (to_marian, shared.run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: ") as caught:
            convert(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_dropout_that_is_left_out_is_what_transformers_takes(shared):
    path = shared.folder / "config.json"
    theirs = json.loads(path.read_text())
    del theirs["dropout"]
    assert complete_settings(theirs, path)["dropout"] == transformers.MarianConfig().dropout
