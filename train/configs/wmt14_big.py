"""WMT14 English to German, the paper's big model (Table 2: BLEU 28.4 on newstest2014).

    python -m train fit wmt14_big

As wmt14_base, but 300k steps and the average of the last 20 checkpoints; 3.5 days on 8 P100.
Nothing has been measured with this file yet.
"""

import dataclasses

from jaxformer.config import PRESETS
from train.config import CheckpointConfig
from train.configs import wmt14_base

config = dataclasses.replace(
    wmt14_base.config,
    steps=300_000,
    model=PRESETS["big"].replace(dtype="bfloat16", scan_layers=True),
    checkpoint=CheckpointConfig(keep_last=20, average=20),
)
