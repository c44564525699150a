"""Attention as a picture inside a page: heat maps, and lines from word to word.

A map is an SVG that holds an image of one pixel per weight, so that a hundred of them stay small.
Its colour lets the page shine through: a weight of 0 is paper, light or dark.
"""

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float, UInt8

from jaxformer.pages.page import scrolling, text_width
from jaxformer.results import Alignment

# The palette: shades of --heat from clear to full, then grey for keys that a query may not look at,
# red for weights that should not occur, and shades of a second colour for negative values.
_SHADES = 32
_MASKED, _BAD = _SHADES, _SHADES + 1
_HEAT, _GREY, _RED, _ORANGE = (47, 127, 221), (128, 128, 128), (224, 49, 49), (214, 106, 20)
_ALPHA = [round(255 * shade / (_SHADES - 1)) for shade in range(_SHADES)]
_PALETTE = [
    *((*_HEAT, alpha) for alpha in _ALPHA),
    (*_GREY, 60),
    (*_RED, 255),
    *((*_ORANGE, alpha) for alpha in _ALPHA),
]

_LABEL = 11  # size of a label, in pixels
_LONGEST = 9.0  # em that a label may take


def png(pixels: UInt8[np.ndarray, "T S"]) -> bytes:
    """A PNG file of palette indices."""
    height, width = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    used = _PALETTE[: int(pixels.max(initial=0)) + 1]
    colours = bytes(value for *colour, _ in used for value in colour)
    rows = np.pad(pixels, ((0, 0), (1, 0)))  # each begins with its filter: 0, none
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", colours),
            chunk(b"tRNS", bytes(alpha for *_, alpha in used)),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )


def data_uri(pixels: UInt8[np.ndarray, "T S"]) -> str:
    """The same PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def shades(weights: Float[np.ndarray, "T S"], *, causal: bool = False) -> UInt8[np.ndarray, "T S"]:
    """Palette indices of weights from 0 to 1.

    The shade follows the square root, or a weight of 0.1 would hardly show. Above the diagonal of a
    `causal` map zeros are marked as masked and other weights as bad. Weights that are not finite
    are marked as bad, too.
    """
    finite = np.isfinite(weights)
    shade = np.sqrt(np.clip(np.where(finite, weights, 0.0), 0.0, 1.0)) * (_SHADES - 1)
    pixels = np.round(shade).astype(np.uint8)
    if causal:
        ahead = np.triu(np.ones(weights.shape, bool), 1)
        pixels[ahead] = np.where(weights[ahead] > 0, _BAD, _MASKED)
    pixels[~finite] = _BAD
    return pixels


def signed_shades(values: Float[np.ndarray, "T S"]) -> UInt8[np.ndarray, "T S"]:
    """Palette indices of values from -1 to 1: below 0 orange, above it blue."""
    shade = np.round(np.abs(np.clip(values, -1.0, 1.0)) * (_SHADES - 1)).astype(np.uint8)
    return np.where(values < 0, shade + _BAD + 1, shade).astype(np.uint8)


def describe_head(
    weights: Float[np.ndarray, "T S"], keys: Sequence[str], *, causal: bool = False
) -> tuple[str, bool]:
    """What a head does, in a few words, and whether it has failed.

    Args:
      weights: of its T queries, one row each.
      keys: the S pieces it can look at.
      causal: whether it may only look back.
    """
    if not np.all(np.isfinite(weights)):
        return "not a number", True
    if causal and np.any(np.triu(weights, 1) > 0):
        return "looks ahead", True
    queries = np.arange(len(weights))
    allowed = np.minimum(queries + 1, len(keys)) if causal else np.full(len(queries), len(keys))
    logs = np.log(np.where(weights > 0, weights, 1.0))
    entropy = -np.sum(weights * logs, axis=1)
    choice = allowed > 1  # a query that can look at only one key says nothing
    if not np.any(choice):
        return "one piece", False
    if np.mean(entropy[choice] / np.log(allowed[choice])) > 0.98:
        return "everywhere alike", True
    if len(weights) == len(keys):
        for offset, name in ((0, "itself"), (-1, "the one before"), (1, "the one after")):
            if np.trace(weights, offset) > 0.6 * (len(keys) - abs(offset)):
                return name, False
    most = int(np.argmax(np.mean(weights[choice], axis=0)))
    if np.mean(weights[choice, most]) > 0.8:
        return f"always “{_short(keys[most])}”", False
    return f"about {np.exp(np.mean(entropy[choice])):.1f} pieces", False


def axes(name: str, rows: Sequence[str], columns: Sequence[str], *, cell: int = 14) -> str:
    """The labels of all maps of one kind, drawn once and used by each."""
    left, top, *_ = _margins(rows, columns)
    texts = [
        f'<text x="{left - 4}" y="{top + cell * (index + 0.5) + 4:.0f}" text-anchor="end">'
        f"{escape(_short(label))}</text>"
        for index, label in enumerate(rows)
    ]
    for index, label in enumerate(columns):
        x, y = left + cell * (index + 0.5) + 3, top - 5
        texts.append(
            f'<text x="{x:.0f}" y="{y}" transform="rotate(-60 {x:.0f} {y})">'
            f"{escape(_short(label))}</text>"
        )
    return (
        '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
        f'<g id="{name}" font-size="{_LABEL}">{"".join(texts)}</g></defs></svg>'
    )


def heat_map(
    name: str,
    pixels: UInt8[np.ndarray, "T S"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    cell: int = 14,
) -> str:
    """A map with the labels that `axes` has drawn under this name for the same rows and columns.

    Args:
      name: as given to `axes`.
      pixels: as `shades` makes them, queries from top to bottom.
      rows, columns: labels of queries and keys.
      title: what the map shows, for those who cannot see it.
      cell: the width and height of a weight, in pixels.
    """
    left, top, right = _margins(rows, columns)
    width, height = cell * len(columns), cell * len(rows)
    return (
        f'<svg role="img" aria-label="{escape(title)}" width="{left + width + right}" '
        f'height="{top + height + 1}" viewBox="0 0 {left + width + right} {top + height + 1}">'
        f"<title>{escape(title)}</title>"
        f'<rect x="{left - 0.5}" y="{top - 0.5}" width="{width + 1}" height="{height + 1}" '
        'fill="none" stroke="var(--rule)"/>'
        f'<image x="{left}" y="{top}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none" href="{data_uri(pixels)}"/><use href="#{name}"/></svg>'
    )


def plain_map(pixels: UInt8[np.ndarray, "T S"], title: str, width: int, height: int) -> str:
    """A map of the given size, without labels."""
    return (
        f'<svg role="img" aria-label="{escape(title)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><title>{escape(title)}</title>'
        f'<image width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="{data_uri(pixels)}"/></svg>'
    )


def legend() -> str:
    """A scale that says what the shades mean."""
    values = [0.0, 0.05, 0.1, 0.25, 0.5, 1.0]
    pixels = shades(np.array([values]))
    texts = "".join(
        f'<text class="soft" x="{40 * index + 20}" y="30" text-anchor="middle">{value:g}</text>'
        for index, value in enumerate(values)
    )
    return (
        '<svg role="img" aria-label="shades from a weight of 0, clear, to 1, full" width="240" '
        f'height="34" viewBox="0 0 240 34" font-size="{_LABEL}">'
        '<rect x=".5" y=".5" width="239" height="15" fill="none" stroke="var(--rule)"/>'
        '<image x="0" y="0" width="240" height="16" preserveAspectRatio="none" '
        f'href="{data_uri(pixels)}"/>{texts}</svg>'
    )


def alignment_lines(alignment: Alignment) -> str:
    """The source above, the translation below, and a line wherever one word looked at another."""
    size, gap, height = 16, 14, 150
    rows = []
    for words in (alignment.source_tokens, alignment.target_tokens):
        widths = [size * max(text_width(word), 0.6) for word in words]
        starts = np.cumsum([0.0, *(width + gap for width in widths)])
        rows.append(([s + w / 2 for s, w in zip(starts, widths, strict=False)], starts[-1] - gap))
    width = max(end for _, end in rows)
    shifts = [(width - end) / 2 for _, end in rows]
    (source, target) = (
        [x + shift for x in centres] for (centres, _), shift in zip(rows, shifts, strict=True)
    )
    lines = [
        f'<line x1="{source[s]:.1f}" y1="28" x2="{target[t]:.1f}" y2="{height - 28}" '
        f'stroke-width="{0.5 + 3.5 * weight:.1f}" stroke-opacity="{weight:.2f}"/>'
        for t, row in enumerate(alignment.weights)
        for s, weight in enumerate(row)
        if weight >= 0.08
    ]
    texts = [
        f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(word)}</text>'
        for centres, words, y in (
            (source, alignment.source_tokens, 18),
            (target, alignment.target_tokens, height - 8),
        )
        for x, word in zip(centres, words, strict=True)
    ]
    return scrolling(
        '<svg role="img" aria-label="word alignment" '
        f'width="{width + 20:.0f}" height="{height}" viewBox="-10 0 {width + 20:.0f} {height}" '
        f'font-size="{size}"><g stroke="var(--heat)">{"".join(lines)}</g>{"".join(texts)}</svg>'
    )


def _short(label: str) -> str:
    label = label.replace("▁", "_") or "_"  # the thick "▁" hides what it marks
    if text_width(label) <= _LONGEST:
        return label
    while text_width(label) > _LONGEST - 1:
        label = label[:-1]
    return label + "…"


def _margins(rows: Sequence[str], columns: Sequence[str]) -> tuple[int, int, int]:
    """Pixels to the left of a map, above it and to the right, for its labels."""
    widest, tallest = (
        max((text_width(_short(label)) for label in labels), default=0.0) * _LABEL
        for labels in (rows, columns)
    )
    # Labels of columns lean by 60 degrees.
    return round(widest) + 8, round(0.87 * tallest) + 12, round(0.5 * tallest) + 4
