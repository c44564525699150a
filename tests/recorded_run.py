"""Run directories with metrics but no model, from which reports are drawn."""

import json
import math
from pathlib import Path

from jaxformer.run_directory import write_config
from small_run import small_config

MACHINE = {"device": "cpu", "devices": 1, "cores": 2, "python": "3.12.1", "jax": "0.12.0"}
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
STEP_SECONDS, EVALUATE_SECONDS, SAVE_SECONDS, COMPILE_SECONDS = 0.5, 7.0, 2.0, 30.0


def write_recorded_run(
    run: Path, *, reports: int = 40, every: int = 50, old: bool = False, **changes: object
) -> Path:
    """Write a run of so many training reports, with an evaluation after each quarter of them.

    Its data does not exist. An `old` run lacks what early versions did not record.
    """
    config = small_config(run.parent / "nowhere", run=str(run), **changes)
    run.mkdir(parents=True)
    write_config(run, config.to_dict())
    records = [] if old else [{"step": 0, "split": "start", "time": 1.0, **MACHINE}]
    time = 1.0
    for number in range(reports + 1):
        step = max(1, number * every)
        seconds = COMPILE_SECONDS if number == 0 else STEP_SECONDS * every
        time += seconds
        loss = 2.0 + 6.0 / math.sqrt(step)
        record = {
            "step": step,
            "split": "train",
            "time": round(time, 3),
            "loss": loss,
            "nll": loss - 0.5,
            "perplexity": math.exp(loss - 0.5),
            "gradient_norm": 1.0 + math.sin(number) / 2,
            "learning_rate": 1e-3 * min(step / 200, (200 / step) ** 0.5),
            "target_tokens": 100.0 * seconds,
            "tokens_per_second": 100.0,
            "padding": 0.04,
            "host_wait": 0.01,
            "epoch": step / 1000,
        }
        if old:
            del record["padding"]
        elif number == 0:
            del record["tokens_per_second"]
            record["compile_seconds"] = seconds
        records.append(record)
        if number and number % max(1, reports // 4) == 0:
            time += EVALUATE_SECONDS
            score = {"bleu": 40.0 * number / reports, "chrf": 60.0 * number / reports}
            score |= {"exact_match": 0.1, "bleu_signature": SIGNATURE, "chrf_signature": "nc:6"}
            losses = {"loss": loss + 0.3, "perplexity": math.exp(loss - 0.2)}
            records.append(
                {"step": step, "split": "validation", "time": round(time, 3), **losses, **score}
            )
            time += SAVE_SECONDS
    records.append({"step": step, "split": "final_test", "time": round(time + 3.0, 3), **score})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(lines)
    return run
