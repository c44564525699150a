"""The same heat maps as PNG files, drawn with matplotlib."""

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.errors import UserError
from jaxformer.files import check_writable, write_bytes
from jaxformer.results import Explanation
from jaxformer.terminal import say, warn

# The longest side, in inches: 8,000 pixels, which every viewer can show.
_LARGEST = 72.0


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_picture(path: str | Path) -> None:
    """Raise `UserError` if `picture` cannot write this file; change nothing."""
    if not can_draw():
        raise UserError("no picture without matplotlib: pip install matplotlib")
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"cannot draw {path}: its name must end in .png, .svg or .pdf")
    check_writable(path)


def say_where(index: Path, *, drawn: bool) -> None:
    """Say on standard error where a page was written, and what PNGs beside it need."""
    without = "" if drawn else "; for PNGs too: pip install matplotlib"
    say(f"wrote {index}{without}")


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, text: str = "") -> Iterator[Any]:
    """Yield a matplotlib figure to draw on, and write it to a file at the end of the block.

    Args:
      path: the file to write.
      width, height: in inches.
      text: letters to be drawn, to choose fonts by.

    Raises:
      UserError: matplotlib is not installed, or the file cannot be written.
    """
    check_picture(path)
    from matplotlib import rc_context, set_loglevel
    from matplotlib.figure import Figure

    set_loglevel("ERROR")  # it warns about fonts that it then finds
    with rc_context({"font.family": fonts_for(text)[0], "font.size": 8}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=110, format=path.suffix[1:])
        write_bytes(path, drawn.getvalue())


def fonts_for(text: str) -> tuple[list[str], str]:
    """Installed fonts that together have the letters of `text`, and the letters that none has.

    Matplotlib takes each letter from the first font that has it.
    """
    families = ["DejaVu Sans"]
    missing = {letter for letter in text if letter.isprintable()} - _letters("DejaVu Sans")
    for family in _families() if missing else ():
        if found := missing & _letters(family):
            families.append(family)
            missing -= found
        if not missing:
            break
    return families, "".join(sorted(missing))


@cache
def _families() -> list[str]:
    """The installed families, plain ones before fancy ones."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    # Matplotlib caches a list of fonts, which lacks those that were installed after it was made.
    for file in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:
        with contextlib.suppress(Exception):  # it cannot read some font files
            fontManager.addfont(file)
    names = {
        font.name
        for font in fontManager.ttflist
        # The last resort has every letter, as a box.
        if font.style == "normal" and not font.name.startswith("Last Resort")
    }

    def fancy(name: str) -> tuple[bool, bool, str]:
        return "Noto Sans" not in name, not re.search(r"Sans|Gothic", name), name

    return sorted(names, key=fancy)


@cache
def _letters(family: str) -> frozenset[str]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    # The one of a family's files that is drawn with: light or condensed ones have fewer letters.
    return frozenset(map(chr, get_font(findfont(FontProperties(family=family))).get_charmap()))


def literal(label: str) -> str:
    """Escape a label so that matplotlib draws it as is: text between two $ would be a formula."""
    return label.replace("$", r"\$")


def draw_explanation(explanation: Explanation, folder: Path) -> None:
    """Write the alignment, the three attentions and the positional encoding, one PNG each.

    Letters that no installed font has are drawn as "?", and a line on standard error names them.

    Raises:
      UserError: matplotlib is not installed, or a file cannot be written.
    """
    text = "".join(explanation.source_tokens + explanation.decoder_tokens)
    _, missing = fonts_for(text + "".join(explanation.target_tokens))
    if missing:
        warn(
            f"no installed font has {missing}: PNGs show ? instead; install one "
            "(Debian: fonts-noto-cjk, fonts-noto)"
        )
    gone = dict.fromkeys(map(ord, missing), "?")

    def shown(labels: Sequence[str]) -> list[str]:
        return [label.translate(gone) or "▁" for label in labels]

    alignment = explanation.alignment
    _draw_maps(
        folder / "alignment.png",
        alignment.weights[None, None],
        shown(alignment.target_tokens),
        shown(alignment.source_tokens),
        cell=0.28,
    )
    for attention in explanation.attentions():
        _draw_maps(
            folder / f"{attention.slug}.png",
            attention.weights,
            shown(attention.queries),
            shown(attention.keys),
            causal=attention.causal,
        )
    encoding = explanation.positional_encoding
    with picture(folder / "positional-encoding.png", 7.0, 2.0 + 0.05 * len(encoding)) as figure:
        axis = figure.subplots()
        image = axis.imshow(encoding, cmap="RdBu", aspect="auto", interpolation="none")
        axis.set(xlabel="dimension", ylabel="position")
        figure.colorbar(image)


def _draw_maps(
    path: Path,
    weights: np.ndarray,
    queries: list[str],
    keys: list[str],
    *,
    cell: float = 0.16,
    causal: bool = False,
) -> None:
    """A row of maps per layer of [L, N, T, S], `cell` inches per weight or as many as fit."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    # Grey where a causal map is masked: 0 and above the diagonal.
    colours = colormaps["Blues"].with_extremes(bad="0.88")
    ahead = np.triu(np.ones(weights.shape[2:], bool), 1) & causal
    weights = np.ma.masked_where(ahead & (weights == 0), weights)
    layers, heads, rows, columns = weights.shape
    cell = min(cell, (_LARGEST / heads - 0.9) / columns, (_LARGEST / layers - 0.9) / rows)
    named = cell >= 0.08  # or labels would overlap
    width = heads * (max(1.0, cell * columns) + 0.9)
    height = layers * (max(1.0, cell * rows) + 0.9)
    with picture(path, width, height, "".join(queries + keys)) as figure:
        queries, keys = (list(map(literal, labels)) for labels in (queries, keys))
        grid = figure.subplots(layers, heads, squeeze=False)
        for (layer, head), axis in np.ndenumerate(grid):
            axis.imshow(
                weights[layer, head], cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="none"
            )
            axis.set_xticks([])
            axis.set_yticks([])
            if named:
                axis.set_xticks(
                    range(columns), keys, rotation=60, ha="right", rotation_mode="anchor"
                )
                axis.set_yticks(range(rows), queries)
            axis.tick_params(length=0)
            if weights.shape[:2] != (1, 1):
                axis.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
