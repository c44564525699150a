"""What README and guide show works as printed: Python as it stands, commands as follows.

`jaxformer translate|score|inspect|convert` and `python -m train evaluate|report` run on a tiny
model under the names that the guide uses. For what takes longer (`fit`, `benchmark`, `plan`,
StableHLO), the command line is parsed, and data files and topologies in it are looked up.
A block that is not a command, such as a synopsis, has "notest" after its language.
"""

import doctest
import importlib
import io
import os
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import pytest

import jaxformer.cli
import train.cli
from jaxformer.arguments import generation_options
from jaxformer.cli import main
from jaxformer.config import PRESETS
from small_run import LEXICON, trained_run, write_corpus
from train.arguments import load_config, override
from train.config import TrainConfig
from train.data.sources import load_split
from train.plan.machines import chip_of_topology

pytestmark = pytest.mark.usefixtures("one_program_a_search")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OPTIONAL = {"ctranslate2", "sentencepiece", "torch", "transformers"}

# Programs of other projects, which are not run.
OTHERS = {"pip", "python3", "apt-get", "cd", "["}

# `&&` between commands, not inside quotes.
AND = re.compile(r"""&&(?=(?:[^"]*"[^"]*")*[^"]*$)""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The directory of a reader of the guide, with the runs and files that it names."""
    folder = write_corpus(tmp_path_factory.mktemp("guide"))
    for name in ("quickstart", "multi30k"):
        shutil.copytree(trained_run(tmp_path_factory), folder / "runs" / name)
    (folder / "RUN").symlink_to(folder / "runs" / "quickstart")
    for language in ("en", "de"):
        shutil.copy(folder / f"valid.{language}", folder / f"dev.{language}")
    (folder / "source.txt").write_text("red dogs run\n")
    (folder / "reference.txt").write_text("rot Hunde laufen\n")
    rows = ["english\tgerman", *(f"{english}\t{german}" for english, german in LEXICON.items())]
    for name in ("pairs", "dev", "test"):
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def blocks(page, language):
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page, folder, monkeypatch, capfdbinary):
    monkeypatch.chdir(folder)
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            run_line(line, monkeypatch, capfdbinary)


def run_line(line, monkeypatch, capfdbinary):
    for command in AND.split(line):
        run_command(command, monkeypatch, capfdbinary)


def run_command(command, monkeypatch, capfdbinary):
    """Run a command, or the last one in a pipe that begins with echo; < and > name files."""
    text = b""
    *before, command = command.split(" | ")
    words = shlex.split(command, comments=True)
    if before:
        echo, *said = shlex.split(before[0])
        assert echo == "echo"
        text = " ".join(said).encode() + b"\n"
    output = None
    if ">" in words:
        output = words[words.index(">") + 1]
        words = words[: words.index(">")]
    if "<" in words:
        text = Path(words[words.index("<") + 1]).read_bytes()
        words = words[: words.index("<")]
    if not words:
        return
    if words[0] == "srun":
        words = words[1:]
    while re.match(r"[A-Z_]+=", words[0]):  # environment variables
        words = words[1:]
    program = os.path.basename(words[0])
    if program == "python" and words[1:3] == ["-m", "train"]:
        run_train(words[3:])
    elif program == "jaxformer":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        run_jaxformer(words[1:])
        printed, said = capfdbinary.readouterr()
        assert b"error" not in said
        if output is not None:
            Path(output).write_bytes(printed)
    elif program == "gcloud":
        run_line(words[words.index("--command") + 1], monkeypatch, capfdbinary)
    else:
        assert program in OTHERS or words[1:2] == ["-m"], f"is this a command? {command}"


def run_train(arguments):
    options, overrides = train.cli._parser().parse_known_args(arguments)
    if arguments[0] in ("evaluate", "report"):
        assert not overrides
        assert train.cli.main(arguments) == 0
    elif arguments[0] == "fit":
        config = override(load_config(options.config), overrides, "fit")
        if config.data.train != load_config(options.config).data.train:
            for split in ("train", "validation", "test"):
                assert len(load_split(config.data, split)) > 0
    elif arguments[0] == "plan":
        override(load_config(options.config), overrides, "plan")
        assert all(map(chip_of_topology, options.topology))
    else:
        assert arguments[0] == "benchmark"
        assert arguments[1] != "decode" or not overrides
        for name in getattr(options, "config", ()):
            config = TrainConfig(model=PRESETS[name]) if name in PRESETS else load_config(name)
            override(config, overrides, "benchmark")


def run_jaxformer(arguments):
    options = jaxformer.cli._parser().parse_args(arguments)
    if arguments[0] == "translate" and generation_options(options):
        return  # one search is like another: that its options are accepted is enough
    if arguments[0] != "convert":
        assert main(arguments) == 0
        return
    needs = {"marian": "safetensors", "ctranslate2": "ctranslate2"}.get(options.to)
    if needs:
        pytest.importorskip(needs)
        shutil.rmtree(options.destination, ignore_errors=True)  # left by another page
        assert main(arguments) == 0


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "README.md"], ids=lambda page: page.name
)
def test_python(page, folder, monkeypatch):
    """The blocks of a page form one program."""
    monkeypatch.chdir(folder)
    names: dict = {}
    for block in blocks(page, "python"):
        for name in OPTIONAL & set(re.findall(r"^import (\w+)", block, re.MULTILINE)):
            pytest.importorskip(name)
        if "multi30k-" in block:
            for to, made in (("marian", "multi30k-marian"), ("ctranslate2", "multi30k-ct2")):
                if made in block and not Path(made).exists():
                    assert main(["convert", "runs/multi30k", made, "--to", to]) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from other packages, not about us
            exec(block, names)


EXAMPLES = [path for path in (ROOT / "jaxformer").rglob("*.py") if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed
