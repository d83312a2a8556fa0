"""Write a copy of a training set with the reviewer's decisions applied.

The new set's folder also has `applied.csv`, a line for each image or identity that was changed,
`label_map.csv` (`data.label_map`), and `cleaned.json`, which records its origin.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.cleaning import files
from arcface_jax.cleaning.identities import groups_of
from arcface_jax.config.choices import Bad
from arcface_jax.data import fingerprint, label_map
from arcface_jax.data.lists import SUFFIXES
from arcface_jax.data.source import Source
from arcface_jax.data.tools import list_writing, packing
from arcface_jax.data.tools.packing import Selection
from arcface_jax.errors import DataError, UserError
from arcface_jax.runtime import sealed
from arcface_jax.runtime.files import atomic, write_atomic
from arcface_jax.runtime.text import cells

APPLIED = "applied.csv"
ABOUT = "cleaned.json"


class Actions(NamedTuple):
    """Which decisions to apply."""

    merge: bool = False
    drop: bool = False
    relabel: bool = False


class Change(NamedTuple):
    """A line of applied.csv."""

    action: str
    """merge, drop or relabel."""
    image: int | str
    """Image number; empty for a whole identity."""
    path: str
    old_label: int
    new_label: int | str
    """Label in the new set; empty for dropped images."""
    source: str
    """File of the decision."""


class Plan(NamedTuple):
    """The new labels of the images, still numbered as in the old set."""

    labels: np.ndarray
    """(n,) int32: old label of the identity to which an image now belongs; -1 for none."""
    group: np.ndarray
    """(C,) int64: old label that represents an identity after merging."""
    changes: list[Change]
    undecided: int
    """Number of findings whose decision is review."""


class Applied(NamedTuple):
    """Summary of what was written."""

    files: list[Path]
    images: int
    identities: int
    merged: int
    """Number of identities that were merged into another."""
    dropped: int
    """Number of images that were left out."""
    relabeled: int
    undecided: int
    skipped: list[str]


def apply(
    source: Source,
    clean: Path,
    output: Path,
    *,
    actions: Actions,
    force: bool = False,
    bad: Bad = "stop",
    threads: int = 0,
) -> Applied:
    """Writes the set with the decisions applied.

    Args:
      source: the training set that was cleaned.
      clean: output folder of `data clean`.
      output: a new folder for a record file, or a new list (.csv) for sets of image files.
      actions: which decisions to apply.
      force: apply findings even if the model is too weak.
      bad: as `packing.pack`.
      threads: as `packing.pack`.

    Raises:
      DataError: the findings are of another set, or a file is damaged.
      UserError: no action is named, the model is too weak, or the output exists.
    """
    about = files.read_about(clean)
    _check(source, about, clean, actions, force=force)
    plan = make_plan(source, clean, actions)
    selection, mapped = select(source, plan)
    is_list = output.suffix.lower() in SUFFIXES
    folder = output.parent if is_list else output
    if (folder / label_map.FILE).exists():  # by which runs would move the centers of both sets
        raise UserError(
            f"{folder} has the {label_map.FILE} of another set: name an output in another folder"
        )
    if is_list:
        packed = list_writing.write(source, selection, output)
    else:
        packed = packing.pack(source, selection, output, bad=bad, threads=threads)
    final = [_renumbered(change, mapped) for change in plan.changes]
    new_names = packing.names_of(source, selection)
    provenance = _provenance(source, clean, about, actions)
    written = [
        label_map.write(folder, mapped, new_names),
        _write_changes(folder, final),
        _write_about(folder, provenance),
    ]
    merged = int((plan.group != np.arange(len(plan.group))).sum())
    dropped = int((plan.labels[source.labels() >= 0] < 0).sum())
    return Applied(
        [*packed.files, *written],
        packed.images,
        packed.identities,
        merged,
        dropped,
        sum(change.action == "relabel" for change in final),
        plan.undecided,
        packed.skipped,
    )


def make_plan(source: Source, clean: Path, actions: Actions) -> Plan:
    """Computes each image's new label: relabels images, merges identities, then drops.

    Raises:
      DataError: a file is damaged, or a decision names an unknown image or label.
    """
    labels = np.array(source.labels(), np.int32)
    group = np.arange(source.num_classes)
    changes: list[Change] = []
    undecided = 0
    dropped_labels: list[tuple[int, str]] = []
    images_path = clean / files.IMAGES
    for row in _rows(images_path, files.IMAGES):
        undecided += row["decision"] == "review"
        index = files.number(images_path, row, "index", below=len(labels))
        if row["decision"] == "relabel" and actions.relabel:
            new = files.number(images_path, row, "suggested_label", below=source.num_classes)
            changes.append(_of_image("relabel", source, index, int(labels[index]), new))
            labels[index] = new
        elif row["decision"] == "drop" and actions.drop:
            changes.append(_of_image("drop", source, index, int(labels[index]), ""))
            labels[index] = -1
    pairs = []
    path = clean / files.DUPLICATES
    counts = np.bincount(labels[labels >= 0], minlength=source.num_classes)
    for row in _rows(path, files.DUPLICATES):
        undecided += row["decision"] == "review"
        a, b = (files.number(path, row, c, below=len(group)) for c in ("label_a", "label_b"))
        if row["decision"] == "merge" and actions.merge:
            pairs.append((a, b))
        elif row["decision"] == "drop" and actions.drop:
            dropped_labels.append((a if counts[a] < counts[b] else b, files.DUPLICATES))
    path = clean / files.MIXED
    for row in _rows(path, files.MIXED):
        undecided += row["decision"] == "review"
        if row["decision"] == "drop" and actions.drop:
            dropped_labels.append((files.number(path, row, "label", below=len(group)), path.name))
    if pairs:
        group = _largest_of_each(groups_of(source.num_classes, np.array(pairs)), counts)
        for label in np.flatnonzero(group != np.arange(len(group))).tolist():
            changes.append(Change("merge", "", "", label, int(group[label]), files.DUPLICATES))
    for label, name in dict.fromkeys(dropped_labels):
        changes.append(Change("drop", "", "", label, "", name))
        labels[labels == label] = -1
    moved = np.where(labels >= 0, group[labels], -1).astype(np.int32)
    return Plan(moved, group, [_settled(c, group) for c in changes], undecided)


def select(source: Source, plan: Plan) -> tuple[Selection, np.ndarray]:
    """Returns the images of the new set, and the new label of each old one.

    Returns:
      The selection, which renumbers the remaining identities in their old order; and (C,) int64,
      the new label of each old one, -1 if it has no images left.
    """
    kept = np.flatnonzero(plan.labels >= 0)
    if not len(kept):
        raise DataError("every image is dropped: set fewer decisions to drop")
    order = kept[np.argsort(plan.labels[kept], kind="stable")]
    identities, new = np.unique(plan.labels[order], return_inverse=True)
    selection = Selection(order, new.astype(np.int32), len(identities), identities)
    place = np.full(source.num_classes, -1, np.int64)
    place[identities] = np.arange(len(identities))
    return selection, place[plan.group]


def groups_in(path: Path, *, num_classes: int) -> np.ndarray:
    """Returns (C,) int64: groups of identities that may be one person, from duplicates.csv.

    Both pairs to merge and pairs to review count, because a split must not separate undecided
    pairs.

    Args:
      path: path of the file.
      num_classes: C.

    Raises:
      DataError: the file is damaged, or of another set.
    """
    pairs = [
        [files.number(path, row, column, below=num_classes) for column in ("label_a", "label_b")]
        for row in files.read(path, files.DUPLICATES)
        if row["decision"] in ("merge", "review")
    ]
    return groups_of(num_classes, np.array(pairs, np.int64).reshape(-1, 2))


def select_merged(source: Source, path: Path, *, counts: Sequence[int]) -> Selection:
    """Selects all images of joined sets, merging identities of the first two by a merge.csv.

    Args:
      source: the joined sets.
      path: path of merge.csv.
      counts: identities of the first and of the second set.

    Raises:
      DataError: the file is damaged, or of other sets.
    """
    pairs = [
        [
            files.number(path, row, "label_a", below=counts[0]),
            counts[0] + files.number(path, row, "label_b", below=counts[1]),
        ]
        for row in files.read(path, files.MERGE)
        if row["decision"] == "merge"
    ]
    group = groups_of(source.num_classes, np.array(pairs, np.int64).reshape(-1, 2))
    labels = source.labels()
    moved = np.where(labels >= 0, group[labels], -1).astype(np.int32)
    return select(source, Plan(moved, group, [], 0))[0]


def _rows(path: Path, name: str) -> Iterator[files.Row]:
    """Yields the rows of a file; none if its detector was not run."""
    return iter(files.read(path, name) if path.exists() else ())


def _of_image(action: str, source: Source, index: int, old: int, new: int | str) -> Change:
    return Change(action, index, source.where(index), old, new, files.IMAGES)


def _settled(change: Change, group: np.ndarray) -> Change:
    """Replaces the label that an image was moved to by the label of its group."""
    if change.new_label == "":
        return change
    return change._replace(new_label=int(group[change.new_label]))


def _renumbered(change: Change, mapped: np.ndarray) -> Change:
    """Replaces the label that an image was moved to by its number in the new set.

    Moved to an identity that was dropped, the image was dropped with it.
    """
    if change.new_label == "":
        return change
    new = int(mapped[change.new_label])
    return (
        change._replace(new_label=new) if new >= 0 else change._replace(action="drop", new_label="")
    )


def _largest_of_each(group: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Labels each group by its identity with most images; ties go to the lower label."""
    order = np.lexsort((np.arange(len(group)), -counts, group))
    _, first = np.unique(group[order], return_index=True)
    return order[first][np.unique(group, return_inverse=True)[1]]


def _check(
    source: Source, about: dict[str, Any], clean: Path, actions: Actions, *, force: bool
) -> None:
    if not any(actions):
        raise UserError("nothing to apply: name --merge, --drop or --relabel")
    if fingerprint.comparable(about["data"]):
        different = fingerprint.differences(about["data"], fingerprint.of_source(source))
        if different:
            raise DataError(
                f"{clean} is of another training set ({'; '.join(different)}): name the set that "
                "was cleaned, or run `data clean` on this one"
            )
    if about.get("weak") and not force:
        rate = about.get("rank_one")
        shown = "unknown" if rate is None else f"{rate:.2f}"
        raise UserError(
            f"{clean} was made with a model too weak for this set (rank-1 of half identities "
            f"{shown}): use a stronger model, or --force if you reviewed every decision"
        )


def _provenance(
    source: Source, clean: Path, about: dict[str, Any], actions: Actions
) -> dict[str, Any]:
    present = [p for p in (clean / name for name in files.COLUMNS) if p.exists()]
    return {
        "data": fingerprint.of_source(source),
        "model": about.get("model"),
        "actions": actions._asdict(),
        "decisions": {path.name: sealed.file_digest(path) for path in present},
    }


def _write_about(folder: Path, content: dict[str, Any]) -> Path:
    write_atomic(folder / ABOUT, json.dumps(content, indent=2) + "\n")
    return folder / ABOUT


def _write_changes(folder: Path, changes: list[Change]) -> Path:
    with atomic(folder / APPLIED, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Change._fields)
        writer.writerows(map(cells, changes))
    return folder / APPLIED
