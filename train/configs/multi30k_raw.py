"""Multi30k English to German as people write it: cased, not tokenised.

    python -m train fit multi30k_raw --data.path DIR

DIR holds {train,val,test_2016_flickr}.{en,de}. With a network, the same from the hub:

    python -m train fit multi30k_raw --data.dataset bentrevett/multi30k \
        --data.validation validation --data.test test

The recipe is that of `multi30k`. With an earlier and shorter one, on two cores of an AMD EPYC
(Zen 3), JAX 0.12, test BLEU is 38.64, validation 40.00 (tok:13a, sacreBLEU 2.6.0), after 33 minutes
of steps:

    python -m train fit multi30k_raw --data.path DIR --steps 3080 --data.batch-tokens 4096 \
        --optimizer.peak-learning-rate 3e-3 --optimizer.warmup-steps 1000 \
        --optimizer.cooldown-steps 1100 --evaluate.every 220 --checkpoint.average 5
"""

import dataclasses

from train.configs import multi30k

config = dataclasses.replace(
    multi30k.config,
    data=dataclasses.replace(
        multi30k.config.data, train=("train",), validation=("val",), test=("test_2016_flickr",)
    ),
    evaluate=dataclasses.replace(multi30k.config.evaluate, bleu_tokenize="13a"),
)
