"""Measure every network and its exports, and write the table of docs/modelzoo.md.

python scripts/modelzoo.py [--forms] [--networks r18 r50] [--faces lfw_dev.bin]

Rows of other networks are kept, in docs/modelzoo.json and on the page; for the table of --forms, in
docs/modelzoo.forms.json.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from arcface_jax import errors
from arcface_jax.commands import Result, command
from arcface_jax.config import command_line
from arcface_jax.models import registry
from benchmarks import modelzoo, pages, weight_forms


@dataclass(frozen=True)
class Arguments:
    """Options of `modelzoo.py`."""

    networks: tuple[str, ...] = registry.NETWORKS
    """Networks to measure, each in a separate process; by default all."""
    faces: Path | None = None
    """A verification set (.bin) whose first 16 images are used; by default synthetic faces."""
    forms: bool = False
    """Measure the other table: weights written to each format and read back."""
    page: Path = Path("docs/modelzoo.md")
    """The page; its data goes to a .json file of the same name."""


@command
def main(words: Sequence[str], *, prog: str = "modelzoo.py") -> Result:
    """Measures the networks one by one and updates the page after each."""
    arguments = command_line.parse(
        Arguments, words, prog=prog, description=__doc__ or "", options_only=True
    )
    kind = weight_forms if arguments.forms else modelzoo
    data = arguments.page.with_suffix(".forms.json" if arguments.forms else ".json")
    rows = []
    unknown = [name for name in arguments.networks if name not in registry.NETWORKS]
    if unknown:
        raise errors.UserError(
            f"unknown networks {', '.join(unknown)}: use some of {', '.join(registry.NETWORKS)}"
        )
    for network in arguments.networks:
        with Console(stderr=True).status(network):
            row = modelzoo.measure_apart(network, arguments.faces, module=kind.__name__)
        print(kind.table([row]).splitlines()[-1], flush=True)
        rows.append(row)
        # At once: the next network may need more memory than there is.
        text = kind.table(modelzoo.merge(data, [row]))
        pages.replace(arguments.page, text, begin=kind.BEGIN)
    return Result({row["network"]: row for row in rows}, [arguments.page, data])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
