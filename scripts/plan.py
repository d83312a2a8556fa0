"""What a run needs on each device, by name, before anything is allocated.

python scripts/plan.py RECIPE --devices N [--section.field value ...]

Takes all options of train.py, and those below. Needs no GPU: it compiles the train step for N CPU
devices and runs nothing.
"""

import json
import math
import sys
import time
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from arcface_jax import errors
from arcface_jax.config import loading
from arcface_jax.machine import plan


@dataclass(frozen=True)
class Arguments:
    """What is not part of a recipe."""

    memory: float = 80.0
    """Memory of one device in GiB; an H100 or A100 has 80."""
    num_classes: int | None = None
    """Identities to plan for, 93431 in MS1MV3; those of data.path when not given."""


LABELS = {
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


def table(planned: plan.Plan) -> Table:
    """Bytes on each device by name."""
    rows = Table(show_footer=True)
    rows.add_column("on each device", "total")
    rows.add_column("MiB", f"{planned.total / 2**20:,.1f}", justify="right")
    for name, size in planned.needed.items():
        rows.add_row(LABELS[name], f"{size / 2**20:,.1f}")
    return rows


def main(argv: list[str]) -> None:
    """The command."""
    begin = time.perf_counter()
    arguments, words = tyro.cli(
        Arguments, args=argv, prog="plan.py RECIPE", description=__doc__, return_unknown_args=True
    )
    with errors.reported():
        config = loading.load(words, prog="plan.py")
        if not 0 < arguments.memory < math.inf:
            raise errors.UserError(
                f"--memory {arguments.memory:g} must be above 0: GiB of a device, 80 for an H100"
            )
        plan.use_cpu_devices(config.devices)
        num_classes, origin = plan.count_classes(
            config.data, arguments.num_classes, seed=config.seed
        )
        memory = int(arguments.memory * plan.GIB)
        planned = plan.make(config, num_classes=num_classes, memory=memory)
    print(f"{config.model.network}, {num_classes:,} classes ({origin}), devices {config.devices}")
    Console().print(table(planned))
    print(*plan.in_words(planned, config.model, num_classes=num_classes), sep="\n")
    seconds = round(time.perf_counter() - begin, 1)
    print("RESULT " + json.dumps({**planned.results(), "seconds": seconds, "files": []}))


if __name__ == "__main__":
    main(sys.argv[1:])
