"""The `jaxformer inspect` command: a page and pictures of how a model arrived at a translation."""

import argparse
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.arguments import add_search, generation_options
from jaxformer.compilation import keep_compiled_programs
from jaxformer.errors import UserError
from jaxformer.files import check_writable, write_text
from jaxformer.pages.heatmap import (
    alignment_lines,
    axes,
    describe_head,
    heat_map,
    legend,
    plain_map,
    shades,
    signed_shades,
)
from jaxformer.pages.page import page, script_note, scrolling, section, table
from jaxformer.pages.pictures import can_draw, draw_explanation, say_where
from jaxformer.results import Explanation, NamedAttention
from jaxformer.terminal import ShowDefaults, write_line
from jaxformer.translator import Translator

_READ = {
    "Encoder self-attention": "A row is a piece of the source, and shows what it looks at.",
    "Masked decoder self-attention": "A row is a piece that the decoder has read, and shows what "
    "it looks at; grey is what comes later, which it must not see.",
    "Encoder-decoder attention": "A row is a piece of the translation, and shows where in the "
    "source the decoder looked to write it.",
}


def inspection_page(explanation: Explanation) -> str:
    """Return the page about an explanation: one self-contained HTML file."""
    best = explanation.hypotheses[0]
    everything = explanation.source + "".join(h.text for h in explanation.hypotheses)
    body = [
        f'<h1>{escape(explanation.source)}</h1>\n<p class="lead">{escape(best.text)}</p>',
        script_note(everything),
        _translations(explanation),
        _alignment(explanation),
    ]
    body += map(_attention, explanation.attentions())
    body.append(_positions(explanation))
    return page(explanation.source, filter(None, body))


def write_inspection(explanation: Explanation, folder: Path, *, pictures: bool = True) -> Path:
    """Write index.html and, if asked, PNGs into `folder`; return the page's path.

    Raises:
      UserError: the folder cannot be written to, or matplotlib is not installed.
    """
    index = folder / "index.html"
    write_text(index, inspection_page(explanation))
    if pictures:
        draw_explanation(explanation, folder)
    return index


def _translations(explanation: Explanation) -> str:
    rows = [
        (number, hypothesis.text, f"{hypothesis.score:.3f}", f"{hypothesis.log_prob:.3f}")
        for number, hypothesis in enumerate(explanation.hypotheses, start=1)
    ]
    pieces = "".join(
        f"<span>{escape(token.replace('▁', '_'))} <small>{np.exp(log_prob):.2f}</small></span>"
        for token, log_prob in zip(
            explanation.target_tokens, explanation.token_log_probs, strict=True
        )
    )
    return section(
        "Translations",
        table(("", "translation", "score", "log-probability"), rows, numbers=(0, 2, 3)),
        '<p class="soft">The score is the log-probability over the length penalty, less the '
        "coverage penalty, if there are any. Below, the pieces of the first translation, each with "
        "its probability given those before it.</p>",
        f'<div class="pieces">{pieces}</div>',
    )


def _alignment(explanation: Explanation) -> str:
    alignment = explanation.alignment
    words = alignment.joined()
    links = ", ".join(
        f"{words.target_tokens[t]} ← {words.source_tokens[s]}" for s, t in alignment.word_links()
    )
    rows, columns = alignment.target_tokens, alignment.source_tokens
    layer = "the last layer but one" if len(explanation.cross_attention) > 1 else "the only layer"
    return section(
        "Which word is from which",
        f'<p class="soft">Where the decoder looked when it wrote each word: {layer}, its heads '
        "averaged.</p>",
        alignment_lines(words),
        f"<p>{escape(links)}</p>",
        axes("axes-alignment", rows, columns, cell=22),
        scrolling(
            heat_map(
                "axes-alignment",
                shades(alignment.weights),
                rows,
                columns,
                title="alignment of pieces",
                cell=22,
            )
        ),
        f'<p class="soft">{legend()}</p>',
    )


def _attention(attention: NamedAttention) -> str:
    name, weights, queries, keys, causal = attention
    anchor, cell = attention.slug, min(24, max(9, 160 // len(keys)))
    parts = [f'<p class="soft">{_READ[name]}</p>', axes(anchor, queries, keys, cell=cell)]
    for layer, heads in enumerate(weights, start=1):
        figures = []
        for head, map_ in enumerate(heads, start=1):
            note, failed = describe_head(map_, keys, causal=causal)
            title = f"{name}, layer {layer}, head {head}: {note}"
            pixels = shades(map_, causal=causal)
            drawn = heat_map(anchor, pixels, queries, keys, title=title, cell=cell)
            mark = f'<span class="bad">{escape(note)}</span>' if failed else escape(note)
            figures.append(f"<figure>{drawn}<figcaption>head {head}: {mark}</figcaption></figure>")
        parts.append(f"<h3>Layer {layer}</h3>")
        parts.append(f'<div class="flow">{"".join(figures)}</div>')
    return section(name, *parts)


def _positions(explanation: Explanation) -> str:
    encoding = explanation.positional_encoding
    largest = float(np.abs(encoding).max()) or 1.0
    positions, width = encoding.shape
    return section(
        "Positional encoding",
        f'<p class="soft">What is added to the embedding at positions 0 to {positions - 1}, from '
        f"top to bottom, in each of {width} dimensions, from left to right: blue above zero, "
        f"orange below, full at {largest:.2g}.</p>",
        plain_map(signed_shades(encoding / largest), "positional encoding", 720, 10 * positions),
    )


def add_inspect(commands: Any) -> None:
    """Add the command to the sub-parsers of `jaxformer`."""
    inspect = commands.add_parser(
        "inspect",
        help="see how a sentence was translated: attention, alignment, alternatives",
        description="Translate a sentence and write a page about it: the translations found with "
        "their scores, what every attention head looked at, which word comes from which, and "
        "the positional encoding. If matplotlib is installed, PNG files of the same lie beside it.",
        formatter_class=ShowDefaults,
    )
    inspect.add_argument("run", metavar="RUN", help="directory that training wrote")
    inspect.add_argument("sentence", metavar="SENTENCE", help="sentence to translate")
    inspect.add_argument(
        "--checkpoint",
        help="average, best, last or a step; by default the average, unless training went on after "
        "it; otherwise the best, otherwise the last",
    )
    inspect.add_argument(
        "--words", action="store_true", help="join the pieces of each word, for smaller maps"
    )
    inspect.add_argument(
        "--output", metavar="DIR", default="inspection", help="folder for index.html and PNGs"
    )
    add_search(inspect.add_argument_group("search"), sampling=True)
    inspect.set_defaults(command=_inspect, if_memory_ends="give a shorter sentence")


def _inspect(options: argparse.Namespace) -> None:
    search = generation_options(options)
    try:
        options.sentence.encode()
    except UnicodeEncodeError as error:  # the shell gave bytes that are not UTF-8
        raise UserError(
            f"SENTENCE is not UTF-8 at letter {error.start + 1}: correct it, or use a UTF-8 locale"
        ) from error
    check_writable(Path(options.output, "index.html"))
    keep_compiled_programs()
    translator = Translator.load(options.run, options.checkpoint)
    explanation = translator.explain(options.sentence, **search)
    write_line(explanation.hypotheses[0].text)
    drawing = can_draw()
    index = write_inspection(
        explanation.joined() if options.words else explanation,
        Path(options.output),
        pictures=drawing,
    )
    say_where(index, drawn=drawing)
