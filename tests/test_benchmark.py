"""`python -m train benchmark decode`: what it reports, not how fast it is."""

import json
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from jaxformer.errors import UserError
from random_run import CONFIG
from small_run import sentence_pairs, trained_run
from train.benchmark import decode
from train.benchmark.decode import DecodeBenchmark, benchmark_decode
from train.benchmark.report import decode_table
from train.cli import main

pytestmark = pytest.mark.usefixtures("one_program_a_search")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(trained_run(tmp_path_factory))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.txt"
    path.write_text("".join(f"{source}\n" for source, _ in sentence_pairs(9)))
    return str(path)


def test_table_and_records(run, source, tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    arguments = [
        "benchmark",
        "decode",
        run,
        "--source",
        source,
        "--sentences",
        "6",
        "--rounds",
        "2",
    ]
    arguments += ["--beam-size", "2", "--batch-tokens", "128", "--dtypes", "float32", "bfloat16"]
    assert main([*arguments, "--output", str(output)]) == 0
    header, first, second, *_ = capsys.readouterr().out.splitlines()
    assert "sentences/s" in header and "jaxformer float32 is faster by" in header
    assert first.startswith("jaxformer float32") and "1.00x (1.00 to 1.00)" in first
    assert second.startswith("jaxformer bfloat16")
    for line in output.read_text().splitlines():
        record = json.loads(line)
        assert record["sentences"] == 6 and len(record["seconds"]) == 2
        assert record["tokens"] > 6 * 2
        rate = record["tokens"] / record["seconds_median"]
        assert record["tokens_per_second"] == pytest.approx(rate)
        assert record["settings"]["beam_size"] == 2 and record["machine"]["cores"] > 0
        assert record["seconds_p10"] <= record["seconds_median"] <= record["seconds_p90"]
        assert record["compile_seconds"] > 0 and record["compiled_programs"] >= 1
        assert 0.2 < record["needed_share"] <= 1  # one sentence for each of six devices


@pytest.mark.parametrize(
    ("peer", "one_by_one"),
    [("ctranslate2", False), ("ctranslate2", True), ("transformers", False)],
)
def test_the_peer_says_the_same(run, source, peer, one_by_one):
    pytest.importorskip(peer)
    ours, theirs = benchmark_decode(
        DecodeBenchmark(
            run,
            source,
            sentences=4 if one_by_one else 0,
            beam_size=3,
            batch_tokens=128,
            peer=peer,
            one_by_one=one_by_one,
            rounds=1,
        )
    )
    assert (ours["engine"], theirs["engine"]) == ("jaxformer float32", f"{peer} float32")
    assert theirs["version"] == f"{peer} {version(peer)}"
    assert theirs["same_as_first"] == 1.0
    assert theirs["tokens"] == ours["tokens"]


def test_transformers_has_no_int8(run, source):
    pytest.importorskip("transformers")
    settings = DecodeBenchmark(run, source, peer="transformers", peer_types=("int8",), rounds=1)
    with pytest.raises(UserError, match="Transformers does not compute in int8: float32, bfloat16"):
        list(benchmark_decode(settings))


def test_a_preset_has_random_words_and_translations_of_one_length(monkeypatch):
    monkeypatch.setattr(decode, "PRESETS", {"toy": CONFIG})
    (record,) = benchmark_decode(
        DecodeBenchmark("toy", vocab_size=40, sentences=5, length=6, beam_size=2, rounds=1)
    )
    assert record["sentences"] == 5
    assert record["tokens"] == 5 * 6  # one token per step
    for changes, message in (
        ({"length": 1}, "--length is 1: give at least 2"),
        ({"source": "x"}, "toy is a preset, which knows no words: leave out --source"),
    ):
        with pytest.raises(UserError, match=message):
            list(benchmark_decode(DecodeBenchmark("toy", **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "needs --source FILE, the sentences to translate; without it give a preset: tiny, base",
        ),
        ({"source": "nowhere"}, "cannot read nowhere"),
        ({"rounds": 0}, "--rounds is 0: give at least 1"),
        ({"sentences": -1}, "--sentences is -1: give at least 0"),
        ({"batch_tokens": 0}, "--batch-tokens is 0: give at least 1"),
        ({"peer_batches": (32, 0)}, r"--peer-batches are \(32, 0\): give at least 1"),
        ({"source": "/dev/null"}, "/dev/null has no sentence"),
        ({"source": "/dev/null", "profile": "/proc/x"}, "cannot write /proc/x/trace"),
    ],
)
def test_wrong_arguments(run, changes, message):
    with pytest.raises(UserError, match=message):
        list(benchmark_decode(DecodeBenchmark(run, **changes)))


def test_the_figures_of_engines_of_known_speed():
    def engine(*seconds):
        took = iter(seconds)
        return lambda lines: (list(lines), next(took))

    tokenizer = SimpleNamespace(encode_batch=lambda lines: [line.split() for line in lines])

    # Half of the steps were needed in the warm-up round, and three quarters after it.
    computed_and_needed = iter([(100, 50)] * 2 + [(300, 200)] * 2)

    class Ours:
        target_tokenizer = tokenizer
        steps = property(lambda _: next(computed_and_needed))

    engines = {
        "jaxformer float32": engine(9.0, 1.0, 2.0, 4.0),
        "jaxformer bfloat16": engine(9.0, 3.0, 2.0, 2.0),
    }
    settings = DecodeBenchmark("run", rounds=3)
    translators = dict.fromkeys(engines, Ours())
    first, second = decode._measure(engines, ["a b", "c"], settings, translators, None)
    assert first["tokens"] == 5  # with eos
    assert (first["seconds_median"], first["compile_seconds"]) == (2.0, 7.0)
    assert (first["sentences_per_second"], first["tokens_per_second"]) == (1.0, 2.5)
    assert first["milliseconds_per_sentence"] == 1000.0
    assert first["needed_share"] == 0.75
    # Its time as a multiple of our first engine's, round by round.
    ratios = second["ratio_median"], second["ratio_min"], second["ratio_max"]
    assert ratios == (1.0, 0.5, 3.0)
    table = decode_table([first, second])
    assert "1,000.00 (600.00 to 1,800.00)" in table and "1.00x (0.50 to 3.00)" in table


def test_one_by_one_is_one_by_one():
    asked = []
    translator = SimpleNamespace(translate=lambda lines, **_: asked.append(lines) or lines)
    settings = DecodeBenchmark("run", one_by_one=True)
    assert decode._ours(translator, settings)(["a", "b"]) == ["a", "b"]
    assert asked == [["a"], ["b"]]
