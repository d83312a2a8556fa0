"""Check this machine for a recipe, and name the bottleneck.

    arcface-jax doctor ms1mv3_r50 --data.path FOLDER
    arcface-jax doctor my_recipe.py --num-classes 93431 --seconds 10

Takes all options of `train`, and those below. Exit code 1 if a check finds that a run would fail;
training itself checks more, such as the content of weights and verification sets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from arcface_jax import errors
from arcface_jax.commands import Result, command, console
from arcface_jax.config import command_line, loading


@dataclass(frozen=True)
class Arguments:
    """Options that are not part of a recipe."""

    num_classes: int | None = None
    """Number of identities, if there is no --data.path to read it from."""
    seconds: float = 3.0
    """Seconds to measure the input pipeline."""


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax doctor") -> Result:
    """Prints each check with its verdict."""
    arguments, others = command_line.parse_known(
        Arguments, words, prog=f"{prog} RECIPE", description=__doc__ or ""
    )
    config = loading.load(others, prog=prog)
    if not 0 < arguments.seconds < math.inf:
        raise errors.UserError(
            f"--seconds {arguments.seconds:g} must be above 0: seconds to measure, for instance 3"
        )
    from arcface_jax.machine import doctor, plan
    from arcface_jax.runtime import launch, tables

    if arguments.num_classes is not None:
        plan.check_num_classes(arguments.num_classes)
    launch.set_deterministic(config.deterministic)
    found = list(
        doctor.examine(config, num_classes=arguments.num_classes, seconds=arguments.seconds)
    )
    table = tables.new(None, [], names=["check", "verdict", "found"])
    table.show_lines = True
    for check in found:
        table.add_row(check.name, check.verdict, check.words)
    console().print(table)
    failing = [check.name for check in found if check.verdict == "fails"]
    values = {name: value for check in found for name, value in check.values.items()}
    values |= {
        "bottleneck": found[-1].words if found[-1].name == "bottleneck" else None,
        "fails": failing,
    }
    return Result(values, code=1 if failing else 0)
