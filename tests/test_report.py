"""`python -m train report`: what it says, of what it is given; how it says that something lacks."""

import itertools
import json
import re
import time

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxformer.errors import UserError
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
from train.history import History
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
        "40.00",
    ):
        assert expected in page
    # Nothing comes from elsewhere, and nothing runs.
    assert not re.search(r"<script|https?://|@import", page)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["index.html"]


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
    run, tmp_path, no_pictures
):
    other = write_recorded_run(tmp_path / "second", optimizer__peak_learning_rate=0.5)
    page = page_of(tmp_path, run, other)
    loss = figures(page)["Loss, label-smoothed, nats a token"]
    assert loss.count("<polyline") == 4
    for label in ("first training", "first validation", "second training", "second validation"):
        assert label in loss
    differing = page.partition("What differs:")[2].partition("<details>")[0]
    names = re.findall(r"<tr><td>(.*?)</td>", differing)
    assert names == ["run", "data.path", "data.cache_dir", "optimizer.peak_learning_rate"]


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
    parts = History(run).time_split()
    expected = {
        "compile": COMPILE_SECONDS,
        "steps": 40 * 50 * STEP_SECONDS,
        "evaluate": 4 * EVALUATE_SECONDS + 3.0 + SAVE_SECONDS,  # the last is scored, not trained on
        "save": 3 * SAVE_SECONDS,
        "other": 1.0,
    }
    assert parts == pytest.approx(expected)


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
    began = time.process_time()
    page = page_of(tmp_path, run)
    assert time.process_time() - began < 5.0
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
def test_ticks_of_a_logarithmic_axis(low, ratio):
    found = ticks(low, low * ratio, log=True)
    assert 1 <= len(found) <= 8
    assert found == sorted(found) and min(found) > 0


def test_numbers_of_an_axis():
    values = (0, 20_000, 1_500_000, 0.05, 3e-4, -2, 2.5e9)
    assert [short(v) for v in values] == ["0", "20k", "1.5M", "0.05", "3e-4", "-2", "2.5G"]


def test_a_single_point_and_no_point_are_drawn():
    one = Line("a <b>", np.array([5.0]), np.array([2.0]))
    assert "<circle" in svg(Chart("t", [one])) and "a &lt;b&gt;" in svg(Chart("t", [one]))
    none = Line("a", np.array([]), np.array([]))
    assert "not recorded" in svg(Chart("t", [none]))
    assert "not recorded" in svg(Chart("t", [Line("a", one.steps, -one.values)], log=True))


def test_a_picture_names_every_run_as_it_is_called(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    labels = ["_old", "$$", "$5-$6"]
    lines = [Line(label, np.array([1, 9]), np.array([1.0, 2.0])) for label in labels]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        png(Chart("t", lines), tmp_path / "x.svg")
    texts = re.findall("<text[^>]*>(.*?)</text>", (tmp_path / "x.svg").read_text())
    assert texts[-3:] == labels


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
        (broken("started", f"{good[0]}\n"), "no record of training yet"),
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
