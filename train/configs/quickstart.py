"""English to Korean on the built-in corpus: the first run, no download.

python -m train fit quickstart
"""

from jaxformer.config import PRESETS
from train.config import CheckpointConfig, DataConfig, EvaluateConfig, OptimizerConfig, TrainConfig

config = TrainConfig(
    steps=1000,
    log_every=25,
    model=PRESETS["tiny"].replace(
        vocab_size=1000, encoder_layers=2, decoder_layers=2, dropout=0.1, max_length=128
    ),
    data=DataConfig(
        dataset="builtin",
        train=("train",),
        validation=("validation",),
        test=("test",),
        source="en",
        target="ko",
        target_length=64,
        batch_tokens=4096,
    ),
    optimizer=OptimizerConfig(peak_learning_rate=5e-3, warmup_steps=200),
    evaluate=EvaluateConfig(every=250),
    checkpoint=CheckpointConfig(keep_last=2, average=1),
)
