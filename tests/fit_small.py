"""`python fit_small.py FOLDER name=value …`: train `small_config`, in a process of its own."""

import ast
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from jaxformer.errors import UserError
from small_run import small_config
from train.hosts import ProcessLost
from train.loop import fit
from train.preemption import Preempted


def main(folder: str, *changes: str) -> int:
    values = dict(change.split("=", 1) for change in changes)
    config = small_config(
        Path(folder), **{name: ast.literal_eval(value) for name, value in values.items()}
    )
    try:
        fit(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, ProcessLost):
            os._exit(error.status)  # as `train.cli.command` does
        return 1
    except Preempted:
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
