"""Tables and metrics of retrieval, of groups and of all pairs of images, for printing."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.embed import Model
from arcface_jax.evaluation.protocols import all_to_all, groups, retrieval
from arcface_jax.evaluation.protocols.labeled import NOBODY, Labeled
from arcface_jax.runtime import tables


class Report(NamedTuple):
    """Results of a protocol."""

    table: Table
    notes: list[str]
    metrics: dict[str, Any]


def ranks(probes: Labeled, gallery: Labeled, *, distractors: Labeled | None) -> Report:
    """Runs `retrieval.retrieve` and reports it."""
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
    """Runs `groups.bias` on verification sets and reports it."""
    results = [verification.verify(model, pair_set) for pair_set in sets]
    found = groups.bias(results)
    return Report(
        groups.table(results, found), [groups.remark(found)], groups.metrics(results, found)
    )


def all_pairs(faces: Labeled, *, fars: Sequence[float]) -> Report:
    """Runs `all_to_all.tar_at_far`, without unnamed faces, and reports it."""
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
