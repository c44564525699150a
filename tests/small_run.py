"""A corpus, a configuration and a run, small enough to train in a test."""

import dataclasses
import os
import random
from pathlib import Path

import pytest
from filelock import FileLock

from jaxformer.config import TransformerConfig
from train.config import CheckpointConfig, DataConfig, EvaluateConfig, OptimizerConfig, TrainConfig
from train.loop import fit

# Translations are word by word and in the same order: attention alone learns them in seconds.
LEXICON = {
    "one": "eins", "two": "zwei", "six": "sechs", "red": "rot", "blue": "blau", "old": "alt",
    "dogs": "Hunde", "cats": "Katzen", "run": "laufen", "sit": "sitzen", "here": "hier",
    "now": "jetzt",
}  # fmt: skip


def sentence_pairs(number: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return distinct pairs of 2 to 7 words."""
    draw = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < number:
        words = draw.choices(list(LEXICON), k=draw.randint(2, 7))
        pairs[" ".join(words)] = " ".join(LEXICON[word] for word in words)
    return list(pairs.items())


def write_corpus(folder: Path) -> Path:
    """Write {train,valid,test}.{en,de} of 200, 20 and 20 pairs."""
    pairs = sentence_pairs(240)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", pairs[:200]), ("valid", pairs[200:220]), ("test", pairs[220:])):
        for side, language in enumerate(("en", "de")):
            text = "".join(f"{pair[side]}\n" for pair in part)
            (folder / f"{name}.{language}").write_text(text, encoding="utf-8")
    return folder


def small_config(folder: Path, **changes: object) -> TrainConfig:
    """Return a configuration for the corpus in `folder`; the run is `folder`/run."""
    config = TrainConfig(
        run=str(folder / "run"),
        steps=6,
        log_every=3,
        model=TransformerConfig(
            vocab_size=64,
            d_model=16,
            d_ff=32,
            num_heads=2,
            encoder_layers=1,
            decoder_layers=1,
            max_length=32,
            dropout=0.0,  # dropout is slow to compile
        ),
        data=DataConfig(
            path=str(folder),
            train=("train",),
            validation=("valid",),
            test=("test",),
            source="en",
            target="de",
            target_length=16,
            batch_tokens=16 * 16,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=20),
        evaluate=EvaluateConfig(every=3, beam_size=2),
        checkpoint=CheckpointConfig(keep_last=2, average=2),
    )
    return change(config, **changes)


def change(config: TrainConfig, **changes: object) -> TrainConfig:
    """Return `config` with fields changed; `model__d_model=8` reaches into a section."""
    fields = {name: value for name, value in changes.items() if "__" not in name}
    sections: dict[str, dict[str, object]] = {}
    for name in changes.keys() - fields.keys():
        section, field = name.split("__")
        sections.setdefault(section, {})[field] = changes[name]
    for section, values in sections.items():
        fields[section] = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **fields)


def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that has learned something, trained once for all test files.

    Tests must not write to it: copy it.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "small_run"
    with FileLock(f"{folder}.lock"):
        if (folder / "run" / "checkpoints" / "average").exists():
            return folder / "run"
        config = small_config(
            write_corpus(folder),
            steps=150,
            evaluate__every=50,
            log_every=25,
            model__vocab_size=100,
            model__d_model=32,
            model__d_ff=64,
            data__target_length=24,
            data__batch_tokens=16 * 24,
        )
        fit(config)
    return folder / "run"
