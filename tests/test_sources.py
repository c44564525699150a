import csv
import errno
import gzip
import json
import lzma
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxformer.errors import UserError
from random_run import tokenizer
from train.config import DataConfig
from train.data.corpus import encode_corpus
from train.data.sources import load_split

# What breaks naive readers: separators inside sentences, quotes, words like missing values.
PAIRS = [
    ("I go home.", "나는 집에 간다."),
    ("one\u2028line, still", "한\u0085 줄\x0b이다"),
    ('he said "yes', "'그'는 \"네"),
    ("NA", "null"),
    ("7", "nan"),
    ("  spaces  ", "빈칸 "),
    ("nothing", ""),
]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "corpus").mkdir()
    return DataConfig(
        path=str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"), source="en", target="ko"
    )


def pairs_of(dataset):
    assert dataset.column_names == ["source", "target"]
    return list(zip(dataset["source"], dataset["target"], strict=True))


def write(data, name, content):
    path = Path(data.path, name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_text(data, source_name, target_name, end="\n", bom=b""):
    for name, side in ((source_name, 0), (target_name, 1)):
        write(data, name, bom + "".join(pair[side] + end for pair in PAIRS).encode())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_text_files_by_prefix_and_by_name(data, end, bom):
    write_text(data, "news.en", "news.ko", end, bom)
    by_prefix = load_split(replace(data, train=("news",)), "train")
    by_name = load_split(replace(data, test=("news.en", "news.ko")), "test")
    assert pairs_of(by_prefix) == pairs_of(by_name) == PAIRS


def test_parquet_names_are_no_patterns(data):
    for name, text in (("t[1].parquet", "right"), ("t1.parquet", "wrong"), ("t?.parquet", "?")):
        table = pa.table({"en": [text], "ko": [text]})
        pq.write_table(table, Path(data.path, name))
    for name, text in (("t[1].parquet", "right"), ("t?.parquet", "?")):
        assert pairs_of(load_split(replace(data, test=(name,)), "test")) == [(text, text)]


def test_a_table_is_none_of_two_files(data):
    write(data, "a.tsv", "en\tko\na\tb\n")
    write(data, "b.txt", "x\n")
    with pytest.raises(UserError, match=r"a\.tsv is one of two files, but a table has both sides"):
        load_split(replace(data, train=("b.txt", "a.tsv")), "train")


def test_what_is_no_file_of_text(data, tmp_path):
    write(data, "a.ko", gzip.compress(b"x\n"))
    write(data, "a.en", b"x\n")
    with pytest.raises(UserError, match=r"a\.ko is compressed: unpack it"):
        load_split(replace(data, train=("a",)), "train")
    write(data, "a.ko", lzma.compress(b"x\n"))
    with pytest.raises(UserError, match=r"a\.ko is compressed: unpack it, with unxz"):
        load_split(replace(data, train=("a.en", "a.ko")), "train")
    write(data, "a.tsv.gz", gzip.compress(b"en\tko\nx\ty\n"))
    with pytest.raises(UserError, match=r"a\.tsv\.gz is compressed: unpack it"):
        load_split(replace(data, train=("a.tsv.gz",)), "train")
    for name in ("a" * 300, "a" * 300 + ".gz"):
        with pytest.raises(UserError, match=r"cannot read .*: File name too long"):
            load_split(replace(data, train=(name,)), "train")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe is not a regular file: give one"):
        load_split(replace(data, train=(str(tmp_path / "pipe"), "a.en")), "train")


def test_damaged_files_of_the_cache(data, tmp_path):
    """As after a power cut: they are noticed or made again, and never taken for another's."""
    pieces = tokenizer(60)
    write_text(data, "a.en", "a.ko")
    write_text(data, "b.ko", "b.en")
    cache = tmp_path / "cache"
    one, other = (load_split(replace(data, train=(name,)), "train") for name in "ab")
    expected = [
        encode_corpus(dataset, pieces, pieces, cache).source.lengths.tolist()
        for dataset in (one, other)
    ]
    for file in cache.glob("digest-*"):
        file.write_bytes(b"")
    found = [
        encode_corpus(dataset, pieces, pieces, cache).source.lengths.tolist()
        for dataset in (one, other)
    ]
    assert found == expected
    for file in cache.glob("ids-*.arrow"):
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"ids-.*\.arrow is damaged .*: delete it"):
        encode_corpus(one, pieces, pieces, cache)
    for file in cache.glob("text-*.arrow"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"text-.*\.arrow is damaged .*: delete it"):
        load_split(replace(data, train=("a",)), "train")


def test_absolute_names_need_no_path(data):
    write_text(data, "news.en", "news.ko")
    prefix = str(Path(data.path, "news"))
    assert pairs_of(load_split(replace(data, path=None, train=(prefix,)), "train")) == PAIRS


def test_a_tilde_is_the_home_directory(data, tmp_path, monkeypatch):
    """In quotes, or in a configuration file, no shell expands it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text(data, "news.en", "news.ko")
    for path, name in (("~/corpus", "news"), (None, "~/corpus/news"), ("/", "~/corpus/news")):
        assert pairs_of(load_split(replace(data, path=path, train=(name,)), "train")) == PAIRS


def test_last_line_without_newline_counts(data):
    write(data, "a.en", "x\ny")
    write(data, "a.ko", "ㄱ\nㄴ\n")
    assert pairs_of(load_split(replace(data, train=("a",)), "train")) == [("x", "ㄱ"), ("y", "ㄴ")]


def table_text(suffix):
    rows = [{"id": i, "en": en, "ko": ko} for i, (en, ko) in enumerate(PAIRS)]
    if suffix == "tsv":
        return "id\ten\tko\n" + "".join(f"{r['id']}\t{r['en']}\t{r['ko']}\n" for r in rows)
    if suffix == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
    return json.dumps(rows, indent=1)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "json", "parquet", "TSV", "Parquet"])
def test_tables(data, suffix):
    path = Path(data.path, f"table.{suffix}")
    if suffix == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([("ko", "en"), *((ko, en) for en, ko in PAIRS)])
    elif suffix.lower() == "parquet":
        table = pa.table({"en": [en for en, _ in PAIRS], "ko": [ko for _, ko in PAIRS]})
        pq.write_table(table, path)
    else:
        path.write_text(table_text(suffix.lower()), encoding="utf-8")
    data = replace(data, validation=(path.name,))
    assert pairs_of(load_split(data, "validation")) == PAIRS
    # The names of the columns decide the direction, not their order.
    turned = load_split(replace(data, source="ko", target="en"), "validation")
    assert pairs_of(turned) == [(ko, en) for en, ko in PAIRS]


def test_csv_field_may_span_lines(data):
    write(data, "t.csv", 'en,ko\r\n"a\nb","ㄱ ""ㄴ"""\r\n')
    assert pairs_of(load_split(replace(data, test=("t.csv",)), "test")) == [("a\nb", 'ㄱ "ㄴ"')]


def test_a_csv_field_may_be_a_document(data):
    write(data, "t.csv", f"en,ko\r\n{'a ' * 100_000},ㄱ\r\n")
    ((source, _),) = pairs_of(load_split(replace(data, test=("t.csv",)), "test"))
    assert len(source) == 200_000


def test_parquet_beside_columns_that_are_not_asked_for(data):
    kinds = {"en": pa.string_view(), "ko": pa.string(), "m": pa.map_(pa.string(), pa.int32())}
    rows = {"en": ["a"], "ko": ["b"], "m": [[("x", 1)]]}
    table = pa.table({name: pa.array(rows[name], kind) for name, kind in kinds.items()})
    pq.write_table(table, Path(data.path, "t.parquet"))
    assert pairs_of(load_split(replace(data, train=("t.parquet",)), "train")) == [("a", "b")]


def test_a_name_twice_matters_only_if_it_is_asked_for(data):
    write(data, "t.tsv", "note\ten\tnote\tko\nx\ta\ty\tb\n")
    assert pairs_of(load_split(replace(data, train=("t.tsv",)), "train")) == [("a", "b")]


def test_parquet_text_that_is_not_utf8(data):
    broken = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    table = pa.table({"en": broken, "ko": ["ㄱ", "ㄴ"]})
    pq.write_table(table, Path(data.path, "t.parquet"))
    with pytest.raises(UserError, match=r"t\.parquet cannot be read as text \(.*\): write it as"):
        load_split(replace(data, test=("t.parquet",)), "test")


NESTED = [{"translation": {"en": en, "ko": ko}, "n": 5} for en, ko in PAIRS]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_dotted_names_reach_into_dicts(data, suffix):
    path = Path(data.path, f"nested.{suffix}")
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(NESTED), path)
    elif suffix == "json":
        path.write_text(json.dumps(NESTED))
    else:
        path.write_text("\n".join(map(json.dumps, NESTED)))
    data = replace(data, train=(path.name,), source="translation.ko", target="translation.en")
    assert pairs_of(load_split(data, "train")) == [(ko, en) for en, ko in PAIRS]


def test_folder_in_place_of_a_hub_name(data):
    pq.write_table(pa.Table.from_pylist(NESTED), Path(data.path, "train.parquet"))
    pq.write_table(pa.Table.from_pylist(NESTED[:2]), Path(data.path, "test.parquet"))
    data = replace(
        data,
        dataset=data.path,
        train=("train[:3]",),
        test=("test",),
        validation=("dev",),
        source="translation.en",
        target="translation.ko",
    )
    assert pairs_of(load_split(data, "train")) == PAIRS[:3]
    assert pairs_of(load_split(data, "test")) == PAIRS[:2]
    with pytest.raises(UserError, match=r"split 'dev': Unknown split \"dev\"\. .*'train', 'test'"):
        load_split(data, "validation")
    with pytest.raises(UserError, match=r"no column 'translation\.de'.*translation\.en"):
        load_split(replace(data, target="translation.de"), "test")


def test_builtin_corpus_in_both_directions(data):
    data = replace(data, dataset="builtin", validation=("validation",), test=("dev",))
    there = pairs_of(load_split(data, "validation"))
    back = pairs_of(load_split(replace(data, source="ko", target="en"), "validation"))
    assert back == [(target, source) for source, target in there]
    assert there[0][0].isascii() and not there[0][1].isascii()
    with pytest.raises(UserError, match=r"no split 'dev': choose one of train, val"):
        load_split(data, "test")


def test_a_changed_file_is_read_again(data):
    data = replace(data, train=("a",))
    for korean in ("ㄱ", "ㄴ"):
        write(data, "a.en", "x\n")
        write(data, "a.ko", korean + "\n")
        assert pairs_of(load_split(data, "train")) == [("x", korean)]
    date = write(data, "a.ko", "ㄷ\n").stat().st_mtime_ns
    assert pairs_of(load_split(data, "train")) == [("x", "ㄷ")]
    copy = write(data, "copy", "ㄹ\n")
    os.utime(copy, ns=(date, date))  # as `cp -p` and `rsync -t` do
    copy.replace(Path(data.path, "a.ko"))
    assert pairs_of(load_split(data, "train")) == [("x", "ㄹ")]


def test_a_cache_that_cannot_be_used_is_not_a_fault_of_the_data(data, tmp_path, monkeypatch):
    table = pa.table({"en": ["x"], "ko": ["y"]})
    pq.write_table(table, Path(data.path, "t.parquet"))
    (tmp_path / "file").touch()
    nowhere = replace(data, cache_dir=str(tmp_path / "file" / "cache"))
    for wanted in (
        replace(nowhere, train=("t.parquet",)),
        replace(nowhere, train=("train",), dataset=data.path),
    ):
        with pytest.raises(UserError, match=r"cannot make the cache folder .*; set HF_DATA"):
            load_split(wanted, "train")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(UserError, match=r"cannot read .* into the cache \(.*space.*\): make room"):
        load_split(replace(data, train=("t.parquet",)), "train")


def test_a_parquet_file_without_rows_holds_no_pair(data):
    table = pa.table({"en": pa.array([], pa.string()), "ko": pa.array([], pa.string())})
    pq.write_table(table, Path(data.path, "t.parquet"))
    with pytest.raises(UserError, match="holds no sentence pair"):
        load_split(replace(data, train=("t.parquet",)), "train")


def test_reading_is_silent(data, capfd):
    write_text(data, "news.en", "news.ko")
    pq.write_table(pa.Table.from_pylist(NESTED), Path(data.path, "t.parquet"))
    load_split(replace(data, train=("news",)), "train")
    nested = replace(data, source="translation.en", target="translation.ko")
    load_split(replace(nested, train=("t.parquet",)), "train")
    load_split(replace(nested, dataset=data.path, train=("train",)), "train")
    assert capfd.readouterr() == ("", "")


def check_refused(data, message):
    with pytest.raises(UserError, match=message) as error:
        load_split(data, "train")
    assert "\n" not in str(error.value)
    # A failed read leaves nothing behind that a later one could take for the corpus.
    assert not list(Path(data.cache_dir).glob("*.partial"))


@pytest.mark.parametrize(
    "english, korean, message",
    [
        ("a\nb\n", "ㄱ\n", r"t\.en has 2 lines, .*t\.ko has 1"),
        ("a\n", "ㄱ\nㄴ\n\n", r"t\.en has 1 lines, .*t\.ko has 3"),
        (b"a\nb\xe4\n", "ㄱ\nㄴ\n", r"t\.en:2: not UTF-8 \(byte 0xe4 at column 2\)"),
        ("a\n", "가\n".encode("utf-16"), r"t\.ko:1: not UTF-8"),
        ("a\n".encode("utf-16-le"), "ㄱ\n", r"t\.en is UTF-16, it seems: convert it"),
        ("", "", r"data\.train \(t\) holds no sentence pair"),
    ],
)
def test_bad_text_files(data, english, korean, message):
    write(data, "t.en", english)
    write(data, "t.ko", korean)
    check_refused(replace(data, train=("t",)), message)


@pytest.mark.parametrize(
    "names, message",
    [
        (("t",), r"no file .*t\.en: the folder has t\.eng, t\.ko$"),
        (("t.ko", "u.ko"), r"no file .*u\.ko: the folder has t\.ko"),
        (("no/t",), r"no file .*no/t\.en: there is no folder .*no; check data\.path"),
        (("t.tsv",), r"no file .*t\.tsv: the folder has"),
        ((), r"data\.train is empty"),
        (("a", "b", "c"), r"data\.train has 3 names \(a, b, c\)"),
    ],
)
def test_files_that_are_not_there(data, names, message):
    write(data, "t.eng", "a\n")
    write(data, "t.ko", "ㄱ\n")
    check_refused(replace(data, train=names), message)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.tsv", "en\tko\n", "holds no sentence pair"),
        (
            "t.tsv",
            "en\tde\na\tb\n",
            r"t\.tsv:2: no column 'ko'; the columns are en, de: name two of them",
        ),
        ("t.tsv", "en\tko\na\tb\nc\n", r"t\.tsv:3: 1 columns, but .* has 2 \(en, ko\)"),
        ("t.tsv", "en\tko\ten\na\tb\tc\n", r"t\.tsv:2: several columns are called 'en'; rename"),
        ("t.csv", 'en,ko\na,"b\n', r"t\.csv:2: not CSV .*; mend its quotes"),
        ("t.csv", "en,ko\na\rb,c\n", r"t\.csv:2: not CSV .*; mend its line ends"),
        ("t.jsonl", '{"en": "a", "ko": "b"}\n{"en"\n', r"t\.jsonl:2: not JSON"),
        ("t.jsonl", "[1, 2]\n", r"t\.jsonl:1: \[1, 2\] is not an object of columns"),
        ("t.jsonl", '{"en": "a", "ko": null}', r"t\.jsonl:1: column 'ko' holds null, not text"),
        ("t.jsonl", '{"en": "\\ud83d", "ko": "b"}', r"t\.jsonl:1: .*half a character"),
        ("t.json", '{"en": "a", "ko": "b"}', r"t\.json is not a list of objects"),
        ("t.json", '[{"en": 7, "ko": "b"}]', r"t\.json, row 1: column 'en' holds 7, not text"),
        ("t.json", '[\n{"en": "a",}]', r"t\.json:2: not JSON"),
        ("t.parquet", "junk", r"t\.parquet cannot be read as Parquet"),
    ],
)
def test_bad_tables(data, name, content, message):
    write(data, name, content)
    check_refused(replace(data, train=(name,)), message)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"en": "a", "ko": "b"}, {"en": "c", "ko": None}], "'ko' is null in row 2"),
        ([{"en": 1, "ko": "b"}], "'en' holds int64, not text"),
        ([{"en": "a", "ko": ["b"]}], "'ko' holds .*not text"),
    ],
)
def test_typed_columns_must_hold_text(data, rows, message):
    pq.write_table(pa.Table.from_pylist(rows), Path(data.path, "t.parquet"))
    with pytest.raises(UserError, match=message):
        load_split(replace(data, train=("t.parquet",)), "train")


def test_hub_without_network_points_to_local_files(data, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'wmt/wmt14' on the Hub\n(details)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    data = replace(data, dataset="wmt/wmt14", dataset_config="de-en", train=("train",))
    check_refused(data, r"cannot reach data set 'wmt/wmt14'.*name local files in data\.path")
