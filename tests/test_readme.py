"""What the README shows works as printed."""

import re
from pathlib import Path

import jaxformer as jf

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_library_example_runs(capsys, monkeypatch):
    shallow = jf.PRESETS["tiny"].replace(encoder_layers=1, decoder_layers=1)  # the same shapes
    monkeypatch.setattr(jf, "PRESETS", {"tiny": shallow})
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    exec(block, {})
    assert capsys.readouterr().out.startswith("(2, 4, 1000) (2, 4, 128) perplexity ")


def test_configurations_and_fields_that_are_named_exist():
    from train.arguments import config_names, load_config
    from train.config import flatten

    (listed,) = re.findall(r"`train/configs/` \(([^)]*)\)", README)
    assert sorted(re.findall(r"`(\w+)`", listed)) == config_names()
    fields = flatten(load_config("multi30k"))
    for flag in re.findall(r"--(data\.[a-z-]+|distributed|accumulate|run)\b", README):
        assert flag.replace("-", "_") in fields
