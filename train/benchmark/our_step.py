"""The step of this project as `train.loop.fit` takes it, timed."""

import time
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxformer.transformer import Transformer
from train.benchmark.compiles import time_compiles
from train.benchmark.peaks import forget_process_peak, peak_memory
from train.benchmark.turns import Turn
from train.benchmark.work import Case, Kind, full_rows
from train.config import TrainConfig
from train.costs.hlo import Program
from train.costs.memory import program_memory
from train.data.batches import Batches
from train.parallel import make_runner
from train.prefetch import prefetch
from train.step import make_training


class OurStep:
    """The step of `train.loop.fit`, on random rows or on the corpus."""

    def __init__(self, kind: Kind, config: TrainConfig, case: Case, batches: Batches | None):
        self.devices = tuple(jax.local_devices()[: case.devices])
        self._batches, self._rows = batches, case.batch
        self._full_rows = full_rows(case)
        model = Transformer(case.model)
        training = make_training(model, config)
        runner = self._runner = make_runner(config, self.devices)
        state = runner.create(partial(training.create_state, jax.random.key(0)))
        self._rng = jax.random.key(1)
        self._done = 0

        def forward(params: Any, batch: dict, rng: jax.Array, **_: str) -> tuple[Any, Any]:
            logits = model.apply(
                {"params": params},
                batch["source_ids"],
                batch["target_ids"],
                source_segment_ids=batch["source_segment_ids"],
                target_segment_ids=batch["target_segment_ids"],
            )
            return params, logits

        # In place of a step's metrics there are logits: each device's own, which nobody reads.
        self._carry = state if kind == "train" else state.params
        self._step = runner.parallel_train_step(training.train_step if kind == "train" else forward)

    def compile(self) -> dict[str, Any]:
        """Compile, and return how long it took and what XLA says of the program."""
        arguments = self._carry, self._batch(0), self._rng
        with time_compiles() as compiles:
            self._step = self._step.lower(*arguments).compile()
        cost = self._step.cost_analysis()
        moved = Program(self._step.as_text()).bytes_moved()
        return compiles.seconds() | {
            "xla_flops": cost.get("flops", float("nan")) * len(self.devices),
            "bytes_moved": moved * len(self.devices),
            "program_memory_bytes": program_memory(self._step),
        }

    def turn(self, steps: int) -> Turn:
        """Take `steps` steps; batches of a corpus are prefetched, as in training."""
        which = range(self._done, self._done + steps)
        self._done += steps
        ready = map(self._batch, which) if self._batches is None else prefetch(self._batch, which)
        turn = Turn([], [], [], [])
        forget_process_peak()
        began = time.perf_counter()
        for batch in ready:
            got = time.perf_counter()
            self._carry, out = self._step(self._carry, batch, self._rng)
            jax.block_until_ready((self._carry, out))
            done = time.perf_counter()
            turn.seconds.append(done - began)
            turn.waited.append(got - began)
            turn.tokens.append(int(np.count_nonzero(batch["labels"])))
            turn.positions.append(batch["labels"].size)
            began = time.perf_counter()
        return turn._replace(peak_memory=peak_memory(self.devices))

    def _batch(self, step: int) -> dict[str, Any]:
        def read(rows: slice) -> dict[str, np.ndarray]:
            if self._batches is not None:
                return self._batches.at(step, rows)
            return {name: x[rows] for name, x in self._full_rows.items()}

        return self._runner.place(self._rows, read)
