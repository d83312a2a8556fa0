"""Report the memory that a run needs on each device, by name, before anything is allocated.

    arcface-jax plan ms1mv3_r50 --devices 8 --num-classes 93431
    arcface-jax plan my_recipe.py --devices 8 --memory 40 --data.global-batch-size 1024

Takes all options of `train`, and those below. Needs no GPU: it compiles the train step for N CPU
devices and runs nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arcface_jax import errors
from arcface_jax.commands import Result, command, console
from arcface_jax.config import command_line, loading

if TYPE_CHECKING:
    from rich.table import Table

    from arcface_jax.machine.plan import Plan


@dataclass(frozen=True)
class Arguments:
    """Options that are not part of a recipe."""

    memory: float = 80.0
    """Memory of one device in GiB; an H100 or A100 has 80."""
    num_classes: int | None = None
    """Identities to plan for, 93431 in MS1MV3; by default those of data.path."""


_LABELS = {
    "parameters": "backbone's parameters (whole)",
    "batch_norm": "BatchNorm's statistics (whole)",
    "optimizer": "backbone's optimizer (whole)",
    "centers": "class centers (its part)",
    "centers_optimizer": "centers' optimizer (its part)",
    "running_mean": "running mean of the weights (whole)",
    "scalars": "counters, margin's state (whole)",
    "batch": "uint8 images, labels (its part)",
    "activations": "activations and temporaries",
}


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax plan") -> Result:
    """Prints bytes by name, and what would fit."""
    arguments, others = command_line.parse_known(
        Arguments, words, prog=f"{prog} RECIPE", description=__doc__ or ""
    )
    config = loading.load(others, prog=prog)
    if not 0 < arguments.memory < math.inf:
        raise errors.UserError(
            f"--memory {arguments.memory:g} must be above 0: GiB of a device, 80 for an H100"
        )
    from arcface_jax.machine import plan

    plan.use_cpu_devices(config.devices)
    num_classes, origin = plan.count_classes(config.data, arguments.num_classes, seed=config.seed)
    memory = int(arguments.memory * plan.GIB)
    planned = plan.make(config, num_classes=num_classes, memory=memory)
    print(f"{config.model.network}, {num_classes:,} classes ({origin}), devices {config.devices}")
    console().print(_table(planned))
    print(*plan.in_words(planned, config.model, num_classes=num_classes), sep="\n")
    return Result(planned.results())


def _table(planned: "Plan") -> "Table":
    """Bytes on each device by name."""
    from arcface_jax.runtime import tables

    rows = tables.new(None, ["MiB"], names=["on each device"])
    for name, size in planned.needed.items():
        rows.add_row(_LABELS[name], f"{size / 2**20:,.1f}")
    rows.add_section()
    rows.add_row("total", f"{planned.total / 2**20:,.1f}")
    return rows
