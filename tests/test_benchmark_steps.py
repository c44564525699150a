"""`python -m train benchmark train|forward`: what it reports, not how fast it is."""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import PRESETS, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.transformer import Transformer
from random_corpus import corpus_of
from random_run import CONFIG
from small_run import small_config, write_corpus
from train.benchmark import marian_peer, peaks
from train.benchmark.decode import DecodeBenchmark, benchmark_decode
from train.benchmark.flax_plain import PlainTransformer
from train.benchmark.our_step import OurStep
from train.benchmark.peaks import matmul_peak, memory_bandwidth
from train.benchmark.processes import in_a_process
from train.benchmark.report import plot, steps_table
from train.benchmark.steps import StepBenchmark, benchmark_steps, check_steps
from train.benchmark.turns import Turn, summary
from train.benchmark.work import Case, padded_batches
from train.cli import main
from train.config import ParallelConfig, TrainConfig
from train.costs.flops import decode_step_flops, forward_flops, search_flops, train_flops
from train.data.batches import Batches
from train.data.packing import pack
from train.prepare import prepare
from train.records import collect, keep_records

#: Compiled often, so as small as possible.
MODEL = CONFIG.replace(decoder_layers=1, dropout=0.0)
CONFIGURATION = TrainConfig(model=MODEL)
PARAMS = jax.eval_shape(Transformer(MODEL).init, jax.random.key(0), *[jnp.ones((1, 2), int)] * 2)


pytestmark = pytest.mark.usefixtures("known_yardsticks")


def measured(kind="train", config=CONFIGURATION, **changes):
    settings = {"batch": (4,), "length": (8,), "devices": (1,), "steps": 2, "rounds": 2}
    return list(benchmark_steps(StepBenchmark(kind, config, **settings | changes)))


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "head_dim": 5, "value_dim": 7}])
def test_flops_are_those_that_xla_counts(changes):
    """XLA also counts element-wise work, so the model is wide enough to make that small."""
    config = TransformerConfig(
        vocab_size=300, d_model=192, d_ff=500, num_heads=4, encoder_layers=1, decoder_layers=2
    ).replace(**changes)
    ids = jnp.ones((2, 20), jnp.int32), jnp.ones((2, 30), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), *ids)
    forward = jax.jit(Transformer(config).apply).lower(params, *ids).compile()
    counted = forward.cost_analysis()["flops"]
    flops = forward_flops(config, 2, 20, 30)
    assert flops == pytest.approx(counted, rel=0.03)
    assert flops < counted
    assert train_flops(config, 2, 20, 30) == 3 * flops


def test_flops_of_a_search():
    """Those of a forward pass for the first token, then of one step after the other."""
    config = PRESETS["tiny"].replace(vocab_size=1000)
    first = forward_flops(config, 1, 11, 1)
    steps = sum(decode_step_flops(config, 1, 4, 11, slots) for slots in range(2, 8))
    assert search_flops(config, 11, 1, 4) == first
    assert search_flops(config, 11, 7, 4) == first + steps
    # Greedy, it is a forward pass without the half of the scores that the mask hides.
    hidden = 2 * config.decoder_layers * 2 * config.d_model * (7 * 6 // 2)
    assert search_flops(config, 11, 7, 1) == forward_flops(config, 1, 11, 7) - hidden


def test_flops_of_the_base_model():
    """2 per weight and token, besides attention: 44M weights in layers, 19M in the softmax."""
    config = TransformerConfig()
    weights = 6 * (4 * 512**2 + 2 * 512 * 2048) + 6 * (8 * 512**2 + 2 * 512 * 2048) + 512 * 37_000
    scores = 6 * 3 * 2 * 25 * 25 * 512
    assert forward_flops(config, 1, 25, 25) == 2 * (25 * weights + scores)


@pytest.mark.parametrize("kind", ["train", "forward"])
def test_a_record_of_every_case(kind):
    sweep = {"length": (4, 8)} if kind == "train" else {"vocab_sizes": (50, 60)}
    dtypes = ("bfloat16",) if kind == "train" else ("float32", "bfloat16")
    records = measured(kind, dtypes=dtypes, **sweep)
    varied = {"train": "target_length", "forward": "vocab_size"}[kind]
    values = next(iter(sweep.values()))
    cases = [(record["dtype"], record[varied]) for record in records]
    assert cases == [(dtype, value) for dtype in dtypes for value in values]
    for record in records:
        assert record["engine"] == "jaxformer" and record["benchmark"] == kind
        assert record["padding"] == 0.0 and record["ratio_median"] == 1.0
        step = record["step_seconds"]
        assert 0 < step["p10"] <= step["median"] <= step["p90"]
        assert record["mfu"] == pytest.approx(record["model_flops"] / step["median"] / 1e11)
        assert record["program_memory_bytes"] > 0 and record["peak_memory_bytes"] > 0
        assert record["xla_flops"] > 0.5 * record["model_flops"]
        assert record["bound_by"] in ("compute", "memory")
        assert record["roofline_seconds"]["memory"] == record["bytes_moved"] / 1e10
        assert record["bytes_moved"] > 4 * number_of_parameters(PARAMS)
        # The state and the step, or the state and the forward pass; programs for random keys.
        assert 2 <= record["compiled_programs"] <= 8
        assert min(record[f"{part}_seconds"] for part in ("trace", "lower", "compile")) > 0
        assert record["machine"]["devices"] == 1
        json.dumps(record)


@pytest.mark.slow
def test_devices_share_the_rows():
    one, four = measured(devices=(1, 4), rounds=1)
    assert four["machine"]["devices"] == 4
    assert four["model_flops"] == one["model_flops"]
    parallel = ParallelConfig(strategy="mesh", fsdp=2)
    model = MODEL.replace(vocab_size=MODEL.vocab_size + 1)
    configuration = TrainConfig(model=model, parallel=parallel)
    (mesh,) = measured(devices=(4,), rounds=1, config=configuration)
    # With fsdp=2 each device has half of what is split; without it, each had all.
    assert mesh["program_memory_bytes"] < 0.8 * four["program_memory_bytes"]
    (forward,) = measured("forward", devices=(4,), rounds=1, config=configuration)
    assert forward["machine"]["devices"] == 4
    step = OurStep("forward", configuration, Case(model, 4, 8, 8, 4), None)
    step.turn(2)
    embedding = step._carry["embedding"]["embedding"]
    assert embedding.addressable_data(0).shape == (model.vocab_size // 2, model.d_model)
    with pytest.raises(UserError, match="4 rows cannot be split over 3 devices"):
        measured(devices=(3,))
    with pytest.raises(UserError, match="9 devices are asked for, 8 are here"):
        measured(devices=(9,))


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return prepare(small_config(folder)).batches


def test_on_a_corpus_only_real_tokens_count(batches):
    ours, plain = measured(batches=batches, peers=("flax-plain",))
    assert 0 < ours["padding"] < 0.25 < plain["padding"]  # packed against padded
    assert ours["target_length"] == 16 and ours["batch"] == 16
    for record in (ours, plain):
        share = record["target_tokens_per_second"] / record["target_positions_per_second"]
        assert share == pytest.approx(1 - record["padding"])
    assert plain["ratio_min"] <= plain["ratio_median"] <= plain["ratio_max"]
    assert "mfu" not in plain and 0 <= ours["host_wait"] < 1
    assert plain["host_wait"] is None


@pytest.mark.parametrize(("multiple", "most"), [(1, 0.1), (8, 0.6)])
def test_peers_get_every_pair_once_with_little_padding(batches, multiple, most):
    padded = padded_batches(batches, multiple=multiple)
    (rows,) = batches.parts
    lengths = np.stack([rows.corpus.source.lengths, rows.corpus.target.lengths], axis=1)
    expected = sorted(map(tuple, lengths[rows.packing.pairs].tolist()))
    found, tokens, positions = [], [], 0
    for batch in padded:
        assert batch["labels"].shape[1] % multiple == 0
        positions += batch["labels"].size
        counts = [np.count_nonzero(batch[name], axis=1) for name in ("source_ids", "labels")]
        found += [tuple(pair) for pair in np.stack(counts, axis=1).tolist() if pair[1]]
        tokens.append(np.count_nonzero(batch["labels"]))
    assert sorted(found) == expected
    assert 1 - sum(tokens) / positions < most
    widths = {batch["labels"].shape[1] for batch in padded}
    shapes = {(batch["source_ids"].shape, batch["labels"].shape) for batch in padded}
    assert multiple == 1 or len(shapes) == len(widths)
    # As many real tokens as in our batch: the fixed cost of a step must not fall on fewer.
    ours = np.count_nonzero(batches.at(0)["labels"])
    # If there are few batches of a width, not all of them can be equally full.
    assert np.mean(tokens) == pytest.approx(ours, rel=0.15 if multiple == 1 else 0.3)
    assert multiple > 1 or all(abs(each - ours) <= 0.15 * ours for each in tokens)


def test_peers_get_the_pairs_that_our_rows_have(batches):
    """A pair with a side longer than its row is left out."""
    corpus, _ = corpus_of([(3, 4), (9, 2), (2, 9), (5, 5)])
    packing = pack(
        corpus.source.lengths, corpus.target.lengths, source_length=8, target_length=6, seed=3
    )
    few = Batches([[(corpus, packing)]], 2, seed=3)
    for multiple in (1, 8):
        found = [batch["labels"] for batch in padded_batches(few, multiple=multiple)]
        assert sorted(n for x in found for n in np.count_nonzero(x, axis=1) if n) == [4, 5]


def test_a_peer_on_a_corpus_has_no_shape_of_ours(batches):
    ours, plain = measured(batches=batches, peers=("flax-plain",))
    for name in ("batch", "source_length", "target_length", "model_flops"):
        assert ours[name] is not None and plain[name] is None
    assert plain["target_tokens_per_step"] == pytest.approx(ours["target_tokens_per_step"], rel=0.2)
    assert steps_table([ours, plain]).count("flax-plain") == 1


def test_an_engine_that_dies_between_turns_is_told():
    with in_a_process("abs", partial, abs) as absolute:
        assert absolute(-3) == 3
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        with pytest.raises(UserError, match="abs has failed: see above"):
            absolute(-3)


def test_ctrl_c_does_not_wait_for_the_turn_of_an_engine():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), in_a_process("sleep", partial, time.sleep) as sleep:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            sleep(300)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 200


def test_what_fails_in_a_benchmark_is_not_taken_for_its_file(tmp_path):
    def records():
        yield {"a": 1}
        raise ConnectionError("of a peer")

    with pytest.raises(ConnectionError):
        list(keep_records(str(tmp_path / "kept"), records()))
    assert (tmp_path / "kept").read_text() == '{"a": 1}\n'
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory"):
        list(keep_records(str(tmp_path), records()))


def test_what_is_done_is_shown_where_the_work_ends(capsys):
    """After Ctrl-C; and when the disk is full, with an error that names the file."""

    def records():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(records(), str)
    assert capsys.readouterr().out == "[{'a': 1}]\n"
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        collect(keep_records("/dev/full", records()), str)
    assert capsys.readouterr().out == "[{'a': 1}]\n"


@pytest.mark.parametrize(
    ("peer", "kind", "dtype"),
    [
        ("torch", "train", "bfloat16"),
        ("torch", "forward", "float32"),
        pytest.param("torch-compile", "train", "float32", marks=pytest.mark.slow),
    ],
)
def test_torch_does_the_same_work(peer, kind, dtype):
    pytest.importorskip("torch")
    ours, theirs = measured(kind, peers=(peer,), dtypes=(dtype,), rounds=1)
    assert (ours["engine"], theirs["engine"]) == ("jaxformer", peer)
    assert theirs["target_tokens_per_second"] > 0 and theirs["dtype"] == dtype
    assert theirs["version"] == f"torch {version('torch')}"
    assert theirs["peak_memory_bytes"] > 0
    assert theirs["ratio_median"] == pytest.approx(
        ours["target_tokens_per_second"] / theirs["target_tokens_per_second"]
    )


def test_peers_have_dtypes_of_their_own():
    """A peer of one dtype is measured once, whatever ours is."""
    dtypes = {"dtypes": ("float32",), "peer_dtypes": ("float32", "bfloat16")}
    ours, *theirs = measured("forward", peers=("flax-plain",), rounds=1, **dtypes)
    assert ours["dtype"] == "float32"
    assert [(each["engine"], each["dtype"]) for each in theirs] == [
        ("flax-plain", "float32"),
        ("flax-plain", "bfloat16"),
    ]


def test_plain_flax_has_the_same_parameters():
    ids = jnp.ones((1, 2), jnp.int32)

    plain = partial(PlainTransformer(CONFIG).init, deterministic=True)
    ours = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), ids, ids)
    theirs = jax.eval_shape(plain, jax.random.key(0), ids, ids)
    assert number_of_parameters(theirs) == number_of_parameters(ours)


def number_of_parameters(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0: give at least 1"),
        ({"rounds": 0}, "rounds is 0: give at least 1"),
        ({"peers": ("keras",)}, "unknown peer 'keras': choose torch, torch-compile, marian"),
        ({"peers": ("marian",)}, "Marian is only measured in training, on a corpus: train"),
        ({"batch": (2, 0)}, "--batch is 0: give at least 1"),
        ({"length": (-1,)}, "--length is -1: give at least 1"),
        ({"vocab_sizes": (4,)}, "vocab_size is 4: give at least 5"),
        ({"profile": "/proc/x"}, "cannot write /proc/x/trace"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        measured(**changes)


def test_learned_positions_end():
    model = MODEL.replace(positions="learned", max_length=7)
    with pytest.raises(UserError, match="rows have 8 positions and the model learns 7"):
        measured(config=dataclasses.replace(CONFIGURATION, model=model))


def test_peers_refuse_what_they_cannot_do():
    pytest.importorskip("torch")
    configuration = dataclasses.replace(CONFIGURATION, model=MODEL.replace(activation="swiglu"))
    for peer, message in (("torch", "has relu or gelu"), ("flax-plain", "is post-norm with relu")):
        settings = StepBenchmark("train", configuration, devices=(1,), peers=(peer,), batch=(2,))
        with pytest.raises(UserError, match=message):
            list(benchmark_steps(settings))
    for changes in (
        {"positions": "learned"},
        {"head_dim": 3},
        {"attention_dropout": 0.1},
        {"output_bias": True},
        {"attention_bias": True},
    ):
        other = dataclasses.replace(CONFIGURATION, model=MODEL.replace(**changes))
        settings = StepBenchmark("train", other, devices=(1,), peers=("flax-plain",), batch=(2,))
        (name,) = changes
        with pytest.raises(UserError, match=rf"model\.{name} is .*, which flax-plain does not"):
            list(benchmark_steps(settings))


def test_what_was_measured_before_an_error_is_shown(monkeypatch, capsys):
    def benchmark_steps(settings, yardstick):
        yield from measured(rounds=1, steps=1)
        raise KeyboardInterrupt

    monkeypatch.setattr("train.benchmark.steps.benchmark_steps", benchmark_steps)
    assert main(["benchmark", "train", "tiny"]) == 130
    printed = capsys.readouterr()
    assert "target tokens/s" in printed.out and printed.err == "interrupted\n"


def test_marian_is_asked_for_the_same_and_its_log_is_read(batches, tmp_path, monkeypatch):
    """The log is as version 1.12 writes it."""
    commands = []

    def run(command, **_):
        commands.append(command)
        line = "Ep. 1 : Up. {} : Sen. 99 : Cost 4.6 * 1,{} @ 9 after 1,200 : Time {}s : 2 words/s"
        log = "\n".join(line.format(i, 100 + i, i / 2) for i in range(1, 6))
        return marian_peer.subprocess.CompletedProcess(command, 0, "", log)

    monkeypatch.setattr(marian_peer.subprocess, "run", run)
    turn = marian_peer.marian_turn(CONFIG, batches, str(tmp_path))(3)
    assert turn == Turn([1.5, 2.0, 2.5], [0.0] * 3, [1103, 1104, 1105], [1103, 1104, 1105])
    (command,) = commands
    assert command[command.index("--after-batches") + 1] == "5"
    assert command[command.index("--dim-emb") + 1] == str(CONFIG.d_model)
    corpus = batches.parts[0].corpus
    lines = (tmp_path / "target").read_text().splitlines()
    assert len(lines) == len(corpus)
    ids = corpus.target.take(np.array([7]))
    assert lines[7].split() == [f"w{index}" for index in ids[:-1]]
    assert (tmp_path / "vocabulary.yml").read_text().count("\n") == CONFIG.vocab_size
    monkeypatch.setattr(
        marian_peer.subprocess,
        "run",
        lambda command, **_: marian_peer.subprocess.CompletedProcess(
            command, 1, "", "a\nno memory"
        ),
    )
    with pytest.raises(UserError, match="Marian has failed: no memory"):
        marian_peer.marian_turn(CONFIG, batches, str(tmp_path))(3)


def test_command_line(tmp_path, capsys):
    output, trace = tmp_path / "results.jsonl", tmp_path / "trace"
    arguments = ["benchmark", "forward", "tiny", "--batch", "1,2", "--length", "4"]
    arguments += ["--devices", "1", "--steps", "2", "--rounds", "1", "--vocab-size", "50"]
    arguments += ["--model.encoder_layers", "1", "--model.decoder_layers", "1"]
    arguments += ["--output", str(output), "--profile", str(trace)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "target tokens/s" in printed and "MFU" in printed and "bound by" in printed
    assert printed.count("jaxformer  float32") == 2 and "threefry2x32 noise" in printed
    assert [json.loads(line)["batch"] for line in output.read_text().splitlines()] == [1, 2]
    assert list(trace.rglob("*.xplane.pb"))
    assert main(["benchmark", "train", "nothing"]) == 1
    assert "no configuration 'nothing'" in capsys.readouterr().err
    # Refused before the first is measured:
    assert main(["benchmark", "train", "tiny,tinny"]) == 1
    assert "no configuration 'tinny': did you mean tiny?" in capsys.readouterr().err
    assert main(["benchmark", "train", "tiny,base", "--length", "8", "--batch", "3"]) == 1
    assert "3 rows cannot be split over 8 devices: give a multiple of 8" in capsys.readouterr().err
    assert main(["benchmark", "train", "tiny", "--batch", "8,8", "--plot", "x.png"]) == 1
    assert "nothing to draw" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["benchmark", "train", "tiny", "--batch", "1,two"])
    assert "invalid list of int value: '1,two'" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr("train.benchmark.steps.benchmark_steps", None)
    monkeypatch.setattr("jaxformer.pages.pictures.can_draw", lambda: True)
    (tmp_path / "file").touch()
    for arguments, message in (
        ([], "nothing to draw: give --batch, --length"),
        (["--batch", "1,2"], f"cannot write {tmp_path}/file/sweep.png: {tmp_path}/file is not"),
    ):
        plot = ["--plot", str(tmp_path / "file" / "sweep.png")]
        assert main(["benchmark", "train", "tiny", *arguments, *plot]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr("jaxformer.pages.pictures.can_draw", lambda: False)
    assert main(["benchmark", "train", "tiny", "--batch", "1,2", *plot]) == 1
    assert "no picture without matplotlib" in capsys.readouterr().err


def test_configurations_and_a_corpus_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_corpus(tmp_path)
    for name, width in (("narrow", 8), ("wide", 16)):
        (tmp_path / f"{name}.py").write_text(
            "from jaxformer.config import PRESETS\n"
            "from train.config import DataConfig, TrainConfig\n"
            f"model = PRESETS['tiny'].replace(vocab_size=64, d_model={width}, d_ff=16)\n"
            f"data = DataConfig(path={str(tmp_path)!r}, train=('train',), validation=('valid',), "
            "source='en', target='de', target_length=16, batch_tokens=64, "
            f"cache_dir={str(tmp_path / 'cache')!r})\n"
            "config = TrainConfig(model=model, data=data)\n"
        )
    configurations = f"{tmp_path}/narrow.py,{tmp_path}/wide.py"
    output, picture = tmp_path / "results.jsonl", tmp_path / "sweep.png"
    layers = ["--model.encoder-layers", "1", "--model.decoder-layers", "1"]
    small = ["--devices", "1", "--steps", "1", "--rounds", "1", *layers]
    arguments = ["benchmark", "train", configurations, "--corpus", *small]
    arguments += ["--peer", "flax-plain", "--output", str(output)]
    assert main(arguments) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["config"] for record in records] == [
        path for path in configurations.split(",") for _ in range(2)
    ]
    assert [record["engine"] for record in records] == ["jaxformer", "flax-plain"] * 2
    assert 0 < records[0]["padding"] < records[1]["padding"]
    wrong = ["--batch", "4", "--dtype", "float32,bfloat16"]
    assert main(["benchmark", "train", configurations, "--corpus", *wrong, *small]) == 1
    assert "instead of --batch, --length and --vocab-size give" in capsys.readouterr().err
    sweep = ["--batch", "1,2", "--length", "4", "--plot", str(picture), *small]
    assert main(["benchmark", "train", f"{tmp_path}/narrow.py", *sweep]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_is_not_installed_is_missed_before_anything_is_measured(monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("train.machine.version", version)
    settings = StepBenchmark("train", CONFIGURATION, peers=("torch-compile",))
    with pytest.raises(UserError, match=r'torch is not installed: pip install -e "\.\[parity\]"'):
        check_steps(settings)
    with pytest.raises(UserError, match="ctranslate2 is not installed: pip install ctranslate2"):
        next(benchmark_decode(DecodeBenchmark("toy", model=MODEL, peer="ctranslate2")))


def test_a_peer_has_one_device(monkeypatch):
    monkeypatch.setattr("train.benchmark.peaks.separate_devices", len)
    with pytest.raises(UserError, match="a peer uses one device and we use 4: give --devices 1"):
        measured(devices=(4,), peers=("flax-plain",))


def test_process_peak_can_begin_anew():
    block = np.ones(2**25)  # 256 MiB
    assert peaks.process_peak() > block.nbytes
    del block
    peaks.forget_process_peak()
    before = peaks.process_peak()
    block = np.ones(2**24)
    assert peaks.process_peak() > before + 0.9 * block.nbytes


def test_a_sweep_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        {
            "config": "tiny",
            "engine": "jaxformer",
            "dtype": "float32",
            "batch": rows,
            "target_length": 8,
            "vocab_size": vocabulary,
            "devices": 1,
            "target_tokens_per_second": 100.0 * rows,
            "mfu": 0.1 * rows,
        }
        for rows in (1, 2, 4)
        for vocabulary in (50, 100)
    ]
    plot(str(tmp_path / "sweep.png"), records)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="nothing to draw"):
        plot(str(tmp_path / "sweep.png"), records[:1])
    with pytest.raises(UserError, match="cannot write"):
        plot(str(tmp_path / "sweep.png" / "sweep.png"), records)


def test_yardsticks(monkeypatch):
    device = jax.devices()[0]
    assert matmul_peak("float32", device) > 1e9
    programs = []
    monkeypatch.setattr(peaks, "_best_seconds", lambda *program: programs.append(program) or 2.0)
    assert memory_bandwidth(device) == 2**28
    assert matmul_peak("int8", device) == 2048**3
    product, a, b = programs[-1]
    assert product(a[:8], b).dtype == jnp.int32


def test_a_yardstick_keeps_the_best(monkeypatch):
    flops, speeds = iter([3.0, 1.0, 4.0, 2.0]), iter([5.0, 6.0])
    monkeypatch.setattr(peaks, "matmul_peak", lambda *_: next(flops))
    monkeypatch.setattr(peaks, "memory_bandwidth", lambda *_: next(speeds))
    yardstick = peaks.Yardstick(jax.devices()[0])
    assert [yardstick.matmul("float32") for _ in range(3)] == [3.0, 3.0, 4.0]
    assert yardstick.matmul("int8") == 2.0
    assert (yardstick.bandwidth(), yardstick.bandwidth()) == (5.0, 6.0)


def test_the_statistics_of_turns():
    assert summary([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0}
    assert summary(list(range(11))) == {"median": 5, "p10": 1.0, "p90": 9.0}


def test_the_figures_of_steps_of_known_speed(monkeypatch):
    class Step:
        devices = jax.local_devices()[:2]

        def __init__(self, *_):
            pass

        def compile(self):
            seconds = dict.fromkeys(("trace_seconds", "lower_seconds", "compile_seconds"), 1.0)
            return seconds | {"xla_flops": 1.0, "bytes_moved": 2e10, "program_memory_bytes": 1}

        def turn(self, steps):
            seconds = [100.0] + [2.0] * (steps - 1)  # the first of a turn does not count
            return Turn(seconds, [0.5] * steps, [6] * steps, [8] * steps, 9)

    monkeypatch.setattr("train.benchmark.steps.OurStep", Step)
    monkeypatch.setattr("train.benchmark.steps.datasheet_peak", lambda *_: 1e12)
    (record,) = measured(devices=(2,), steps=3)
    flops = record["model_flops"]
    assert record["host_wait"] == record["padding"] == 0.25
    assert record["target_tokens_per_second"] == 3.0
    assert record["mfu_datasheet"] == pytest.approx(flops / 2.0 / 2e12)
    assert record["roofline_seconds"] == {"compute": flops / 1e11, "memory": 2.0}
    assert record["bound_by"] == "memory" and record["peak_memory_bytes"] == 9
    assert " 50% " in steps_table([record | {"xla_flops": 2.0 * flops}])


def test_turns_go_on_through_the_corpus(batches, monkeypatch):
    asked, at = [], Batches.at

    def noted(self, step, rows=slice(None)):
        asked.append(step)
        return at(self, step, rows)

    monkeypatch.setattr(Batches, "at", noted)
    measured(batches=batches, steps=2, rounds=2)
    # Two to warm up, then two per round, each after one that does not count.
    assert sorted(set(asked)) == [0, 1, 2, 3, 4, 5, 6, 7]
