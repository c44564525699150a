"""The same training in Marian, through its `pymarian` package."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.config import TransformerConfig
from jaxformer.errors import UserError
from train.benchmark.turns import Turn
from train.data.batches import Batches
from train.data.corpus import Sentences
from train.machine import cores

# "… Cost 9.25 * 4,031 @ 4,031 after 12,093 : Time 0.91s : 4421.04 words/s …": labels and seconds.
_UPDATE = re.compile(r"Cost \S+ \* ([\d,]+) .*?Time ([\d.]+)s")
_SETTLING = 2  # updates at the start of each turn that do not count


def marian_turn(config: TransformerConfig, batches: Batches, scratch: str) -> Callable[[int], Turn]:
    """Return a function that trains for a number of updates, from the beginning each time.

    The corpus holds the same token ids, written as words. An update has about as many target
    words as ours; it runs on one thread per core. Marian pads as it likes and does not report it.
    It computes in float32, whatever our dtype: on a CPU it trains in nothing else.

    Args:
      scratch: an empty folder.

    Raises:
      UserError: Marian has no such model.
    """
    if (config.norm, config.embeddings) != ("post", "shared"):
        raise UserError(
            "the Marian of this comparison is post-norm, with shared embeddings: use such a model"
        )
    folder, corpus = Path(scratch), batches.parts[0].corpus
    words = ["</s>", "<unk>", *(f"w{index}" for index in range(2, config.vocab_size))]
    lines = [f"{word}: {index}\n" for index, word in enumerate(words)]
    (folder / "vocabulary.yml").write_text("".join(lines))
    _write_words(corpus.source, folder / "source")
    _write_words(corpus.target, folder / "target")
    threads = cores()
    command: list[Any] = [sys.executable, "-m", "pymarian", "train", "--type", "transformer"]
    command += ["--train-sets", f"{folder}/source", f"{folder}/target"]
    command += ["--vocabs", *[f"{folder}/vocabulary.yml"] * 2, "--model", f"{folder}/model.npz"]
    command += ["--dim-vocabs", *[str(config.vocab_size)] * 2, "--overwrite"]
    command += ["--dim-emb", config.d_model, "--transformer-dim-ffn", config.d_ff]
    command += ["--transformer-heads", config.num_heads, "--transformer-postprocess", "dan"]
    command += ["--enc-depth", config.encoder_layers, "--dec-depth", config.decoder_layers]
    command += ["--tied-embeddings-all", "--transformer-dropout", config.dropout]
    command += ["--transformer-ffn-activation", config.activation]
    command += ["--label-smoothing", config.label_smoothing, "--learn-rate", 1e-4]
    command += ["--optimizer-params", 0.9, 0.98, 1e-9, "--clip-norm", 0]
    positions = batches.rows_per_batch * batches.target_length
    command += ["--mini-batch", 10_000, "--mini-batch-words", positions]
    command += ["--maxi-batch", 100, "--maxi-batch-sort", "trg", "--sync-sgd"]
    command += ["--max-length", batches.target_length, "--cpu-threads", threads]
    command += ["--disp-freq", 1, "--workspace", 2000, "--no-reload"]

    def turn(steps: int) -> Turn:
        stop = ["--after-batches", steps + _SETTLING]
        done = subprocess.run(
            list(map(str, command + stop)), capture_output=True, text=True, cwd=folder
        )
        log = done.stdout + done.stderr
        updates = [
            (int(match[1].replace(",", "")), float(match[2])) for match in _UPDATE.finditer(log)
        ][_SETTLING:]
        if done.returncode or not updates:
            last = log.strip().splitlines()[-1:] or ["no output"]
            raise UserError(f"Marian has failed: {last[0]}")
        tokens, seconds = map(list, zip(*updates, strict=True))
        return Turn(seconds, [0.0] * len(seconds), tokens, tokens)

    return turn


def _write_words(side: Sentences, path: Path) -> None:
    with path.open("w") as file:
        for pair in range(len(side.lengths)):
            ids = side.take(np.array([pair]))[:-1]  # without eos
            file.write(" ".join(f"w{index}" for index in ids) + "\n")
