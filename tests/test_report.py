"""`python -m train report`: what it shows, and how it says that something is missing."""

import itertools
import json
import re
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxformer.errors import UserError
from jaxformer.pages.page import COLOURS
from random_run import CONFIG, random_params
from recorded_run import (
    COMPILE_SECONDS,
    EVALUATE_SECONDS,
    SAVE_SECONDS,
    SIGNATURE,
    STEP_SECONDS,
    write_recorded_run,
)
from small_run import trained_run
from train import report
from train.cli import main
from train.curves import Chart, Line, png, short, svg, thin, ticks
from train.history import PARTS, History
from train.progress import duration
from train.report import parameter_counts, report_after_training, short_names, write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_recorded_run(tmp_path_factory.mktemp("recorded") / "first")


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(report, "can_draw", lambda: False)


def page_of(tmp_path, *runs):
    return write_report(runs, tmp_path / "report").read_text(encoding="utf-8")


def figures(page):
    """Chart titles and what follows each."""
    found = re.findall(r"<figure><h3>(.*?)</h3>(.*?)</figure>", page, re.DOTALL)
    return dict(found)


def rows_of(page, title):
    """Cells of the rows of the table under a heading."""
    body = page.partition(f"<h2>{title}</h2>")[2].partition("<tbody>")[2].partition("</tbody>")[0]
    return [re.findall("<td.*?>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_all_that_is_promised_is_on_the_page(run, tmp_path, no_pictures):
    page = page_of(tmp_path, run)
    charts = figures(page)
    assert len(charts) == 7 and all("<polyline" in chart for chart in charts.values())
    assert "warm-up ends" in charts["Learning rate"]
    for expected in (
        SIGNATURE,
        "2,000 steps in",
        "optimizer.peak_learning_rate",
        "jax 0.12.0",
        "1 x cpu",
        "encoder, 1 x self attention",
        f"BLEU {SIGNATURE}; chrF2 nc:6",
    ):
        assert expected in page
    *_, validation, test = records_of(run)
    trained = "first", f"2,000 steps in {duration(test['time'])}"
    scores = "40.00", "60.00", "10.0%"
    assert rows_of(page, "Results") == [
        [*trained, "validation, step 2,000", f"{validation['perplexity']:.2f}", *scores],
        [*trained, "test, at the end", "", *scores],
    ]
    (machine,) = rows_of(page, "Machine")
    assert machine[:3] == ["first", "0", "1 x cpu"]
    *shares, _ = (share for *_, share in rows_of(page, "Parameters"))
    assert sum(float(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=1)
    # Nothing is loaded from elsewhere, and no script runs.
    assert not re.search(r"<script|https?://|@import", page)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["index.html"]


@pytest.mark.parametrize(("metric", "best"), [("bleu", 1_000), ("loss", 2_000)])
def test_the_best_is_by_the_metric_of_the_run_and_the_last_end_counts(tmp_path, metric, best):
    run = write_recorded_run(tmp_path / "run", evaluate__metric=metric)
    records = records_of(run)
    (early,) = (r for r in records if (r["split"], r["step"]) == ("validation", 1_000))
    early["bleu"] = 50.0  # the loss falls to the end
    records.append(records[-1] | {"bleu": 41.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    rows = rows_of(report._results([History(run)]), "Results")
    score = "50.00" if metric == "bleu" else "40.00"
    assert [(row[2], row[4]) for row in rows] == [
        (f"validation, step {best:,}", score),
        ("test, at the end", "41.50"),
    ]


def test_data_that_is_gone_is_said_in_one_line(run, tmp_path, no_pictures):
    (line,) = re.findall(r"No sentences: .*", page_of(tmp_path, run))
    assert "nowhere" in line


def test_records_of_older_versions(tmp_path, no_pictures):
    old = write_recorded_run(tmp_path / "old", old=True)
    page = page_of(tmp_path, old)
    assert len(figures(page)) == 7
    assert re.search(r"Machine</h2>\s*<p[^>]*>not recorded", page)
    assert "padding" not in figures(page)["Waste, %"]


def test_runs_are_laid_over_each_other_and_their_configurations_compared(
    run, tmp_path, no_pictures, monkeypatch
):
    other = write_recorded_run(tmp_path / "second", optimizer__peak_learning_rate=0.5)
    monkeypatch.chdir(tmp_path)  # the page of several runs goes here, not into a run
    write_report([run, other])
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    loss = figures(page)["Loss, label-smoothed, nats a token"]
    assert loss.count("<polyline") == 4
    for label in ("first training", "first validation", "second training", "second validation"):
        assert label in loss
    differing = page.partition("What differs:")[2].partition("<details>")[0]
    names = re.findall(r"<tr><td>(.*?)</td>", differing)
    assert names == ["run", "data.path", "data.cache_dir", "optimizer.peak_learning_rate"]


def test_curves_show_what_their_names_say(run, tmp_path):
    """One run: a colour per curve; several: a colour per run. The second curve is dashed."""

    def looks(chart):
        return [(line.colour, line.dashed) for line in chart.lines]

    alone = report._charts([History(run)])
    assert looks(alone["waste"]) == looks(alone["loss"]) == [(0, False), (1, True)]
    padding, waiting = alone["waste"].lines
    assert np.allclose(padding.values, 4.0) and np.allclose(waiting.values, 1.0)
    assert alone["learning-rate"].marks == {"warm-up ends": 20}
    assert "in a line again" not in alone["learning-rate"].note

    changes = {"optimizer__warmup_steps": 30, "optimizer__cooldown_steps": 5}
    other = History(write_recorded_run(tmp_path / "other", reports=4, **changes))
    both = report._charts([History(run), other])
    assert looks(both["loss"]) == [(0, False), (0, True), (1, False), (1, True)]
    assert not both["learning-rate"].marks and "in a line again" in both["learning-rate"].note


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [tmp_path / name for name in ("a/run", "b/x/run", "c/x/run", "d/other")]
    assert short_names(runs) == ["a/run", "b/x/run", "c/x/run", "other"]
    assert short_names([runs[0], runs[0]]) == ["run", "run"]


def test_an_end_that_training_went_beyond_is_called_by_its_step(tmp_path, no_pictures):
    run = write_recorded_run(tmp_path / "run")
    assert "test, at the end" in page_of(tmp_path, run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    *_, last, _, _ = map(json.loads, lines)
    more = last | {"step": last["step"] + 50, "time": json.loads(lines[-1])["time"] + 9}
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(more), ""]))
    page = page_of(tmp_path, run)
    assert f"test, after step {last['step']:,}" in page and "at the end" not in page


def test_where_the_time_went(run):
    parts = History(run).time_split
    expected = {
        "compile": COMPILE_SECONDS,
        "steps": 40 * 50 * STEP_SECONDS,
        "evaluate": 4 * EVALUATE_SECONDS + 3.0 + SAVE_SECONDS,  # the last is scored, not trained on
        "save": 3 * SAVE_SECONDS,
        "other": 1.0,
    }
    assert parts == pytest.approx(expected)


def test_bars_of_time_stand_side_by_side(run, tmp_path):
    """Those of the longest run fill the width; those of another are in proportion to it."""
    histories = [History(run), History(write_recorded_run(tmp_path / "short", reports=20))]
    drawn = report._time(histories)
    bars = re.findall(r'<rect x="(.*?)" y="(.*?)" width="(.*?)"', drawn)
    x, y, width = np.array(bars, float).reshape(2, len(PARTS), 3).transpose(2, 0, 1)
    totals = [sum(history.time_split.values()) for history in histories]
    np.testing.assert_allclose(x, np.cumsum(width, axis=1) - width, atol=0.3)
    np.testing.assert_allclose(width.sum(axis=1), [720, 720 * totals[1] / totals[0]], atol=0.3)
    assert len(set(y[0])) == len(set(y[1])) == 1 and y[0, 0] < y[1, 0]
    tips = np.array(re.findall(r", (\d+)%</title>", drawn), int).reshape(2, len(PARTS))
    for row, shares, total in zip(rows_of(drawn, "Time"), tips, totals, strict=True):
        assert [*map(int, re.findall(r"\((\d+)%\)", "".join(row)))] == shares.tolist()
        assert abs(sum(shares) - 100) < len(PARTS) and row[-1] == duration(total)


def test_what_replaced_a_record_is_drawn_in_its_place(tmp_path):
    """In the file it comes last."""
    run = write_recorded_run(tmp_path / "run", reports=4)
    first, begun, replaced, *others = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([first, begun, *others, replaced, ""]))
    steps, losses = History(run).series("train", "loss")
    assert steps.tolist() == [1, 50, 100, 150, 200]
    np.testing.assert_allclose(losses, 2.0 + 6.0 / np.sqrt(steps))


def test_the_best_and_the_worst_sentences(tmp_path_factory, tmp_path):
    pytest.importorskip("matplotlib")
    run = trained_run(tmp_path_factory)
    page = page_of(tmp_path, run)
    shown = re.findall(r"<h3>(worst|best) (\d): chrF2 ([\d.]+)</h3>", page)
    assert [name for name, _, _ in shown] == ["worst"] * 4 + ["best"] * 4
    scores = [float(score) for _, _, score in shown]
    assert scores[:4] == sorted(scores[:4]) and scores[4:] == sorted(scores[4:], reverse=True)
    assert max(scores[:4]) <= min(scores[4:])
    sources = (run.parent / "valid.en").read_text().splitlines()
    references = (run.parent / "valid.de").read_text().splitlines()
    for name, value in re.findall(r"<tr><td>(source|reference)</td><td>(.*?)</td>", page):
        assert value in (sources if name == "source" else references)
    assert page.count('aria-label="word alignment"') == 8
    assert "padding" in figures(page)["Waste, %"] and f"jax {jax.__version__}" in page
    pictures = sorted((tmp_path / "report").glob("*.png"))
    assert len(pictures) == 7
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_parameters_are_counted_without_making_any():
    counts = parameter_counts(CONFIG)
    assert sum(counts.values()) == sum(x.size for x in jax.tree.leaves(random_params(CONFIG)))
    feed_forward = CONFIG.encoder_layers * 2 * CONFIG.d_model * CONFIG.d_ff
    assert counts["encoder, 1 x feed forward"] >= feed_forward


# Large files


def large_run(run, reports):
    """A run of ten hours and a million steps."""
    write_recorded_run(run, reports=4)
    template = json.loads((run / "metrics.jsonl").read_text().splitlines()[2])
    steps = np.linspace(1, 1_000_000, reports).astype(int).tolist()
    noise = np.random.default_rng(0).normal(size=reports).tolist()
    with (run / "metrics.jsonl").open("w") as file:
        template |= {"loss": "LOSS", "step": "STEP", "time": "TIME"}
        line = json.dumps(template) + "\n"
        for step, value in zip(steps, noise, strict=True):
            values = ('"LOSS"', f"{3 + value:.6f}"), ('"STEP"', str(step))
            record = line
            for name, number in (*values, ('"TIME"', f"{0.036 * step:.3f}")):
                record = record.replace(name, number)
            file.write(record)
    return run


@pytest.mark.parametrize("reports", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_ten_hours_and_a_million_steps(tmp_path, no_pictures, reports):
    run = large_run(tmp_path / "long", reports)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        page = page_of(tmp_path, run)
    finally:
        sys.setprofile(None)
    assert calls < 750_000, "Python does something for each of a million records"
    assert len(page) < 2_000_000
    assert f"{reports:,} records: of each pixel column" in page


@hypothesis.given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 20))
def test_thinning_keeps_the_extremes_of_every_column(values, columns):
    values = np.array(values)
    steps = np.cumsum(np.abs(values) % 7 + 1)
    x, y = thin(steps, values, columns)
    assert len(x) <= max(4 * columns, len(values) if len(values) <= 4 * columns else 0)
    assert set(zip(x, y, strict=True)) <= set(zip(steps, values, strict=True))
    assert (x[0], x[-1]) == (steps[0], steps[-1])
    if len(x) < len(values):
        edges = steps[0] + (steps[-1] - steps[0]) * np.arange(columns + 1) / columns
        for low, high in itertools.pairwise(edges):
            inside = values[(steps > low + 1e-6) & (steps < high - 1e-6)]
            kept = y[(x >= low - 1e-6) & (x <= high + 1e-6)]
            if len(inside):
                assert kept.min() <= inside.min() and kept.max() >= inside.max()


@hypothesis.given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low, span):
    high = low + span
    hypothesis.assume(high - low > 1e-9 * max(abs(low), abs(high)))
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert low - 1e-6 * span <= found[0] and found[-1] <= high + 1e-6 * span


@hypothesis.given(st.floats(1e-6, 1e6), st.floats(1.2, 1e9))
@hypothesis.example(1.0, 1e9)
def test_ticks_of_a_logarithmic_axis(low, ratio):
    found = ticks(low, low * ratio, log=True)
    assert 1 <= len(found) <= 8
    assert found == sorted(found) and min(found) > 0
    if ratio > 1e3:  # the end is no farther from the last tick than ticks are apart
        assert low * ratio / found[-1] < 1.001 * found[1] / found[0]


def test_numbers_of_an_axis():
    values = (0, 20_000, 1_500_000, 0.05, 3e-4, -2, 2.5e9)
    assert [short(v) for v in values] == ["0", "20k", "1.5M", "0.05", "3e-4", "-2", "2.5G"]


STEPS = np.array([100.0, 150.0, 200.0])
#: The first curve is straight on a logarithmic scale; the mark is at its middle.
CHART = Chart(
    "t",
    [
        Line("_old", STEPS, np.array([1.25, 12.5, 125.0]), 1, dashed=True),
        Line("$5-$6", STEPS, np.array([1.0, 30.0, 1000.0])),
        Line("$$", STEPS, np.array([2.0, 2.0, 2.0]), 2),
    ],
    log=True,
    marks={"m": 150.0},
)


def test_a_chart_is_drawn_to_scale():
    drawn = svg(CHART)
    points = [text.replace(",", " ").split() for text in re.findall(r'points="(.*?)"', drawn)]
    first, second, _ = everything = np.array(points, float).reshape(3, 3, 2)
    np.testing.assert_allclose(first[1], (first[0] + first[2]) / 2, atol=0.11)
    assert np.all(np.diff(first[:, 0]) > 0) and np.all(np.diff(first[:, 1]) < 0)
    np.testing.assert_array_equal(first[:, 0], second[:, 0])
    assert second[0, 1] > first[0, 1] > first[2, 1] > second[2, 1]
    width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0])
    assert np.all(everything > 0) and np.all(everything < [width, height])
    (mark,) = re.findall(r'<path d="M([\d.]+) \d+V', drawn)
    assert float(mark) == first[1, 0]
    assert "<title>_old, step 150: 12.5</title>" in drawn
    for shape in ("<polyline.*?/>", '<span class="key">.*?</span>'):
        shapes = re.findall(shape, drawn)
        assert [re.findall(r"--line-(\d)", shape) for shape in shapes] == [["1"], ["0"], ["2"]]
        assert ["stroke-dasharray" in shape for shape in shapes] == [True, False, False]


def test_a_single_point_and_no_point_are_drawn():
    one = Line("a <b>", np.array([5.0]), np.array([2.0]))
    assert "<circle" in svg(Chart("t", [one])) and "a &lt;b&gt;" in svg(Chart("t", [one]))
    none = Line("a", np.array([]), np.array([]))
    assert "not recorded" in svg(Chart("t", [none]))
    assert "not recorded" in svg(Chart("t", [Line("a", one.steps, -one.values)], log=True))


def test_a_picture_shows_the_same(tmp_path, drawn):
    """With names that matplotlib would leave out, or take for a formula."""
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        png(CHART, tmp_path / "x.svg")
    texts = re.findall("<text[^>]*>(.*?)</text>", (tmp_path / "x.svg").read_text())
    assert texts[-3:] == [line.label for line in CHART.lines]
    (axis,) = drawn["x.svg"].axes
    *lines, mark = axis.lines
    assert axis.get_yscale() == "log" and set(mark.get_xdata()) == {150.0}
    assert [line.get_color() for line in lines] == [COLOURS[1], COLOURS[0], COLOURS[2]]
    assert [line.get_linestyle() for line in lines] == ["--", "-", "-"]


# What cannot be reported


def test_one_clear_line(run, tmp_path, capsys):
    def broken(name, text):
        path = write_recorded_run(tmp_path / name, reports=4)
        if text is None:
            (path / "metrics.jsonl").unlink()
        else:
            (path / "metrics.jsonl").write_text(text)
        return path

    good = (run / "metrics.jsonl").read_text().splitlines()
    cases = (
        (tmp_path / "none", "is not a directory"),
        (broken("missing", None), "train the run first"),
        (broken("empty", ""), "is empty: nothing has been trained yet"),
        (broken("torn", good[1][:30]), "is empty"),
        (broken("damaged", f"{good[1]}\n<<<<\n"), "metrics.jsonl:2 is not JSON"),
        (broken("started", f"{good[0]}\n"), "no training record yet"),
        (broken("other", '{"a": 1}\n'), "has no split, step, time"),
    )
    for path, message in cases:
        assert main(["report", str(path), "--output", str(tmp_path / "out")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line, path
        assert not (tmp_path / "out").exists()
    assert report_after_training(tmp_path / "empty").startswith("no report: ")
    assert main(["report", str(run), "--bogus"]) == 1
    with pytest.raises(UserError, match="cannot write"):
        write_report([run], tmp_path / "empty" / "config.json")


def test_a_last_line_without_an_end_is_left_out(tmp_path, no_pictures):
    run = write_recorded_run(tmp_path / "killed")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2050, "spl')
    assert "2,000 steps in" in page_of(tmp_path, run)


def test_fit_writes_it_and_says_where(run, monkeypatch, capsys, no_pictures):
    monkeypatch.setattr("train.loop.fit", lambda config: run)
    assert main(["fit", "quickstart"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"report: {run / 'report' / 'index.html'}"
    assert (run / "report" / "index.html").exists()
