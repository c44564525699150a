"""Run directories with random parameters: models of any configuration, without training."""

import functools
import io
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from jaxformer.checkpoints import save_params
from jaxformer.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID, TransformerConfig
from jaxformer.run_directory import save_tokenizers, write_config
from jaxformer.tokenizer import Tokenizer
from jaxformer.transformer import Transformer
from small_run import sentence_pairs

#: Widths, heads and depths that are all different.
CONFIG = TransformerConfig(
    vocab_size=61,
    d_model=24,
    d_ff=20,
    num_heads=3,
    encoder_layers=1,
    decoder_layers=2,
    max_length=32,
)
#: Compiles faster, and generates more than repetitions of its last token.
SEPARATE = CONFIG.replace(embeddings="separate")
SENTENCES = [source for source, _ in sentence_pairs(8)]


def write_random_run(run: Path, config: TransformerConfig) -> dict:
    """Write a run whose model gives clearly different translations; return its parameters."""
    params = random_params(config)
    write_config(run, {"model": config.to_dict()})
    save_params(run, 1, params)
    source_vocab_size = config.encoder_vocab_size
    save_tokenizers(run, tokenizer(source_vocab_size), tokenizer(config.vocab_size))
    return params


def random_params(config: TransformerConfig) -> dict:
    """Return parameters none of which is 0 or 1, with which hypotheses end every so often."""
    draw = np.random.default_rng(0)

    def random(path, leaf):
        # Larger values would make rounding errors grow from layer to layer.
        values = draw.normal(size=leaf.shape) * (1.0 if path[-1].key == "embedding" else 0.2)
        return (values + (path[-1].key == "scale")).astype(np.float32)

    ids = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), ids, ids)["params"]
    params = jax.tree.map_with_path(random, shapes)
    output = "output_embedding" if config.embeddings == "separate" else "embedding"
    params[output]["embedding"][EOS_ID] *= 2.0
    return params


@functools.cache
def params_of(config: TransformerConfig = SEPARATE) -> dict:
    """Return the same, on the device, but with eos no likelier than other tokens."""
    params = random_params(config)
    params["output_embedding"]["embedding"][EOS_ID] /= 2
    return jax.tree.map(jnp.asarray, params)


@functools.cache
def tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer for both languages of the small corpus."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain(*sentence_pairs(100)),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        pad_id=PAD_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())
