"""The pages as a browser shows them: nothing overflows, everything can be read, nothing fails."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from jaxformer.pages.inspection import inspection_page
from jaxformer.results import Alignment, Explanation, Hypothesis
from recorded_run import write_recorded_run
from train import report
from train.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium to look at the pages with: apt-get install chromium"
)

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --virtual-time-budget=20000
--window-size=1400,900""".split()

# Runs in the page before anything else, and leaves its findings in the enclosing document.
SCRIPT = r"""
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message || "a resource failed"), true);
console.error = (...what) => errors.push(what.join(" "));

function channels(colour) {
  const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
  return {rgb: [r, g, b], alpha: a};
}
function luminance(rgb) {
  const [r, g, b] = rgb.map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
function background(element) {
  for (let e = element; e; e = e.parentElement) {
    const found = channels(getComputedStyle(e).backgroundColor);
    if (found.alpha === 1) return found.rgb;
  }
  return [255, 255, 255];
}
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(e => e.open = true);
  const found = {errors, faint: [], wide: [], broken: [], texts: 0, lines: 0};
  found.page = [document.documentElement.scrollWidth, innerWidth];
  found.paper = background(document.body);
  for (const e of document.querySelectorAll("body *")) {
    const style = getComputedStyle(e), svg = e.namespaceURI.endsWith("svg");
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    const box = e.getBoundingClientRect();
    if (own && box.width && e.tagName !== "title" && e.tagName !== "STYLE") {
      found.texts += 1;
      const ratio = contrast(channels(svg ? style.fill : style.color).rgb, background(e));
      if (ratio < 4.5) found.faint.push([e.textContent, ratio]);
    }
    if (e.tagName === "polyline" || (e.tagName === "rect" && style.fill !== "none")) {
      found.lines += 1;
      const colour = e.tagName === "rect" ? style.fill : style.stroke;
      const ratio = contrast(channels(colour).rgb, background(e));
      if (ratio < 3) found.faint.push([e.outerHTML.slice(0, 80), ratio]);
    }
    if (!e.closest(".scroll") && box.right > innerWidth + 0.5 && box.width)
      found.wide.push([e.tagName, e.className.baseVal ?? e.className, box.right]);
    if (e.tagName === "use" && !document.querySelector(e.getAttribute("href")))
      found.broken.push(e.outerHTML);
    if (svg && e.tagName === "svg" && !e.getAttribute("aria-label") && !e.ariaHidden)
      found.broken.push(e.outerHTML.slice(0, 80));
  }
  // Its ancestors in the page are not those of what <use> draws: a rule that names one misses it.
  for (const rule of document.styleSheets[0].cssRules)
    if (/\S\s+text\b/.test(rule.selectorText ?? "")) found.broken.push(rule.selectorText);
  found.fetched = performance.getEntriesByType("resource").map(e => e.name)
    .filter(name => !name.startsWith("data:"));
  const result = parent.document.createElement("pre");
  result.className = "found";
  result.id = window.name;
  result.textContent = JSON.stringify(found);
  parent.document.body.append(result);
});
</script>
"""


def explanation():
    """An explanation shaped like those of `Translator.explain`, long enough to be wide."""
    draw = np.random.default_rng(0)
    source = [*(f"▁word{number}" for number in range(24)), "<&>", "</s>"]
    target = [*(f"▁낱말{number}" for number in range(20)), "</s>"]

    def weights(*shape):
        values = draw.random(shape) ** 4
        return (values / values.sum(axis=-1, keepdims=True)).astype(np.float32)

    length = len(source), len(target)
    causal = np.tril(weights(2, 3, length[1], length[1]))
    causal /= causal.sum(axis=-1, keepdims=True)
    cross = weights(2, 3, length[1], length[0])
    cross[1, 1] = 1 / length[0]  # a head that attends to all alike
    return Explanation(
        source="A sentence of many words. " * 6,
        hypotheses=[Hypothesis("낱말이 많은 문장. " * 8, -1.0, -2.0, target[:-1], [], True)] * 2,
        source_tokens=source,
        target_tokens=target,
        decoder_tokens=["<s>", *target[:-1]],
        token_log_probs=-draw.random(length[1], np.float32),
        encoder_self_attention=weights(2, 3, length[0], length[0]),
        decoder_self_attention=causal,
        cross_attention=cross,
        alignment=Alignment(source, target, cross[0].mean(axis=0)),
        positional_encoding=draw.normal(size=(length[0], 16)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the browser found in each page, at two widths and in both colour schemes."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_recorded_run(folder / "one", reports=80), write_recorded_run(folder / "이름")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "can_draw", lambda: False)
        pages = {
            "inspection": inspection_page(explanation()),
            "words": inspection_page(explanation().joined()),
            "report": write_report(runs[:1], folder / "a").read_text(encoding="utf-8"),
            "comparison": write_report(runs, folder / "b").read_text(encoding="utf-8"),
        }
    frames = []
    for name, page in pages.items():
        assert page.count("@media (prefers-color-scheme: dark)") == 1
        for scheme in ("light", "dark"):
            media = "@media all" if scheme == "dark" else "@media not all"
            shown = page.replace("@media (prefers-color-scheme: dark)", media)
            shown = html.escape(shown.replace("<head>", f"<head>{SCRIPT}", 1))
            frames += [
                f'<iframe name="{name}-{scheme}-{width}" srcdoc="{shown}" '
                f'style="width:{width}px;height:800px;border:0"></iframe>'
                for width in (360, 1280)
            ]
    outer = folder / "frames.html"
    outer.write_text(f'<meta charset="utf-8"><body>{"".join(frames)}', encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, outer.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    results = re.findall(r'<pre class="found" id="(.*?)">(.*?)</pre>', done.stdout, re.DOTALL)
    found = {name: json.loads(html.unescape(text)) for name, text in results}
    assert len(found) == len(frames), done.stderr[-2000:]
    return found


def each(found, key):
    return {name: result[key] for name, result in found.items() if result[key]}


def test_nothing_fails_and_nothing_is_fetched(found):
    assert each(found, "errors") == {}
    assert each(found, "broken") == {}
    assert each(found, "fetched") == {}


def test_the_page_never_scrolls_sideways(found):
    assert each(found, "wide") == {}
    for name, result in found.items():
        width, window = result["page"]
        assert width <= window == int(name.rpartition("-")[2]), name


def test_everything_can_be_read_in_both_schemes(found):
    """WCAG 2 AA: contrast 4.5 for text, 3 for lines and areas, from the computed colours."""
    assert each(found, "faint") == {}
    assert all(result["texts"] > 50 for result in found.values())
    assert all(found[f"{name}-light-360"]["lines"] > 7 for name in ("report", "comparison"))
    assert found["report-light-360"]["paper"] != found["report-dark-360"]["paper"]
