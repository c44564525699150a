"""A single-file page: no script, no font, no picture from elsewhere; light and dark."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

# In both schemes text has a contrast of at least 4.5 to its background, and lines one of 3 (WCAG 2
# AA); readers who cannot tell red from green can tell the colours of lines apart.
_LIGHT = """
  --paper: #fdfdfb; --panel: #f3f3ef; --ink: #1d2125; --soft: #565d64; --rule: #d8dad4;
  --link: #1a5fa8; --heat: #2f7fdd; --bad: #b3261e;
  LINES"""
_DARK = """
  --paper: #14171a; --panel: #1d2125; --ink: #e6e8e6; --soft: #a6adb3; --rule: #363c42;
  --link: #7db8f5; --heat: #2f7fdd; --bad: #ff8a80;
  --line-0: #6cb6ff; --line-1: #ff9d5c; --line-2: #3fcf9f; --line-3: #ee8fd3; --line-4: #e6c84f;
  --line-5: #b9c0c7;"""

#: The colours that lines are told apart by, on light paper.
COLOURS = ("#1f6fb5", "#b8480b", "#00795c", "#9c3f8c", "#846500", "#4a5058")

_STYLE = """
:root { color-scheme: light dark;LIGHT }
@media (prefers-color-scheme: dark) { :root {DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK KR",
    "Apple SD Gothic Neo", "Malgun Gothic", NanumGothic, "Hiragino Sans", "Microsoft YaHei",
    sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; font-weight: 600; margin: 1rem 0 .25rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 3rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; font-weight: 600; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.soft, figcaption, th, dt { color: var(--soft); }
.soft, figcaption { font-size: .875rem; }
.lead { font-size: 1.25rem; }
.bad { color: var(--bad); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
figure { margin: 0; }
.grid { display: grid; gap: 1.5rem 2rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
.grid figure > svg { width: 100%; max-width: 34rem; }
.flow { display: flex; flex-wrap: wrap; gap: 1.25rem 1.5rem; margin: .75rem 0; }
.flow figure { max-width: 100%; }
svg { display: block; max-width: 100%; height: auto; }
.scroll > svg { max-width: none; }
text { fill: var(--ink); font-family: inherit; } /* no ancestors: <use> draws outside of them */
text.soft { fill: var(--soft); }
svg image { image-rendering: pixelated; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--link); }
.key { display: inline-flex; align-items: center; gap: .35rem; margin-right: 1rem; }
.pieces { display: flex; flex-wrap: wrap; gap: .3rem .5rem; font-size: .875rem; margin: .5rem 0; }
.pieces span { background: var(--panel); border-radius: .2rem; padding: .1rem .35rem; }
.pieces small { color: var(--soft); font-variant-numeric: tabular-nums; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return a whole HTML document."""
    lines = " ".join(f"--line-{number}: {colour};" for number, colour in enumerate(COLOURS))
    style = _STYLE.replace("LIGHT", _LIGHT.replace("LINES", lines)).replace("DARK", _DARK)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it."""
    return "\n".join((f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"))


def details(summary: str, *parts: str) -> str:
    """A part that is hidden until the reader opens it."""
    return "\n".join((f"<details>\n<summary>{escape(summary)}</summary>", *parts, "</details>"))


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Iterable[int] = ()
) -> str:
    """A table that scrolls by itself where it is wider than the screen; cells are escaped.

    Args:
      header: names of the columns.
      rows: their cells.
      numbers: the columns to align to the right, counted from 0.
    """
    right = set(numbers)

    def cells(tag: str, values: Sequence[object]) -> str:
        kinds = [' class="number"' * (index in right) for index in range(len(values))]
        return "".join(
            f"<{tag}{kind}>{escape(str(value))}</{tag}>"
            for kind, value in zip(kinds, values, strict=True)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', header)}</tr></thead>\n" if any(header) else ""
    return scrolling(f"<table>\n{head}<tbody>\n{body}\n</tbody></table>")


def scrolling(content: str) -> str:
    """Content that scrolls on its own, also by keyboard, so that on a phone the page need not."""
    return f'<div class="scroll" tabindex="0">{content}</div>'


def text_width(text: str) -> float:
    """The approximate width of a text, in em: East Asian letters are about twice as wide."""
    widths = {"W": 1.0, "F": 1.0}
    return sum(
        0.0 if unicodedata.combining(letter) else widths.get(kind, 0.58)
        for letter, kind in ((letter, unicodedata.east_asian_width(letter)) for letter in text)
    )


def script_note(text: str) -> str:
    """Name the scripts of `text` that a device may have no font for; "" if there are none.

    The page uses the fonts of the device that shows it, and cannot ask which ones it has.
    """
    letters = {letter for letter in text if letter > "\u024f"}  # past the Latin ones
    names = {unicodedata.name(letter, "").split(" ")[0] for letter in letters}
    known = r"HANGUL|CJK|HIRAGANA|KATAKANA|ARABIC|HEBREW|DEVANAGARI|THAI|BENGALI|TAMIL|ETHIOPIC"
    scripts = sorted(name.title() for name in names if re.fullmatch(known, name))
    if not scripts:
        return ""
    return (
        f'<p class="soft">This page holds letters of {escape(", ".join(scripts))}: if they show as '
        "empty boxes, this device has no font for them (Debian: fonts-noto-cjk, fonts-noto).</p>"
    )
