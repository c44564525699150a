"""Multi30k English to German, lower-cased and tokenised: the text-only row of Wu et al. (2021).

    python -m train fit multi30k --data.path DIR

DIR holds {train,val,test_2016_flickr}.lc.norm.tok.{en,de}.

Published: BLEU 41.02 on test_2016_flickr (tokenised), with updates of about 8k target tokens, peak
rate 0.005 and at most 8000 updates. The updates here are a quarter as large and the rate is
lower, because both learn more an epoch.

Two cores of an AMD EPYC (Zen 4), shared, JAX 0.12, about an hour: BLEU 39.57 on test_2016_flickr,
40.35 on validation (tok:none, sacreBLEU 2.6.0), validation perplexity 5.63. Short of the published
score; on the training data perplexity is 4.06, with dropout, so more epochs alone may not do.
"""

from jaxformer.config import PRESETS
from train.config import CheckpointConfig, DataConfig, EvaluateConfig, OptimizerConfig, TrainConfig

config = TrainConfig(
    steps=7000,
    model=PRESETS["tiny"].replace(max_length=128),
    data=DataConfig(
        train=("train.lc.norm.tok",),
        validation=("val.lc.norm.tok",),
        test=("test_2016_flickr.lc.norm.tok",),
        source="en",
        target="de",
        target_length=64,
        batch_tokens=2048,
    ),
    optimizer=OptimizerConfig(peak_learning_rate=2e-3, warmup_steps=400, cooldown_steps=3000),
    evaluate=EvaluateConfig(
        every=440,
        patience=10,
        beam_size=5,
        length_penalty=1.0,
        length_penalty_form="power",
        bleu_tokenize="none",
    ),
    checkpoint=CheckpointConfig(keep_last=10, average=5),
)
