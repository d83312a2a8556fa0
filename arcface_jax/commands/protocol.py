"""Evaluate a network by rank retrieval, by groups of people, or on all pairs of many images.

arcface-jax protocol retrieval --workdir WORKDIR --gallery FOLDER --probe FOLDER
arcface-jax protocol groups --workdir WORKDIR --targets African.bin Asian.csv:FOLDER
arcface-jax protocol all-to-all --workdir WORKDIR --data FOLDER
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from arcface_jax.commands import Result, command, console, own_options
from arcface_jax.config import command_line
from arcface_jax.config.choices import RankProtocol
from arcface_jax.config.command_line import Positive
from arcface_jax.errors import UserError
from arcface_jax.inference.open_model import ModelChoice, config_of, open_model

if TYPE_CHECKING:
    from arcface_jax.evaluation.protocols.labeled import Labeled
    from arcface_jax.evaluation.protocols.reports import Report


@dataclass(frozen=True)
class Options:
    """Faces, and how to embed them."""

    gallery: Path | None = None
    """retrieval: a folder with a folder for each person, a list `image person`, or an .npz."""
    probe: Path | None = None
    """retrieval: as --gallery."""
    distractors: Path | None = None
    """retrieval: as --gallery, or a folder of images; their identities do not matter."""
    targets: tuple[str, ...] = ()
    """groups: verification sets, one per group; by default the targets of the run."""
    data: Path | None = None
    """all-to-all: as --gallery."""
    fars: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)
    """all-to-all: false accept rates."""
    output: Path = Path("runs/protocol")
    """Folder for the features of images; the same command resumes there."""
    flip: Annotated[bool, tyro.conf.arg(aliases=["--mirrored"])] = True
    """Embed images as f(image) + f(flipped image)."""
    batch_size: int = 256
    """Images per forward pass, over all devices."""
    threads: Positive = os.cpu_count() or 4
    """Threads that read images."""


@dataclass(frozen=True)
class Arguments:
    """Options of `protocol`."""

    protocol: Annotated[Positional[RankProtocol], tyro.conf.arg(metavar="PROTOCOL")]
    """retrieval, groups or all-to-all."""
    model: OmitArgPrefixes[ModelChoice]
    options: OmitArgPrefixes[Options]


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax protocol") -> Result:
    """Runs the protocol and prints its table."""
    arguments = command_line.parse(Arguments, words, prog=prog, description=__doc__ or "")
    counts: dict[str, int] = {}
    report = _run(arguments, counts)
    console().print(report.table, *report.notes, sep="\n")
    return Result({**report.metrics, **counts})


def _run(arguments: Arguments, counts: dict[str, int]) -> "Report":
    """Runs the protocol; `counts` gets the account of the images, for RESULT."""
    from arcface_jax.data.pairs.opening import open_for_runs
    from arcface_jax.evaluation import roc
    from arcface_jax.evaluation.protocols import labeled, reports

    protocol, options = arguments.protocol, arguments.options

    def opened():
        """Opens the network; .npz files need none."""
        return open_model(arguments.model, batch_size=options.batch_size)

    def read(name: str) -> "Labeled":
        path = getattr(options, name)
        if path is None:
            raise UserError(f"{protocol} needs --{name} FOLDER, a list, or an .npz")
        found = labeled.read(
            path,
            opened,
            output=options.output / f"features_{name}",
            flip=options.flip,
            threads=options.threads,
            progress=lambda done: print(f"{name}: {done:,} images", file=sys.stderr),
        )
        print(f"{name}: {found.account()}")
        counts[f"{name}/images"] = len(found.people)
        counts[f"{name}/ignored"] = sum(found.ignored.values())
        return found

    match protocol:
        case "retrieval":
            distractors = None if options.distractors is None else read("distractors")
            gallery = read("gallery")
            return reports.ranks(read("probe"), gallery, distractors=distractors)
        case "groups":
            model = opened()
            with own_options({"evaluation.targets": "--targets"}):
                sets = open_for_runs([config_of(arguments.model)], options.targets)
            for one in sets:
                print(one.account())
                counts.update(one.counts())
            return reports.compared_groups(model, sets)
        case "all-to-all":
            roc.check_fars(options.fars)  # before hours of embedding
            return reports.all_pairs(read("data"), fars=options.fars)
