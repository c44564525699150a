"""English to Korean on the built-in corpus: the first run, no download.

    python -m train fit quickstart

2 CPU cores (AMD EPYC, Zen 3), Python 3.11, JAX 0.10.2: 2 min 2 s from start to end, installation,
compilation and evaluation included; 97.7 % of the 1000 test sentences exactly right.
"""

from jaxformer.config import PRESETS
from train.config import CheckpointConfig, DataConfig, EvaluateConfig, OptimizerConfig, TrainConfig

config = TrainConfig(
    steps=440,
    log_every=50,
    model=PRESETS["tiny"].replace(
        vocab_size=2000,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.0,
        max_length=128,
    ),
    data=DataConfig(
        dataset="builtin",
        train=("train",),
        validation=("validation",),
        test=("test",),
        source="en",
        target="ko",
        target_length=32,
        batch_tokens=2048,
    ),
    optimizer=OptimizerConfig(peak_learning_rate=4e-3, warmup_steps=100),
    evaluate=EvaluateConfig(every=110, beam_size=1),
    checkpoint=CheckpointConfig(keep_last=3, average=3),
)
