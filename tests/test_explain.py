"""What a model attended to, compared with the model itself; and how that is shown."""

import base64
import dataclasses
import re
import struct
import zlib
from html.parser import HTMLParser

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.cli import main
from jaxformer.errors import UserError
from jaxformer.pages import heatmap
from jaxformer.pages.heatmap import (
    alignment_lines,
    axes,
    describe_head,
    heat_map,
    legend,
    png,
    shades,
    signed_shades,
)
from jaxformer.pages.inspection import inspection_page
from jaxformer.pages.page import COLOURS, page, script_note, table
from jaxformer.pages.pictures import _draw_maps, draw_explanation, fonts_for
from jaxformer.positions import sinusoid
from jaxformer.results import Alignment
from jaxformer.transformer import Transformer
from jaxformer.translator import Translator
from random_run import CONFIG, SENTENCES, random_params, write_random_run

pytestmark = pytest.mark.usefixtures("one_program_a_search")

LINE = max(SENTENCES, key=len)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("explain") / "run"
    write_random_run(run, CONFIG)
    return run


@pytest.fixture(scope="module")
def translator(run):
    return Translator.load(run, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def explanation(translator):
    return translator.explain(LINE, beam_size=3, max_length_extra=4)


def test_it_is_the_translation_that_translate_gives(translator, explanation):
    (hypotheses,) = translator.generate([LINE], beam_size=3, max_length_extra=4)
    assert [h.text for h in explanation.hypotheses] == [h.text for h in hypotheses]
    best = explanation.hypotheses[0]
    assert explanation.target_tokens == [*best.tokens, "</s>"]
    assert explanation.decoder_tokens == ["<s>", *best.tokens]
    # The log-probability of a translation cut off at the length limit has no part for eos.
    sums = explanation.token_log_probs.sum(), explanation.token_log_probs[:-1].sum()
    assert any(np.isclose(total, best.log_prob, rtol=1e-5) for total in sums)


def test_a_drawn_translation_is_explained(translator):
    """It is the first sample drawn for the first line."""
    options = {"beam_size": 2, "sampling": True, "temperature": 2.0}
    for seed in (1, 2):
        explanation = translator.explain(LINE, seed=seed, **options)
        (drawn,) = translator.generate([LINE], seed=seed, batch_tokens=8, **options)
        assert explanation.hypotheses == drawn
        assert explanation.target_tokens[:-1] == drawn[0].tokens


def test_weights_are_those_of_the_forward_pass_without_padding(translator, explanation):
    source, target = (
        jnp.array([[*map(pieces.index, tokens)]])
        for pieces in [translator.source_tokenizer.pieces(range(CONFIG.vocab_size))]
        for tokens in (explanation.source_tokens, explanation.decoder_tokens)
    )
    _, sown = Transformer(CONFIG).apply(
        {"params": translator.params}, source, target, mutable="intermediates"
    )
    stacks = sown["intermediates"]
    for actual, stack, kind in (
        (explanation.encoder_self_attention, "encoder", "self_attention"),
        (explanation.decoder_self_attention, "decoder", "self_attention"),
        (explanation.cross_attention, "decoder", "cross_attention"),
    ):
        (expected,) = stacks[stack]["layers"][kind]["attention_weights"]
        np.testing.assert_allclose(actual, expected[:, 0], atol=1e-5)
        np.testing.assert_allclose(actual.sum(-1), 1.0, rtol=1e-5)
    aligned = explanation.cross_attention[-2].mean(axis=0)
    np.testing.assert_array_equal(explanation.alignment.weights, aligned)
    length = max(source.size, target.size)
    encoding = sinusoid(jnp.arange(length), CONFIG.d_model)
    np.testing.assert_allclose(explanation.positional_encoding, encoding, atol=1e-6)


@pytest.mark.slow
def test_learned_positions_are_shown(tmp_path):
    config = CONFIG.replace(positions="learned")
    params = write_random_run(tmp_path / "run", config)
    explanation = Translator.load(tmp_path / "run").explain("red dogs", beam_size=1)
    table = params["source_positions"]["embedding"]
    length = len(explanation.positional_encoding)
    np.testing.assert_allclose(explanation.positional_encoding, table[:length], rtol=1e-6)


def test_words_are_looked_at_as_much_as_their_pieces(explanation):
    words = explanation.joined()
    assert words.source_tokens == [*LINE.split(), "</s>"]
    assert words.decoder_tokens[0] == "<s>"
    for joined, pieces in zip(words.attentions(), explanation.attentions(), strict=True):
        shape = *pieces.weights.shape[:2], len(joined.queries), len(joined.keys)
        assert joined.weights.shape == shape
        np.testing.assert_allclose(joined.weights.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        words.token_log_probs.sum(), explanation.token_log_probs.sum(), rtol=1e-5
    )
    weights = np.array([[0.1, 0.2, 0.7], [0.5, 0.1, 0.4]], np.float32)
    joined = Alignment(["▁a", "b", "▁c"], ["▁x", "y"], weights).joined()
    assert joined.source_tokens == ["ab", "c"] and joined.target_tokens == ["xy"]
    assert joined.joined().source_tokens == joined.source_tokens
    np.testing.assert_allclose(joined.weights, [[0.45, 0.55]])


@pytest.mark.parametrize(
    ("line", "message"), [(" ", "nothing to explain"), ("red dogs " * 20, "more than the model's")]
)
def test_what_cannot_be_explained(translator, line, message):
    with pytest.raises(UserError, match=message):
        translator.explain(line)


# Attention costs nothing when nobody asks


@pytest.mark.parametrize("scan_layers", [False, True])
def test_weights_that_nobody_asks_for_cost_neither_work_nor_memory(monkeypatch, scan_layers):
    """When asked for, they come as one array for all layers, in training as in evaluation."""
    config = CONFIG.replace(scan_layers=scan_layers, decoder_layers=1, dropout=0.1 * scan_layers)
    model, params = Transformer(config), jax.tree.map(jnp.asarray, random_params(config))
    source, target = jnp.ones((2, 5), jnp.int32), jnp.ones((2, 7), jnp.int32)

    def loss(params, rng, **options):
        found = model.apply(
            {"params": params},
            *(source, target, target),
            deterministic=False,
            rngs={"dropout": rng},
            method="loss",
            **options,
        )
        return (found[0].loss, found[1]) if options else (found.loss, None)

    def program(**options):
        def step(params, rng):  # a new function is traced anew
            return jax.grad(lambda params: loss(params, rng, **options), has_aux=True)(params)

        return jax.jit(step).lower(params, jax.random.key(0)).as_text()

    unasked, asked = program(), program(mutable=["intermediates"])
    _, sown = jax.eval_shape(lambda: loss(params, jax.random.key(0), mutable=["intermediates"]))
    (cross,) = sown["intermediates"]["decoder"]["layers"]["cross_attention"]["attention_weights"]
    assert cross.shape == (config.decoder_layers, 2, config.num_heads, 7, 5)
    assert asked != unasked, "this compares nothing"
    monkeypatch.setattr(nn.Module, "sow", lambda *_: False)
    assert program() == unasked


# Pictures


def pixels_of(data):
    """Width, height and palette indices of a PNG."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, rest = {}, data[8:]
    while rest:
        (size,) = struct.unpack(">I", rest[:4])
        chunks[rest[4:8]] = rest[8 : 8 + size]
        assert struct.unpack(">I", rest[8 + size : 12 + size]) == (zlib.crc32(rest[4 : 8 + size]),)
        rest = rest[12 + size :]
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    colours = len(chunks[b"PLTE"]) // 3
    assert len(chunks[b"tRNS"]) == colours > rows.max() and not rows[:, 0].any()
    return rows[:, 1:]


def test_a_map_has_a_pixel_a_weight():
    weights = np.array([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]])
    pixels = pixels_of(png(shades(weights)))
    assert pixels.tolist() == [[31, 0, 0], [16, 27, 0]]


def test_what_is_masked_and_what_should_be_looks_different():
    weights = np.array([[1.0, 0.0, 0.0], [0.5, 0.4, 0.1], [0.0, np.nan, 0.0]])
    (_, masked, _), (_, _, ahead), (nothing, nan, _) = shades(weights, causal=True)
    assert len({masked, ahead, nothing}) == 3 and nan == ahead > masked > 31
    red, green, blue, opaque = heatmap._PALETTE[ahead]
    assert red > 2 * max(green, blue) and opaque == 255


def test_below_zero_is_orange_and_above_it_blue():
    ((above, below, nothing),) = signed_shades(np.array([[1.0, -1.0, 0.0]]))
    (red, _, blue, opaque), (other_red, _, other_blue, alike), (*_, clear) = (
        heatmap._PALETTE[index] for index in (above, below, nothing)
    )
    assert red < blue and other_red > other_blue
    assert opaque == alike == 255 and clear == 0


def image_of(address):
    return pixels_of(base64.b64decode(address.removeprefix("data:image/png;base64,")))


def test_rows_stand_below_each_other_and_columns_beside_each_other():
    rows, columns = ["r1", "a rather long label", "r3"], ["c1", "c2"]
    labels = re.findall(r'<text x="(.*?)" y="(.*?)".*?>(.*?)</text>', axes("n", rows, columns))
    *texts, c1, c2 = ((label, float(x), float(y)) for x, y, label in labels)
    assert [text for text, _, _ in texts[::2]] == ["r1", "r3"]
    assert texts[1][0].endswith("…") and rows[1].startswith(texts[1][0][:-1])
    assert texts[0][2] < texts[1][2] < texts[2][2] and len({x for _, x, _ in texts}) == 1
    assert (c1[0], c2[0], c1[2]) == ("c1", "c2", c2[2]) and c1[1] < c2[1]
    pixels = shades(np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]))
    drawn = heat_map("n", pixels, rows, columns, title="t", cell=10)
    ((width, height, address),) = re.findall(
        r'<image.*?width="(.*?)" height="(.*?)".*?href="(.*?)"', drawn
    )
    assert (width, height) == ("20", "30") and np.array_equal(image_of(address), pixels)
    assert 'aria-label="t"' in drawn


def test_the_legend_names_its_shades():
    (address,) = re.findall(r'href="(.*?)"', legend())
    values = [float(text) for text in re.findall(r"<text.*?>(.*?)</text>", legend())]
    np.testing.assert_array_equal(image_of(address), shades(np.array([values])))


def test_lines_join_the_words_that_look_at_each_other():
    """The source is above; the larger a weight, the thicker its line."""
    source, target = ["one", "much longer", "x"], ["a", "bb"]
    weights = np.array([[0.2, 0.75, 0.05], [0.0, 0.4, 0.6]])
    drawn = alignment_lines(Alignment(source, target, weights))
    texts = re.findall(r'<text x="(.*?)" y="(.*?)".*?>(.*?)</text>', drawn)
    at = {word: (x, int(y)) for x, y, word in texts}
    names = {x: word for x, _, word in texts}
    assert len(names) == 5, "words in each other's place"
    lines = re.findall(
        r'<line x1="(.*?)" y1="(.*?)" x2="(.*?)" y2="(.*?)" stroke-width="(.*?)"', drawn
    )
    found = {(names[x], names[to]): float(width) for x, _, to, _, width in lines}
    expected = [("one", "a"), ("much longer", "bb"), ("x", "bb"), ("much longer", "a")]
    assert sorted(found, key=found.get) == expected
    for _, top, _, bottom, _ in lines:
        assert max(at[word][1] for word in source) < int(top) < int(bottom)
        assert int(bottom) < min(at[word][1] for word in target)


def test_numbers_stand_to_the_right_and_lines_have_their_colours():
    assert '<td>x</td><td class="number">1</td>' in table(("a", "n"), [("x", 1)], numbers=[1])
    written = page("t", [])
    assert all(f"--line-{n}: {colour};" in written for n, colour in enumerate(COLOURS))


def test_a_page_is_complete_in_itself(explanation):
    class Reader(HTMLParser):
        open, texts, addresses = (), (), ()

        def handle_starttag(self, tag, attributes):
            names = dict(attributes)
            self.addresses += tuple(names[n] for n in ("href", "src") if n in names)
            if tag not in ("meta", "link"):
                self.open += (tag,)

        def handle_startendtag(self, tag, attributes):
            self.addresses += tuple(value for name, value in attributes if name == "href")

        def handle_endtag(self, tag):
            assert self.open[-1] == tag
            self.open = self.open[:-1]

        def handle_data(self, data):
            self.texts += (data,)

    reader = Reader()
    # The largest value, whatever it is, has full colour.
    encoding = 3 * explanation.positional_encoding
    explanation = dataclasses.replace(explanation, positional_encoding=encoding)
    written = inspection_page(explanation)
    reader.feed(written)
    assert reader.open == ()
    assert {address[:5] for address in reader.addresses} <= {"data:", "#axes", "#enco", "#mask"}
    assert "<script" not in written
    for hypothesis in explanation.hypotheses:
        assert hypothesis.text in reader.texts
        numbers = hypothesis.score, hypothesis.log_prob
        assert "".join(f'<td class="number">{number:.3f}</td>' for number in numbers) in written
    chances = re.findall("<small>(.*?)</small>", written)
    assert chances == [f"{chance:.2f}" for chance in np.exp(explanation.token_log_probs)]
    images = [a for a in reader.addresses if a.startswith("data:image/png;base64,")]
    # Alignment, legend, encoder, both attentions of the decoder, and positions.
    assert len(images) == 2 + 3 * (1 + 2 + 2) + 1
    pixels = image_of(images[-1])
    np.testing.assert_array_equal(pixels, signed_shades(encoding / np.abs(encoding).max()))
    masked = explanation.decoder_self_attention
    np.testing.assert_array_equal(image_of(images[2 + 3]), shades(masked[0, 0], causal=True))
    alignment = explanation.alignment
    labels = alignment.target_tokens, alignment.source_tokens
    assert axes("axes-alignment", *labels, cell=22) in written
    notes = [
        describe_head(map_, attention.keys, causal=attention.weights is masked)
        for attention in explanation.attentions()
        for map_ in attention.weights.reshape(-1, *attention.weights.shape[2:])
    ]
    bad = re.findall('<span class="bad">(.*?)</span>', written)
    assert 0 < len(bad) < len(notes) and bad == [note for note, failed in notes if failed]
    assert f"<title>Masked decoder self-attention, layer 2, head 3: {notes[3 + 5][0]}<" in written


def test_a_page_escapes_what_it_shows(explanation):
    written = inspection_page(dataclasses.replace(explanation, source="<b>&amp;"))
    assert "&lt;b&gt;&amp;amp;" in written and "<b>" not in written


def test_a_page_says_which_layer_the_alignment_is_from(explanation):
    names = "decoder_self_attention", "cross_attention"
    last = {name: getattr(explanation, name)[-1:] for name in names}
    alone = inspection_page(dataclasses.replace(explanation, **last))
    assert "each word: the last layer but one, its" in inspection_page(explanation)
    assert "each word: the only layer, its" in alone


def test_scripts_are_named():
    assert script_note("Büsche") == ""
    for text, name in (("집", "Hangul"), ("בית", "Hebrew"), ("घर", "Devanagari")):
        assert name in script_note(text)


EVEN = np.full((4, 4), 0.25)
COLUMN = np.tile([0.0, 0.0, 0.0, 1.0], (4, 1))


@pytest.mark.parametrize(
    ("weights", "causal", "note", "failed"),
    [
        (EVEN, False, "everywhere alike", True),
        (np.eye(4), False, "itself", False),
        (np.eye(4, k=-1), False, "the one before", False),
        (np.eye(4, k=1), False, "the one after", False),
        (COLUMN, False, "always “d”", False),
        (np.full((4, 4), np.nan), False, "not a number", True),
        (np.tril(EVEN), True, "everywhere alike", True),
        (EVEN, True, "looks ahead", True),
        (np.full((4, 2), 0.5), False, "everywhere alike", True),
        (np.ones((4, 1)), False, "one piece", False),
        (np.tile([0.9, 0.1, 0.0, 0.0], (4, 1))[:, ::-1], False, "always “d”", False),
        (np.array([[0.5, 0.5, 0.0]]), False, "about 2.0 pieces", False),
        (np.tile([0.5, 0.3, 0.1, 0.1], (4, 1)), False, "about 3.2 pieces", False),
        (0.7 * np.eye(4, k=-1) + 0.3 * COLUMN, False, "the one before", False),
    ],
)
def test_a_failing_head_is_named(weights, causal, note, failed):
    if note == "everywhere alike" and causal:
        weights = weights / weights.sum(axis=1, keepdims=True)
    assert describe_head(weights, list("abcd")[: weights.shape[1]], causal=causal) == (note, failed)


def test_pngs_name_letters_that_no_font_has(explanation, tmp_path, capsys, monkeypatch, drawn):
    from jaxformer.pages import pictures

    families, missing = fonts_for("a▁é")
    assert (families, missing) == (["DejaVu Sans"], "")
    monkeypatch.setattr(pictures, "_families", lambda: ["DejaVu Sans"])
    monkeypatch.setattr(pictures, "_letters", lambda _: frozenset(map(chr, range(0x24F))))
    pieces = ["▁집", *explanation.source_tokens[1:]]
    written = ["낱", *explanation.target_tokens[1:]]
    changed = dataclasses.replace(explanation, source_tokens=pieces, target_tokens=written)
    draw_explanation(changed, tmp_path)
    assert "no installed font has" in (warning := capsys.readouterr().err)
    assert "집" in warning and "낱" in warning
    names = [
        "alignment.png",
        *(f"{attention.slug}.png" for attention in changed.attentions()),
        "positional-encoding.png",
    ]
    assert sorted(names) == sorted(file.name for file in tmp_path.iterdir())
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    *maps, (positions, _) = (drawn[name].axes for name in names)
    for (image,) in (axis.images for figure in maps for axis in figure):
        assert (image.norm.vmin, image.norm.vmax) == (0, 1)  # one scale for all
    assert (positions.get_xlabel(), positions.get_ylabel()) == ("dimension", "position")


def test_a_long_sentence_makes_no_larger_picture(tmp_path):
    pytest.importorskip("matplotlib")
    weights = np.random.default_rng(0).random((2, 8, 300, 280), np.float32)
    pieces = [f"piece {n}" for n in range(300)]
    _draw_maps(tmp_path / "x.png", weights, pieces, pieces[:280])
    width, height = struct.unpack(">2I", (tmp_path / "x.png").read_bytes()[16:24])
    assert 5000 < width < 9000 and height < width / 2


def test_pictures_name_pieces_as_they_are(tmp_path):
    """Even those that matplotlib would take for a formula, or fail on."""
    matplotlib = pytest.importorskip("matplotlib")
    queries, keys = ["$$", "$5-$6", r"\$_$"], ["a", "$_$"]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        _draw_maps(tmp_path / "x.svg", np.full((2, 1, 3, 2), 0.5), queries, keys)
    texts = re.findall("<text[^>]*>(.*?)</text>", (tmp_path / "x.svg").read_text())
    labels = [*keys, *queries]
    assert texts == [*labels, "layer 1, head 1", *labels, "layer 2, head 1"]


def test_the_command(run, tmp_path, capsys, monkeypatch):
    from jaxformer.pages import inspection

    monkeypatch.setattr(inspection, "can_draw", lambda: False)
    output = tmp_path / "deep" / "inspection"
    arguments = ["inspect", str(run), LINE, "--output", str(output), "--words"]
    assert main([*arguments, "--beam-size=1", "--max-length-ratio=0", "--max-length-extra=1"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.split()) == 1 and "index.html; for PNGs too" in printed.err
    written = (output / "index.html").read_text(encoding="utf-8")
    assert re.search(rf"<h1>{LINE}</h1>", written)
    assert [path.name for path in output.iterdir()] == ["index.html"]


@pytest.mark.parametrize("words", [False, True])
def test_the_command_passes_on_what_it_is_given(explanation, tmp_path, monkeypatch, words):
    from jaxformer.pages import inspection

    asked = []

    class Recorder:
        def explain(self, line, *, seed, **options):
            asked.append((line, seed, options["beam_size"]))
            return explanation

    monkeypatch.setattr(Translator, "load", lambda *which: asked.append(which) or Recorder())
    monkeypatch.setattr(inspection, "can_draw", lambda: False)
    options = "--checkpoint=best", "--seed=7", "--beam-size=3", "--sampling"
    arguments = [*options, f"--output={tmp_path}", *["--words"] * words]
    assert main(["inspect", "RUN", LINE, *arguments]) == 0
    assert asked == [("RUN", "best"), (LINE, 7, 3)]
    shown = explanation.joined() if words else explanation
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == inspection_page(shown)


def test_one_line_says_what_is_wrong(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments, message in (
        (["inspect", str(tmp_path / "none"), "x"], "is not a directory"),
        (["inspect", str(run), ""], "nothing to explain"),
        (["inspect", str(run), "caf\udce9"], "SENTENCE is not UTF-8 at letter 4"),
        (["inspect", str(run), "x", "--beam-size", "0"], "--beam-size is 0"),
        (["inspect", str(run), "red", "--output", str(tmp_path / "file")], "cannot write"),
    ):
        assert main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
