"""Tables and figures of retrieval, of groups and of all pairs of images, for a command to print."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.embed import Model
from arcface_jax.evaluation.protocols import all_to_all, groups, retrieval
from arcface_jax.evaluation.protocols.labelled import NOBODY, Labelled


class Report(NamedTuple):
    """What a protocol found."""

    table: Table
    notes: list[str]
    metrics: dict[str, Any]


def ranks(probes: Labelled, gallery: Labelled, *, distractors: Labelled | None) -> Report:
    """`retrieval.retrieve`."""
    found = retrieval.retrieve(probes, gallery, distractors=distractors)
    counts = (
        f"{found.probes:,} probes in {found.gallery:,} images of people and "
        f"{found.distractors:,} distractors"
    )
    table = _table("share of the probes found")
    for rank in found.accuracy:
        table.add_column(f"rank {rank}", justify="right")
    table.add_row(*(f"{value:.4f}" for value in found.accuracy.values()))
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
    table = _table("TAR over all pairs of images")
    for head in ("FAR", "TAR", "95 % interval", "threshold, cosine"):
        table.add_column(head, justify="right")
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


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
