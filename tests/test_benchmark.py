"""`python -m train benchmark decode`: what it reports, not how fast it is."""

import json
from collections import Counter
from importlib.metadata import version
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxformer.errors import UserError
from random_run import CONFIG
from small_run import sentence_pairs, trained_run
from train.benchmark import decode
from train.benchmark.compiles import count_compiles
from train.benchmark.decode import DecodeBenchmark, Round, benchmark_decode, check_decode
from train.benchmark.peaks import Yardstick
from train.benchmark.report import decode_table
from train.cli import main
from train.costs.flops import search_flops

pytestmark = pytest.mark.usefixtures("one_program_a_search", "known_yardsticks")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(trained_run(tmp_path_factory))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.txt"
    path.write_text("".join(f"{source}\n" for source, _ in sentence_pairs(9)))
    return str(path)


def test_table_and_records(run, source, tmp_path, capsys, monkeypatch):
    compiled_for_costs = []
    costs = decode._costs

    def watched(*arguments):
        with count_compiles() as compiled:
            found = costs(*arguments)
        compiled_for_costs.extend(compiled)
        return found

    monkeypatch.setattr(decode, "_costs", watched)
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
    arguments += ["--beam-size", "2", "--batch-tokens", "128", "--dtype", "float32,bfloat16"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert compiled_for_costs == [], "the programs are those that have run"
    header, first, second, *_ = capsys.readouterr().out.splitlines()
    assert "sentences/s" in header and "MFU" in header
    assert first.split()[1:3] == ["jaxformer", "float32"] and "1.00x (1.00 to 1.00)" in first
    assert second.split()[1:3] == ["jaxformer", "bfloat16"]
    read = 2 * 64 * 16  # of the softmax matrix in bfloat16, at least
    for line in output.read_text().splitlines():
        record = json.loads(line)
        assert record["sentences"] == 6 and len(record["seconds"]) == 2
        assert record["target_tokens"] > 6 * 2
        rate = record["target_tokens"] / record["seconds_median"]
        assert record["target_tokens_per_second"] == pytest.approx(rate)
        flops = record["mfu"] * 1e11 * record["seconds_median"]
        assert flops == pytest.approx(record["model_flops"])
        assert record["peak_memory_bytes"] > 1e7
        assert record["settings"]["beam_size"] == 2 and record["machine"]["cores"] > 0
        assert record["seconds_p10"] <= record["seconds_median"] <= record["seconds_p90"]
        took = [record[f"{name}_seconds"] for name in ("trace", "lower", "compile")]
        assert min(took) > 0 and 1 <= record["compiled_programs"] <= 8
        assert record["program_memory_bytes"] > read and record["steps"] > 2
        assert record["step_bytes"] > read
        at_least = record["steps"] * record["step_bytes"] / 1e10
        assert record["roofline_seconds"]["memory"] == pytest.approx(at_least)
        assert record["bound_by"] == "memory"
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
    assert (ours["engine"], theirs["engine"]) == ("jaxformer", peer)
    assert theirs["version"] == f"{peer} {version(peer)}"
    assert theirs["same_as_first"] == 1.0
    assert theirs["target_tokens"] == ours["target_tokens"]
    assert theirs["peak_memory_bytes"] > 1e7 and "mfu" not in theirs


def test_transformers_has_no_int8(run, source):
    pytest.importorskip("transformers")
    settings = DecodeBenchmark(run, source, peer="transformers", peer_dtypes=("int8",), rounds=1)
    with pytest.raises(UserError, match="Transformers does not compute in int8: give float32"):
        list(benchmark_decode(settings))


def test_random_parameters_have_random_words_and_translations_of_one_length():
    (record,) = benchmark_decode(
        DecodeBenchmark(
            "toy", model=CONFIG, sentences=5, length=6, beam_size=2, devices=2, rounds=1
        )
    )
    assert (record["sentences"], record["devices"]) == (5, 2)
    assert record["target_tokens"] == 5 * 6  # one token per step
    assert record["model_flops"] == 5 * search_flops(CONFIG, 6, 6, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "--length is 1: give at least 2"),
        ({"source": "x"}, "toy has random parameters, which know no words: leave out --source"),
        ({"model": CONFIG.replace(vocab_size=7)}, "--vocab-size is 7: give at least 8"),
        ({"devices": 9}, "9 devices are asked for, 8 are here: give 1 to 8"),
        ({"devices": 0}, "0 devices are asked for, 8 are here: give 1 to 8"),
        ({"dtypes": ("int8", "int8")}, "--dtype is int8,int8: give each once"),
    ],
)
def test_wrong_arguments_for_random_parameters(changes, message):
    with pytest.raises(UserError, match=message):
        check_decode(DecodeBenchmark(**{"run": "toy", "model": CONFIG} | changes))


def test_a_sweep_measures_every_combination_and_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    configuration, picture, output = (tmp_path / name for name in ("toy.py", "a.png", "a.jsonl"))
    configuration.write_text(
        "from jaxformer.config import TransformerConfig\n"
        "from train.config import TrainConfig\n"
        f"config = TrainConfig(model={CONFIG!r})\n"
    )
    arguments = f"benchmark decode {configuration} --sentences 3 --rounds 1 --vocab-size 40"
    arguments += f" --beam-size 1,2 --length 3,5 --devices 1 --output {output}"
    arguments += f" --model.decoder-layers 1 --plot {picture}"
    assert main(arguments.split()) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    cases = [(record["target_length"], record["beam_size"]) for record in records]
    assert cases == [(3, 1), (3, 2), (5, 1), (5, 2)]
    assert {record["vocab_size"] for record in records} == {40}
    assert {record["settings"]["model"]["decoder_layers"] for record in records} == {1}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count(str(configuration)) == 2 * 4  # in each table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("base --plot x.png", "nothing to draw: give --beam-size, --length, --vocab-size, "),
        ("bose", "no configuration 'bose': did you mean base?"),
        ("runs/none --source README.md", "runs/none"),
        ("runs/none --length 9", "--length is for random parameters, and runs/none is a run"),
        ("runs/none --model.d-model 9", "unknown argument --model.d-model"),
        ("tiny --model.d-modle 9", "no field --model.d_modle: did you mean --model.d-model?"),
        ("tiny --dtypes int8", "no field --dtypes: did you mean --dtype?"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys):
    assert main(["benchmark", "decode", *arguments.split()]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "needs --source FILE, the sentences to translate; without it give a preset or a conf",
        ),
        ({"source": "nowhere"}, "cannot read nowhere"),
        ({"dtypes": ("int4",)}, "--dtype is 'int4': choose one of float32, bfloat16, int8"),
        ({"rounds": 0}, "--rounds is 0: give at least 1"),
        ({"sentences": -1}, "--sentences is -1: give at least 0"),
        ({"batch_tokens": 0}, "--batch-tokens is 0: give at least 1"),
        ({"peer_batches": (32, 0)}, r"--peer-batch is \(32, 0\): give at least 1"),
        ({"source": "/dev/null"}, "/dev/null has no sentence"),
        ({"source": "/dev/null", "profile": "/proc/x"}, "cannot write /proc/x/trace"),
    ],
)
def test_wrong_arguments(run, changes, message):
    with pytest.raises(UserError, match=message):
        list(benchmark_decode(DecodeBenchmark(run, **changes)))


def test_the_figures_of_engines_of_known_speed(tmp_path):
    class Searches:
        """20 steps of 5 rows a round; half of that was needed in the first, then three quarters."""

        def __init__(self):
            self.steps, self.needed_steps = 0, -25

        turns = property(lambda self: Counter({"shape": self.steps}))
        computed_steps = property(lambda self: 5 * self.steps)

        def take_round(self):
            self.steps += 20
            self.needed_steps += 75

        def lower(self, options, shape):
            assert (options.beam_size, shape) == (4, "shape")

            def search(x):
                return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e9, lambda x: 2 * x, x)

            return jax.jit(search).lower(jnp.ones(1000))

    def engine(translator, *seconds):
        took = iter((*seconds, 100.0))

        def take_round(lines):
            translator.generator.take_round()
            return Round(list(lines), next(took), 2**20)

        return take_round

    tokenizer = SimpleNamespace(encode_batch=lambda lines: [line.split() for line in lines])
    translators = {
        ("jaxformer", dtype): SimpleNamespace(
            source_tokenizer=tokenizer,
            target_tokenizer=tokenizer,
            config=CONFIG,
            generator=Searches(),
        )
        for dtype in ("float32", "bfloat16")
    }
    seconds = (9.0, 1.0, 2.0, 4.0), (9.0, 3.0, 2.0, 2.0)
    engines = {
        name: engine(translators[name], *taken)
        for name, taken in zip(translators, seconds, strict=True)
    }
    # One more round is profiled, which does not count.
    settings = DecodeBenchmark("run", rounds=3, devices=2, profile=str(tmp_path))
    first, second = decode._measure(
        engines, ["a b", "c"], settings, translators, None, Yardstick(jax.devices()[0])
    )
    assert first["target_tokens"] == 5  # with eos
    # Twice as many simulated devices share the same cores.
    flops = search_flops(CONFIG, 3, 3, 4) + search_flops(CONFIG, 2, 2, 4)
    assert first["mfu"] == pytest.approx(flops / 2.0 / 1e11)
    assert first["seconds_median"] == 2.0
    assert (first["sentences_per_second"], first["target_tokens_per_second"]) == (1.0, 2.5)
    assert first["milliseconds_per_sentence"] == 1000.0
    assert (first["steps"], first["needed_share"]) == (20, 0.75)
    # A step reads and writes an array, whose sum is taken in the loop's condition.
    assert first["step_bytes"] == pytest.approx(3 * 4000, rel=0.05)
    at_least = {"compute": flops / 1e11, "memory": 20 * first["step_bytes"] / 1e10}
    assert first["roofline_seconds"] == pytest.approx(at_least)
    # Its time as a multiple of our first engine's, round by round.
    ratios = second["ratio_median"], second["ratio_min"], second["ratio_max"]
    assert ratios == (1.0, 0.5, 3.0)
    table = decode_table([first, second])
    assert "1,000.00 (600.00 to 1,800.00)" in table and "1.00x (0.50 to 3.00)" in table
    assert "1 MiB" in table and "0.0 compute, 0.0 memory" in table


def test_one_by_one_is_one_by_one():
    asked = []
    translator = SimpleNamespace(translate=lambda lines, **_: asked.append(lines) or lines)
    settings = DecodeBenchmark("run", one_by_one=True)
    assert decode._ours(translator, settings)(["a", "b"]) == ["a", "b"]
    assert asked == [["a"], ["b"]]
