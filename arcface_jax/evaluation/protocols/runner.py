"""Tables and figures of retrieval, of groups and of all pairs of images, for a command to print."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from rich.table import Table

from arcface_jax.config import Config
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.data.pairs.opening import open_for_runs
from arcface_jax.errors import UserError
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.embed import Model
from arcface_jax.evaluation.protocols import all_to_all, groups, labelled, retrieval
from arcface_jax.evaluation.protocols.labelled import NOBODY, Labelled
from arcface_jax.runtime import tables


class Report(NamedTuple):
    """What a protocol found."""

    table: Table
    notes: list[str]
    metrics: dict[str, Any]


Protocol = Literal["retrieval", "groups", "all-to-all"]


@dataclass(frozen=True)
class Options:
    """What the command takes beside the network."""

    gallery: Path | None = None
    """Of retrieval: a folder with a folder for each person, a list `image person`, or an .npz."""
    probe: Path | None = None
    """Of retrieval: the same."""
    distractors: Path | None = None
    """Of retrieval: the same, or a folder of images; whose they are does not matter."""
    targets: tuple[str, ...] = ()
    """Of groups: verification sets, one for each; those of the run when not given."""
    data: Path | None = None
    """Of all-to-all: as the gallery."""
    fars: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)
    """Of all-to-all."""
    output: Path = Path("runs/protocol")
    """Where features of images are kept; a killed run goes on there."""
    flip: Annotated[bool, tyro.conf.arg(aliases=["--mirrored"])] = True
    """Embed images as f(image) + f(flipped image)."""
    batch_size: int = 256
    """Images per forward pass, over all devices."""
    threads: int = os.cpu_count() or 4
    """Threads that read images."""


def run(
    protocol: Protocol, options: Options, *, open_model: Callable[[], Model], config: Config
) -> Report:
    """The protocol that is named.

    Args:
      protocol: its name.
      options: which faces, and how.
      open_model: opens the network, where one is needed; .npz files need none.
      config: of the run that the network is of, whose data targets may belong to.

    Raises:
      UserError: an option is missing, or as the protocols.
    """

    def read(name: str) -> Labelled:
        path = getattr(options, name)
        if path is None:
            raise UserError(f"{protocol} needs --{name} FOLDER, a list, or an .npz")
        return labelled.read(
            path,
            open_model,
            output=options.output / f"features_{name}",
            flip=options.flip,
            threads=options.threads,
            progress=lambda done: print(f"{name}: {done:,} images", file=sys.stderr),
        )

    match protocol:
        case "retrieval":
            distractors = None if options.distractors is None else read("distractors")
            gallery = read("gallery")
            return ranks(read("probe"), gallery, distractors=distractors)
        case "groups":
            model = open_model()
            return compared_groups(model, open_for_runs([config], options.targets))
        case "all-to-all":
            return all_pairs(read("data"), fars=options.fars)


def ranks(probes: Labelled, gallery: Labelled, *, distractors: Labelled | None) -> Report:
    """`retrieval.retrieve`."""
    found = retrieval.retrieve(probes, gallery, distractors=distractors)
    counts = (
        f"{found.probes:,} probes in {found.gallery:,} images of people and "
        f"{found.distractors:,} distractors"
    )
    table = tables.new("share of the probes found", [f"rank {rank}" for rank in found.accuracy])
    table.add_row(*map(tables.share, found.accuracy.values()))
    metrics = {f"eval/retrieval/rank{rank}": value for rank, value in found.accuracy.items()}
    return Report(table, [counts], metrics)


def compared_groups(model: Model, sets: Sequence[PairSet]) -> Report:
    """`groups.bias` of verification sets."""
    results = [verification.verify(model, pair_set) for pair_set in sets]
    found = groups.bias(results)
    return Report(
        groups.table(results, found), [groups.remark(found)], groups.metrics(results, found)
    )


def all_pairs(faces: Labelled, *, fars: Sequence[float]) -> Report:
    """`all_to_all.tar_at_far`; faces of nobody in particular are left out."""
    named = faces.people != NOBODY
    vectors, people = faces.features[named], faces.people[named]
    found = all_to_all.tar_at_far(all_to_all.pairs_of(vectors, people), fars=fars)
    count = len(people) * (len(people) - 1) // 2
    heads = ["FAR", "TAR", "95 % interval", "threshold, cosine"]
    table = tables.new("TAR over all pairs of images", heads)
    for at in found:
        if at.tar is not None and at.interval is not None:
            interval = "{:.4f}-{:.4f}".format(*at.interval)
            table.add_row(at.label, f"{at.tar:.4f}", interval, f"{at.threshold:.4f}")
    notes = [f"all {count:,} pairs of {len(people):,} images"]
    notes += [
        f"too few pairs of different people for a FAR of {at.label} (needs {at.pairs_needed:,})"
        for at in found
        if at.tar is None
    ]
    metrics = {f"eval/all_to_all/tar@far={at.label}": at.tar for at in found if at.tar is not None}
    return Report(table, notes, metrics)
