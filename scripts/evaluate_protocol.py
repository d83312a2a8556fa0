"""Evaluates a network by rank retrieval, by groups of people, or on all pairs of many images.

python scripts/evaluate_protocol.py retrieval --checkpoint W --gallery FOLDER --probe FOLDER
python scripts/evaluate_protocol.py groups --checkpoint W --targets African.bin Asian.csv:FOLDER
python scripts/evaluate_protocol.py all-to-all --checkpoint W --data FOLDER
"""

import json
import sys
import time
from dataclasses import dataclass

import tyro
from rich.console import Console

from arcface_jax import errors
from arcface_jax.evaluation.protocols import runner
from arcface_jax.inference.open_model import ModelChoice, config_of, open_model


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    protocol: tyro.conf.Positional[runner.Protocol]
    model: tyro.conf.OmitArgPrefixes[ModelChoice]
    options: tyro.conf.OmitArgPrefixes[runner.Options]


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="evaluate_protocol.py", description=__doc__)
    begin = time.perf_counter()
    with errors.reported():
        report = runner.run(
            arguments.protocol,
            arguments.options,
            open_model=lambda: open_model(arguments.model, batch_size=arguments.options.batch_size),
            config=config_of(arguments.model),
        )
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(report.table, *report.notes, sep="\n")
    seconds = round(time.perf_counter() - begin, 1)
    print("RESULT " + json.dumps({**report.metrics, "seconds": seconds, "files": []}))


if __name__ == "__main__":
    main(sys.argv[1:])
