"""Evaluates a network by rank retrieval, by groups of people, or on all pairs of many images.

python scripts/evaluate_protocol.py retrieval --checkpoint W --gallery FOLDER --probe FOLDER
python scripts/evaluate_protocol.py groups --checkpoint W --targets African.bin Asian.bin
python scripts/evaluate_protocol.py all-to-all --checkpoint W --data FOLDER
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from arcface_jax import errors
from arcface_jax.evaluation import labelled, protocols
from convert.any_model import ModelChoice, open_model


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    protocol: tyro.conf.Positional[Literal["retrieval", "groups", "all-to-all"]]
    model: tyro.conf.OmitArgPrefixes[ModelChoice]
    gallery: Path | None = None
    """Of retrieval: a folder with a folder for each person, a list `image person`, or an .npz."""
    probe: Path | None = None
    """Of retrieval: the same."""
    distractors: Path | None = None
    """Of retrieval: the same, or a folder of images; whose they are does not matter."""
    targets: tuple[str, ...] = ()
    """Of groups: verification sets, one for each."""
    data: Path | None = None
    """Of all-to-all: as the gallery."""
    fars: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)
    """Of all-to-all."""
    output: Path = Path("runs/protocol")
    """Where features of images are kept; a killed run goes on there."""
    mirrored: bool = True
    """Embed images as f(image) + f(mirrored image)."""
    batch_size: int = 256
    """Images per forward pass, over all devices."""
    threads: int = os.cpu_count() or 4
    """Threads that read images."""

    def read(self, name: str) -> labelled.Labelled:
        """The faces that an option names; .npz files need no network."""
        path = getattr(self, name)
        if path is None:
            raise errors.UserError(f"{self.protocol} needs --{name} FOLDER, a list, or an .npz")
        return labelled.read(
            path,
            lambda: open_model(self.model, batch_size=self.batch_size),
            output=self.output / f"features_{name}",
            mirrored=self.mirrored,
            threads=self.threads,
            progress=lambda done: print(f"{name}: {done:,} images", file=sys.stderr),
        )


def run(arguments: Arguments) -> protocols.Report:
    """The protocol that is named."""
    match arguments.protocol:
        case "retrieval":
            others = None if arguments.distractors is None else arguments.read("distractors")
            gallery = arguments.read("gallery")
            return protocols.ranks(arguments.read("probe"), gallery, distractors=others)
        case "groups":
            model = open_model(arguments.model, batch_size=arguments.batch_size)
            return protocols.compared_groups(model, arguments.targets)
        case "all-to-all":
            return protocols.all_pairs(arguments.read("data"), fars=arguments.fars)


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="evaluate_protocol.py", description=__doc__)
    begin = time.perf_counter()
    with errors.reported():
        report = run(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(report.table, *report.notes, sep="\n")
    seconds = round(time.perf_counter() - begin, 1)
    print("RESULT " + json.dumps({**report.metrics, "seconds": seconds, "files": []}))


if __name__ == "__main__":
    main(sys.argv[1:])
