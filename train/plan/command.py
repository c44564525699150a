"""The command line of planning."""

import argparse
import os
from typing import Any

from jaxformer.errors import UserError
from train.arguments import config_names, list_of, load_config, override


def add_plan(commands: Any) -> None:
    """Add `plan` to the subcommands of `python -m train`."""
    plan = commands.add_parser(
        "plan",
        help="memory, time and cost of training on a machine that you do not have",
        description="Compile the training step and the search for TPU slices, or for the devices "
        "of this computer, and report the memory they need and the least time they take; nothing "
        "is run. --section.field VALUE changes any field of the configuration.",
    )
    plan.add_argument(
        "config", metavar="CONFIG", help=f"{', '.join(config_names())}, or a .py file"
    )
    plan.add_argument(
        "--topology",
        type=list_of(str),
        default=(),
        metavar="CHIP:AxB[xC],…",
        help="TPU slices, such as v5e:2x4,v5e:4x4,v5p:2x2x2; needs libtpu but no TPU",
    )
    plan.add_argument(
        "--rows-per-device",
        type=int,
        metavar="ROWS",
        help="let the batch grow with the machine, instead of dividing data.batch_tokens over it",
    )
    plan.add_argument("--plot", metavar="FILE.png", help="draw cost over the number of chips")
    plan.add_argument("--output", metavar="FILE", help="append the results, as JSON lines")
    plan.set_defaults(command=_plan)


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    prog = f"python -m train plan {options.config}"
    config = override(load_config(options.config), overrides, prog, own=vars(options))

    from jaxformer.pages.pictures import check_picture
    from train.plan.report import NOTHING_TO_DRAW, plan_tables, plot_plan
    from train.records import collect, keep_records

    if options.plot is not None:
        if len(options.topology) < 2:
            raise UserError(NOTHING_TO_DRAW)
        check_picture(options.plot)

    import jax

    # A program from the cache would not tell how long it takes to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.topology and "JAX_PLATFORMS" not in os.environ:
        # JAX would look for the TPU that libtpu is for.
        jax.config.update("jax_platforms", "cpu")

    from train.plan.machines import present_machine, tpu_machine
    from train.plan.plan import plan

    machines = [tpu_machine(name) for name in options.topology] or [present_machine()]
    planned = plan(config, machines, options.rows_per_device)
    records = collect(
        keep_records(options.output, planned), lambda records: plan_tables(records, machines)
    )
    if options.plot is not None:
        plot_plan(options.plot, records)
