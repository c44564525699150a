import errno
import io
import json
import os
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxformer.errors import UserError
from train.metrics import MetricsWriter, read_metrics
from train.progress import Count, Progress
from train.scores import CorpusScore, bleu, chrf

# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def test_bleu_counted_by_hand():
    # Matching n-grams: 6 of 7, 4 of 6, 2 of 5, 1 of 4; no brevity penalty.
    score = bleu(["the cat sat on a mat."], ["the cat sat on the mat."])
    assert score.value == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_bleu_pools_the_sentences_before_it_divides():
    # A second sentence, all of it correct: 6+5 of 7+5, 4+4 of 6+4, 2+3 of 5+3, 1+2 of 4+2.
    hypotheses = ["the cat sat on a mat.", "dogs do not sit."]
    references = ["the cat sat on the mat.", "dogs do not sit."]
    score = bleu(hypotheses, references)
    assert score.value == pytest.approx(100 * (11 / 12 * 8 / 10 * 5 / 8 * 3 / 6) ** 0.25)


def test_chrf_counted_by_hand():
    # Matching character n-grams: 2 of 3, 1 of 2, 0 of 1; precision and recall are the same.
    score = chrf(["abc"], ["abd"])
    assert score.value == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert str(score).startswith("chrF2 38.89 (nrefs:1|case:mixed|eff:yes|nc:6|nw:0|")


def test_a_score_says_how_it_was_computed():
    cased = bleu(["The cat sat there ."], ["the cat sat there."])
    detokenised = bleu(["the cat sat there ."], ["the cat sat there."])
    tokenised = bleu(["the cat sat there ."], ["the cat sat there."], tokenize="none")
    assert cased.value < detokenised.value == pytest.approx(100)
    assert tokenised.value < 100
    assert "|case:mixed|eff:no|tok:13a|smooth:exp|version:" in str(cased)
    assert "|tok:none|" in tokenised.signature
    assert str(CorpusScore("BLEU", 41.0249, "nrefs:1")) == "BLEU 41.02 (nrefs:1)"


@pytest.mark.parametrize("metric", [bleu, chrf])
@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], ["a", "b"]), ([], [])])
def test_scores_need_a_reference_for_each_translation(metric, hypotheses, references):
    with pytest.raises(UserError, match=f"^{len(hypotheses)} .* with {len(references)} ref"):
        metric(hypotheses, references)


def test_an_unknown_tokenizer():
    with pytest.raises(UserError, match=r"no tokenizer '13b': choose one of .*13a"):
        bleu(["a"], ["a"], tokenize="13b")


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


def lines(run):
    return (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


def steps(run):
    return [(record["split"], record["step"]) for record in read_metrics(run)]


def write_steps(run, *steps, start_step=0):
    with MetricsWriter(run, start_step=start_step) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": 1 / step})


def test_a_record_is_one_line_of_strict_json_readable_at_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        values = {"loss": jnp.float32(0.5), "grad_norm": np.inf, "tokens": np.int32(97)}
        writer.write(3, "train", values | {"nll": float("nan"), "note": "안녕"})
        (line,) = lines(tmp_path)  # before the writer is closed
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    seconds = record.pop("time")
    assert 0 <= seconds < 60
    assert record == {
        "step": 3,
        "split": "train",
        "loss": 0.5,
        "grad_norm": None,
        "tokens": 97,
        "nll": None,
        "note": "안녕",
    }


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    write_steps(tmp_path, 10, 20, 30)
    write_steps(tmp_path, 40, start_step=20)
    assert steps(tmp_path) == [("train", 10), ("train", 20), ("train", 40)]


def test_a_new_run_starts_anew(tmp_path):
    write_steps(tmp_path, 10, 20)
    write_steps(tmp_path, 30)
    assert steps(tmp_path) == [("train", 30)]


def test_what_a_run_began_on_is_kept_until_it_starts_anew(tmp_path):
    for start_step in (0, 20):
        with MetricsWriter(tmp_path, start_step=start_step) as writer:
            writer.write(start_step, "start", {"device": "cpu"})
            writer.write(start_step + 20, "train", {})
    expected = [("start", 0), ("train", 20), ("start", 20), ("train", 40)]
    assert steps(tmp_path) == expected
    write_steps(tmp_path, 10)
    assert steps(tmp_path) == [("train", 10)]


def test_a_second_record_replaces_the_first(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step, split, loss in [(5, "train", 1), (5, "test", 2), (7, "test", 3), (5, "test", 4)]:
            writer.write(step, split, {"loss": loss})
    found = {(record["step"], record["split"]): record["loss"] for record in read_metrics(tmp_path)}
    assert found == {(5, "train"): 1, (5, "test"): 4, (7, "test"): 3}
    assert len(lines(tmp_path)) == 3


def test_a_half_written_last_line_is_dropped(tmp_path):
    write_steps(tmp_path, 10, 20)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    record = '{"step": 30, "split": "train", "note": "안'.encode()
    for torn in (whole + record[:12], whole + record[:-1]):  # the second torn inside a character
        (tmp_path / "metrics.jsonl").write_bytes(torn)
        assert steps(tmp_path) == [("train", 10), ("train", 20)]
        write_steps(tmp_path, 30, start_step=20)
        assert steps(tmp_path) == [("train", 10), ("train", 20), ("train", 30)]


def test_another_bad_line_is_reported(tmp_path):
    write_steps(tmp_path, 10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("<<<<<<< HEAD\n")
    for line in ("5", "null", '{"step": null, "split": "train", "time": 0}', '{"split": "train"}'):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "metrics.jsonl").write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"metrics.jsonl:1 is not a record of a step and split"):
            read_metrics(tmp_path / "other")
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not JSON"):
        MetricsWriter(tmp_path, start_step=10)


def test_time_goes_on_over_resumed_runs(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for start_step, duration in [(0, 30.0), (1, 12.0), (2, 5.0)]:
        with MetricsWriter(tmp_path, start_step=start_step) as writer:
            now += duration
            writer.write(start_step + 1, "train", {})
        now += 500.0  # between the runs
    assert [record["time"] for record in read_metrics(tmp_path)] == [30.0, 42.0, 47.0]


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(tmp_path, active=False) as writer:
        writer.write(1, "train", {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_no_directory_to_write_to(tmp_path):
    (tmp_path / "nowhere").touch()
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        MetricsWriter(tmp_path / "nowhere")


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def write(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsWriter(tmp_path) as writer, monkeypatch.context() as patch:
        patch.setattr(writer, "_file", SimpleNamespace(write=write))
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left"):
            writer.write(1, "train", {"loss": 1.0})


def test_events_that_cannot_be_written_are_said_in_one_line(tmp_path, monkeypatch):
    def flush():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsWriter(tmp_path) as writer, monkeypatch.context() as patch:
        patch.setattr(writer._events, "flush", flush)
        with pytest.raises(UserError, match=f"cannot write {tmp_path}: No space left"):
            writer.write(1, "train", {"loss": 1.0})


def test_a_full_disk_at_the_end_hides_no_other_error(tmp_path, monkeypatch):
    def close():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="first"), MetricsWriter(tmp_path) as writer:
        monkeypatch.setattr(writer._events, "close", close)
        raise UserError("first")


def read_events(path):
    """Decode TFRecords: length, its checksum, that many bytes, their checksum."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_shows_the_numbers_and_purges_on_resume(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(4, "train", {"loss": 0.5, "nll": float("nan"), "signature": "nrefs:1"})
        (file,) = tmp_path.glob("*tfevents*")
        assert [event.step for event in read_events(file)][-1] == 4  # while training goes on
        writer.write(7, "validation", {"bleu": np.float32(41.5), "count": 3})
    with MetricsWriter(tmp_path, start_step=4) as writer:
        writer.write(5, "train", {"loss": 0.25})
    files = sorted(tmp_path.glob("*tfevents*"), key=lambda path: path.name[-1])
    first, second = (list(read_events(path)) for path in files)

    def scalars(events):
        return {
            (event.step, value.tag): value.simple_value
            for event in events
            for value in event.summary.value
        }

    assert scalars(first) == {
        (4, "train/loss"): 0.5,
        (7, "validation/bleu"): 41.5,
        (7, "validation/count"): 3,
    }
    assert scalars(second) == {(5, "train/loss"): 0.25}
    assert [e.step for e in second if e.session_log.status == SessionLog.START] == [5]


# ---------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


REPORT = {
    "loss": 4.1234,
    "perplexity": 35.2,
    "tokens_per_second": 12345.6,
    "learning_rate": 1.2e-3,
    "epoch": 4.2,
    "grad_norm": 77.7,
}


def test_a_file_gets_a_plain_line_for_each_report(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    file = io.StringIO()
    with Progress(8000, 1000, file=file) as progress:
        now += 60.0  # compiling the first step: left out of the estimate
        for step in range(1001, 1101):
            progress.update(step, REPORT if step % 50 == 0 else None)
            now += 0.1
        progress.message("validation [BLEU] 41.02")
        progress.update(8000, {"loss": float("nan")})
    report = "loss 4.123  ppl 35.20  12,346 target tokens/s  lr 1.20e-03  epoch 4.20"
    assert file.getvalue().splitlines() == [
        f"step 1,050/8,000 (13%)  ETA 11m 35s  {report}",
        f"step 1,100/8,000 (14%)  ETA 11m 30s  {report}",
        "validation [BLEU] 41.02",
        "step 8,000/8,000 (100%)  loss nan",
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(9, "9s"), (725, "12m 05s"), (3 * 3600 + 7 * 60 + 59, "3h 07m"), (26 * 3600, "1d 02h")],
)
def test_the_time_left_in_two_units(monkeypatch, seconds, shown):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    file = io.StringIO()
    progress = Progress(2 + seconds, file=file)
    progress.update(1)
    now += 1.0
    progress.update(2, {})
    assert file.getvalue().endswith(f"ETA {shown}\n")


def test_plain_lines_are_flushed_one_by_one():
    class Pipe(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    pipe = Pipe()
    progress = Progress(10, file=pipe)
    progress.update(1, {"loss": 2.0})
    assert pipe.flushed == "step 1/10 (10%)  loss 2.000\n"
    progress.message("saved")
    assert pipe.flushed.endswith("saved\n")


def test_forced_colour_puts_no_control_codes_into_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    file = io.StringIO()
    with Progress(10, file=file) as progress:
        progress.update(1, REPORT)
    assert "\x1b" not in file.getvalue()


def test_a_terminal_gets_one_live_line_and_messages_above_it(terminal):
    with Progress(8000, 1000, file=terminal) as progress:
        assert "1,000/8,000" in terminal.getvalue()
        progress.update(1200, REPORT)
        progress.message("validation [bold]BLEU[/bold] 41.02")
        progress.update(1201)
    written = terminal.getvalue()
    assert "validation [bold]BLEU[/bold] 41.02\n" in written
    last = written.rpartition("\r")[2]
    assert "1,201/8,000" in last
    assert "loss 4.123  ppl 35.20  12,346 target tokens/s  lr 1.20e-03" in last
    assert written.count("\n") <= 3  # the message, and the last line when the bar is closed


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_the_terminal_is_restored_after_an_exception(terminal, interruption):
    with pytest.raises(interruption), Progress(10, file=terminal) as progress:
        progress.update(1, REPORT)
        raise interruption
    hidden, shown = terminal.getvalue().rfind("\x1b[?25l"), terminal.getvalue().rfind("\x1b[?25h")
    assert 0 <= hidden < shown


def test_a_terminal_that_cannot_redraw_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Progress(10, file=terminal) as progress:
        progress.update(1, {"loss": 2.0})
    assert terminal.getvalue() == "step 1/10 (10%)  loss 2.000\n"


def test_other_processes_show_nothing(terminal):
    with Progress(10, active=False, file=terminal) as progress:
        progress.update(1, REPORT)
        progress.message("saved")
    assert terminal.getvalue() == ""


def test_count_says_now_and_then_how_far_a_preparation_is(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    count = Count("tokenising", 4000)
    for now[0], shown in (
        (110.0, "tokenising: 1,000 of 4,000 pairs (25%)  ETA 30s\n"),
        (115.0, ""),
        (120.0, "tokenising: 3,000 of 4,000 pairs (75%)  ETA 7s\n"),
    ):
        count.add(1000)
        assert capsys.readouterr().err == shown


def test_count_without_a_total_and_in_silence(capsys):
    Count("reading", every=0.0).add(10)
    assert capsys.readouterr().err == "reading: 10 pairs\n"
    Count("reading").add(10)
    assert capsys.readouterr().err == ""


def test_records_stay_if_others_cannot_take_their_place(tmp_path, monkeypatch):
    write_steps(tmp_path, 10, 20)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left"):
        MetricsWriter(tmp_path, start_step=10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
