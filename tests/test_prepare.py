"""From files to batches: what is kept, what is noticed, and what does not depend on the machine."""

import errno
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from jaxformer.errors import UserError
from jaxformer.run_directory import write_config
from jaxformer.tokenizer import Tokenizer
from random_corpus import unpack
from small_run import LEXICON, change, small_config, write_corpus
from train.config import DataConfig
from train.data import sources, tokenizer
from train.data.arrow import write_arrow
from train.data.sources import iterate, load_extra, load_split
from train.lock import only_trainer
from train.log import describe
from train.prepare import prepare
from train.resume import check_same_run, check_same_text


@pytest.fixture
def folder(tmp_path):
    return write_corpus(tmp_path / "corpus")


def same_batches(some, others):
    return all(
        np.array_equal(some.at(step)[name], array)
        for step in range(5)
        for name, array in others.at(step).items()
    )


def refuse(*_args, **_kwargs):
    raise AssertionError("this was done before")


def test_the_second_start_reads_and_tokenises_nothing(folder, monkeypatch):
    first = prepare(small_config(folder)).batches
    monkeypatch.setattr(sources, "pair_lines", lambda *paths: map(refuse, paths))
    monkeypatch.setattr(tokenizer, "_learn", refuse)
    monkeypatch.setattr(Tokenizer, "encode_batch", refuse)
    assert same_batches(prepare(small_config(folder)).batches, first)
    # Also in another run directory, with other settings.
    other = small_config(folder, run=str(folder / "other"), seed=1)
    assert not same_batches(prepare(other).batches, first)
    # The refusal is real: another vocabulary has to be learned.
    with pytest.raises(AssertionError, match="done before"):
        prepare(change(other, model__vocab_size=60))


def test_a_changed_file_is_noticed(folder):
    first = prepare(small_config(folder))
    lines = (folder / "train.de").read_text().splitlines()
    (folder / "train.de").write_text("\n".join(["Hunde laufen", *lines[1:]]) + "\n")
    again = prepare(small_config(folder))
    assert again.pairs["train"]["target"][0] == "Hunde laufen"
    assert not same_batches(again.batches, first.batches)
    ids = again.batches.parts[0].corpus.target.take(np.array([0]))
    assert again.target_tokenizer.decode(ids) == "Hunde laufen"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data in batches of 17 rows of 16 positions."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    return prepare(small_config(folder, data__batch_tokens=17 * 16 + 3))


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_hosts_read_their_rows_of_one_batch_and_empty_ones_after_it(data, hosts):
    whole = data.batches.at(4)
    assert len(whole["labels"]) == data.batches.rows_per_batch == 17
    height = 24 // hosts
    shares = [
        data.batches.at(4, slice(host * height, (host + 1) * height)) for host in range(hosts)
    ]
    for name, array in whole.items():
        joined = np.concatenate([share[name] for share in shares])
        np.testing.assert_array_equal(joined[:17], array)
        assert len(joined) == 24 and not joined[17:].any()


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("devices", "tensor", "accumulate", "rows"),
    [(1, 1, 1, 17), (3, 1, 2, 18), (8, 1, 3, 24), (8, 2, 1, 20)],
)
def test_batches_know_no_devices(data, folder, monkeypatch, devices, tensor, accumulate, rows):
    """Rows per step are rounded up for the devices that take rows of their own."""
    here = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda: here)
    config = small_config(folder, data__batch_tokens=17 * 16 + 3, accumulate=accumulate)
    if tensor > 1:
        config = change(config, parallel__strategy="mesh", parallel__tensor=tensor)
    here = prepare(config)
    assert same_batches(here.batches, data.batches)
    assert here.rows_per_step == rows


def write_extra(folder):
    """Write the validation sentences twice, with the source side in capitals."""
    for language in ("en", "de"):
        text = (folder / f"valid.{language}").read_text() * 2
        (folder / f"back.{language}").write_text(text.upper() if language == "en" else text)


def test_a_mixture_from_configuration_to_batches(folder):
    write_extra(folder)
    for language, unfit in (("en", ["", "RED " * 99, "RED"]), ("de", ["rot", "rot", "rot " * 99])):
        with (folder / f"back.{language}").open("a") as file:
            file.writelines(f"{line}\n" for line in unfit)
    mixed = small_config(
        folder,
        data__extra=("back",),
        data__weights=(3.0, 1.0),
        data__source_length=40,
        data__target_length=32,
        model__vocab_size=90,
    )
    run = prepare(mixed)
    assert "RED" not in (folder / "train.en").read_text()
    assert 3 not in run.source_tokenizer.encode("RED DOGS")  # the vocabulary covers both corpora
    capitals = [
        run.source_tokenizer.decode(batch["source_ids"][row][:5]).isupper()
        for batch in map(run.batches.at, range(20))
        for row in range(run.batches.rows_per_batch)
    ]
    assert np.mean(capitals) == pytest.approx(0.25, abs=0.01)
    lines = list(describe(mixed, {}, run.batches, 0))
    rows = run.batches.rows_per_batch
    assert lines[-1].startswith(f"batches    {rows} rows of 40 source and 32 target positions, ")
    left_out = ", 1 empty and 2 too long left out"
    for share, name, part, pairs in zip(
        (0.75, 0.25),
        ("data.train", "back"),
        run.batches.parts,
        ("200 pairs;", f"43 pairs{left_out};"),
        strict=True,
    ):
        steps = len(part) / (share * rows)
        (line,) = [line for line in lines if f"{share:.1%} {name}: {pairs}" in line]
        assert line.endswith(f"; {steps:,.1f} steps an epoch")


def test_without_weights_corpora_end_together(folder):
    write_extra(folder)
    mixed = small_config(
        folder,
        data__extra=("back",),
        data__source_length=96,
        data__target_length=64,
        model__vocab_size=90,
    )
    batches = prepare(mixed).batches
    seen = [pair for step in range(batches.steps_per_epoch) for pair in unpack(batches.at(step))]
    distinct = {str(pair) for pair in seen}
    assert len(distinct) == 200 + 20  # each of the 20 twice in the extra corpus
    assert 240 <= len(seen) < 300  # the next epoch fills the last batch


def test_extra_files_beside_a_hub_data_set_have_short_names(tmp_path):
    for language in ("en", "ko"):
        (tmp_path / f"back.{language}").write_text(f"{language} 1\n")
    data = DataConfig(
        path=str(tmp_path),
        dataset="somebody/corpus",
        extra=("back",),
        source="translation.ko",
        target="translation.en",
        cache_dir=str(tmp_path / "cache"),
    )
    (tmp_path / "back.tsv").write_text("en\tko\nen 1\tko 1\n")
    (tmp_path / "back.jsonl").write_text('{"en": "en 1", "ko": "ko 1", "n": {"en": ""}}\n')
    (tmp_path / "full.jsonl").write_text('{"translation.en": "en 1", "translation.ko": "ko 1"}\n')
    pq.write_table(pa.table({"ko": ["ko 1"], "en": ["en 1"]}), tmp_path / "back.parquet")
    for name in ("back", "back.tsv", "back.jsonl", "full.jsonl", "back.parquet"):
        assert load_extra(data, name)[0] == {"source": "ko 1", "target": "en 1"}
    (tmp_path / "wrong.tsv").write_text("en\tde\na\tb\n")
    with pytest.raises(UserError, match=r"wrong.tsv:2: no column 'translation.ko'; .* en, de"):
        load_extra(data, "wrong.tsv")


def test_what_is_not_trained_may_change(tmp_path):
    config = small_config(tmp_path, steps=100, optimizer__cooldown_steps=20)
    run = tmp_path / "run"
    write_config(run, config.to_dict())
    (run / "checkpoints" / "60").mkdir(parents=True)
    more = {"model__remat": True, "model__scan_layers": True, "model__flash_attention": "none"}
    for changes in ({"steps": 80}, {"steps": 400}, {"accumulate": 2}, more, {"data__path": "x"}):
        check_same_run(change(config, **changes), run)
    for changes, message in (
        ({"steps": 59}, "is at step 60 and steps is 59: give at least 60"),
        ({"steps": 79}, "would fall from step 59 on: give at least 80"),
        ({"model__dropout": 0.3}, r"holds a run with model.dropout=0.0, not 0.3: give 0.0"),
        ({"optimizer__cooldown_steps": 10}, "optimizer.cooldown_steps=20, not 10"),
    ):
        with pytest.raises(UserError, match=message):
            check_same_run(change(config, **changes), run)
    (run / "checkpoints" / "80").mkdir()  # the step after it has the full rate
    check_same_run(change(config, steps=400), run)
    (run / "checkpoints" / "85").mkdir()
    for steps in (90, 400):
        with pytest.raises(UserError, match=r"since step 80 its learning rate falls towards that"):
            check_same_run(change(config, steps=steps), run)


def test_what_is_no_run_is_left_alone(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "marian"}')
    with pytest.raises(UserError, match=r"that of a Hugging Face model: .*; choose another --run"):
        prepare(small_config(folder, run=str(tmp_path)))
    assert (tmp_path / "config.json").read_text() == '{"model_type": "marian"}'
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints" / "60").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has checkpoints but no config\.json: restore it"):
        prepare(small_config(folder, run=str(tmp_path)))


def test_a_cache_that_cannot_be_written(tmp_path):
    schema = pa.schema({"number": pa.int32()})
    (tmp_path / "x.lock").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*x\.arrow: .*; make room, or set HF"):
        write_arrow(tmp_path / "x.arrow", schema, [{"number": [1]}])


def test_of_several_writers_one_writes(tmp_path):
    written, gate = [], threading.Barrier(4)

    def batches():
        written.append(threading.get_ident())
        time.sleep(0.3)  # while the others wait for the lock
        yield {"number": [len(written)]}

    def write():
        gate.wait()
        write_arrow(tmp_path / "x.arrow", pa.schema({"number": pa.int32()}), batches())

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_parts_of_a_corpus_are_the_whole(folder, monkeypatch):
    dataset = load_split(small_config(folder).data, "train")
    whole = list(dataset.iter(10))
    monkeypatch.setattr(sources, "_MAPPED_ROWS", 30)
    assert list(iterate(dataset, 10)) == whole


MEASURE = """
import resource, sys
from pathlib import Path
from train.config import DataConfig
from train.data import corpus, sources
from train.data.arrow import cache_folder
from train.data.corpus import encode_corpus
from train.data.sources import load_split
from train.data.tokenizer import learn_tokenizers

corpus._ROWS_PER_BATCH = sources._ROWS_PER_BATCH = 2_000
sources._MAPPED_ROWS = 10_000
folder = Path(sys.argv[1])
tokenizers = None
for name in ("few", "many"):
    data = DataConfig(
        path=str(folder), train=(name,), source="en", target="de", cache_dir=str(folder / "cache")
    )
    pairs = load_split(data, "train")
    tokenizers = tokenizers or learn_tokenizers([pairs], folder, vocab_size=40, joint=True)
    ids = encode_corpus(pairs, *tokenizers, data.cache_dir)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(len(ids), int(ids.source.lengths.sum() + ids.target.lengths.sum()), peak)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Token ids of four times the pairs take 15 MB more; as Python objects, three times that."""
    words = list(LEXICON)
    for name, number in (("few", 20_000), ("many", 80_000)):
        for language, shift in (("en", 0), ("de", 5)):
            lines = (
                " ".join(words[(i * j + shift) % 12] for j in range(10 + i % 11))
                for i in range(number)
            )
            (tmp_path / f"{name}.{language}").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    few, many = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    assert (few[0], many[0]) == (20_000, 80_000)
    assert 4 * (many[1] - few[1]) > 14e6  # what the ids take in the file
    assert many[2] - few[2] < 12_000  # KiB


def test_tokenizers_of_a_run_that_failed_are_not_used(folder):
    prepare(small_config(folder))  # a joint tokenizer, and no checkpoint
    separate = {"data__joint_vocabulary": False, "model__embeddings": "separate"}
    data = prepare(small_config(folder, model__vocab_size=40, **separate))
    assert data.source_tokenizer.model != data.target_tokenizer.model


def test_a_run_directory_that_is_moved_meanwhile(tmp_path):
    with pytest.raises(KeyError), only_trainer(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        raise KeyError
    with only_trainer(tmp_path / "moved"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def acquire(*_, **__):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with only_trainer(tmp_path / "run"):
        write_arrow(tmp_path / "x.arrow", pa.schema({"number": pa.int32()}), [{"number": [1]}])
    assert {path.name for path in tmp_path.iterdir()} == {"x.arrow"}


def test_either_side_of_the_text_tells_it(tmp_path):
    def corpora(*lengths):
        source, target = (SimpleNamespace(lengths=np.array(each)) for each in lengths)
        return {"data.train": SimpleNamespace(source=source, target=target)}

    (tmp_path / "checkpoints/1").mkdir(parents=True)
    for _ in range(2):
        check_same_text(tmp_path, corpora([2, 3], [4, 5]))
    for other in (([3, 2], [4, 5]), ([2, 3], [5, 4])):
        with pytest.raises(UserError, match=r"has seen other text as data\.train"):
            check_same_text(tmp_path, corpora(*other))
