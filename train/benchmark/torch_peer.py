"""The same work in PyTorch: `torch.nn.Transformer`, the way its users write it."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxformer.config import PAD_ID, TransformerConfig
from jaxformer.errors import UserError
from jaxformer.positions import sinusoid
from train.benchmark.peaks import forget_process_peak, process_peak
from train.benchmark.turns import Turn, take_turn
from train.machine import cores


def torch_turn(
    kind: str, config: TransformerConfig, batches: Sequence[dict[str, np.ndarray]], compiled: bool
) -> Callable[[int], Turn]:
    """Return a function that takes steps over `batches`, on a GPU if there is one.

    Adam, dropout where the model has it, label smoothing, tied embeddings, post- or pre-norm as in
    `config`; bfloat16 by autocast, attention by `scaled_dot_product_attention`, a thread per core.

    Args:
      kind: "train" or "forward", the latter without gradients and dropout.
      batches: padded ids and labels.
      compiled: use `torch.compile`; its programs, one for each shape, are compiled here.

    Raises:
      UserError: PyTorch has no such model.
    """
    import torch
    from torch import nn

    if config.activation not in ("relu", "gelu") or config.embeddings != "shared":
        raise UserError("the PyTorch peer has relu or gelu, and tied embeddings: use such a model")
    torch.set_num_threads(cores())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which is XLA's default there

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
            longest = max(max(b["source_ids"].shape[1], b["labels"].shape[1]) for b in batches)
            table = np.asarray(sinusoid(jnp.arange(longest)[None], config.d_model)[0])
            self.positions = nn.Buffer(torch.tensor(table))
            self.dropout = nn.Dropout(config.dropout)
            self.transformer = nn.Transformer(
                config.d_model,
                config.num_heads,
                config.encoder_layers,
                config.decoder_layers,
                config.d_ff,
                config.dropout,
                config.activation,
                batch_first=True,
                norm_first=config.norm == "pre",
            )
            # Its layers would drop attention weights and hidden units too, at the same rate.
            for module in self.transformer.modules():
                if isinstance(module, nn.MultiheadAttention):
                    module.dropout = config.attention_dropout
                elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                    module.dropout.p = config.activation_dropout

        def embed(self, ids: Any) -> Any:
            x = self.embedding(ids) * config.d_model**0.5
            return self.dropout(x + self.positions[: ids.shape[1]])

        def forward(self, source: Any, target: Any, padding: Any, future: Any) -> Any:
            hidden = self.transformer(
                self.embed(source),
                self.embed(target),
                tgt_mask=future,
                src_key_padding_mask=padding,
                memory_key_padding_mask=padding,
                tgt_is_causal=True,
            )
            return hidden @ self.embedding.weight.T

    torch.manual_seed(0)
    model: Any = Model().to(device)
    training = kind == "train"
    model.train(training)
    run = torch.compile(model, dynamic=False) if compiled else model
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    def tensors(batch: dict[str, np.ndarray]) -> tuple[Any, ...]:
        source, target, labels = (
            torch.tensor(batch[name], device=device, dtype=torch.long)
            for name in ("source_ids", "target_ids", "labels")
        )
        padding = source == PAD_ID
        length = target.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        counts = int(np.count_nonzero(batch["labels"])), labels.numel()
        return source, target, (padding if bool(padding.any()) else None), future, labels, counts

    on_device = [tensors(batch) for batch in batches]
    ready = cycle(on_device)

    def step(batch: tuple[Any, ...] | None = None) -> tuple[int, int]:
        source, target, padding, future, labels, counts = batch or next(ready)
        with torch.set_grad_enabled(training), autocast:
            logits = run(source, target, padding, future)
            if training:
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1),
                    labels.flatten(),
                    ignore_index=PAD_ID,
                    label_smoothing=config.label_smoothing,
                )
        if training:
            adam.zero_grad()
            loss.backward()
            adam.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return counts

    if compiled:
        kinds = {(b[0].shape, b[1].shape, b[2] is None): b for b in on_device}
        torch._dynamo.config.recompile_limit = 2 * len(kinds) + 8
        for batch in kinds.values():
            step(batch)

    def turn(steps: int) -> Turn:
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        forget_process_peak()
        taken = take_turn(step, steps)
        peak = torch.cuda.max_memory_allocated() if on_gpu else process_peak()
        return taken._replace(peak_memory=peak)

    return turn
