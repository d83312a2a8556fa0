"""Examines this machine for a recipe, and says what will be the bottleneck.

python scripts/doctor.py RECIPE [--section.field value ...]

Takes all options of train.py, and those below. Exit code 1 where a run would fail.
"""

import json
import sys
import time
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from arcface_jax import errors
from arcface_jax.config import loading
from arcface_jax.machine import doctor


@dataclass(frozen=True)
class Arguments:
    """What is not part of a recipe."""

    num_classes: int | None = None
    """Identities, where no --data.path tells them."""
    seconds: float = 3.0
    """For measuring how fast images come."""


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    begin = time.perf_counter()
    arguments, words = tyro.cli(
        Arguments, args=argv, prog="doctor.py RECIPE", description=__doc__, return_unknown_args=True
    )
    with errors.reported():
        config = loading.load(words, prog="doctor.py")
        if arguments.seconds <= 0 or (arguments.num_classes or 1) < 1:
            raise errors.UserError(
                f"--seconds {arguments.seconds:g} and --num-classes {arguments.num_classes} must "
                "be above 0"
            )
        found = list(
            doctor.examine(config, num_classes=arguments.num_classes, seconds=arguments.seconds)
        )
    table = Table("check", "verdict", "found", show_lines=True)
    for check in found:
        table.add_row(check.name, check.verdict, check.words)
    Console(markup=False).print(table)
    failing = [check.name for check in found if check.verdict == "fails"]
    result = {name: value for check in found for name, value in check.values.items()}
    result |= {
        "bottleneck": found[-1].words if found[-1].name == "bottleneck" else None,
        "fails": failing,
        "seconds": round(time.perf_counter() - begin, 1),
        "files": [],
    }
    print("RESULT " + json.dumps(result))
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
