"""WMT14 English to German, the paper's base model (Table 2: BLEU 27.3 on newstest2014).

    python -m train fit wmt14_base

Reads wmt/wmt14 from the Hugging Face hub: 4.5 million pairs. The paper's recipe: 25k target tokens
a batch, warm-up 4000, 100k steps, average of the last 5 checkpoints, beam 4, length penalty 0.6;
12 hours on 8 P100. Nothing has been measured with this file yet.
"""

from jaxformer.config import PRESETS
from train.config import CheckpointConfig, DataConfig, EvaluateConfig, OptimizerConfig, TrainConfig

config = TrainConfig(
    steps=100_000,
    log_every=100,
    model=PRESETS["base"].replace(dtype="bfloat16", scan_layers=True),
    data=DataConfig(
        dataset="wmt/wmt14",
        dataset_config="de-en",
        train=("train",),
        validation=("validation",),
        test=("test",),
        source="translation.en",
        target="translation.de",
        source_length=256,  # both multiples of 128, for the attention kernel on TPU
        target_length=256,
        batch_tokens=25_600,
    ),
    optimizer=OptimizerConfig(warmup_steps=4000),
    evaluate=EvaluateConfig(every=1500),
    checkpoint=CheckpointConfig(keep_last=5, average=5),
)
