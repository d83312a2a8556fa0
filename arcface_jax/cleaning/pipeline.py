"""Find the label errors of a training set: duplicates, then mixed identities, then outliers.

The order matters. Duplicates come first, because the best other identity of an image must not be
its own person under another label. Mixed identities are found on the unmodified set: dropping
outliers first would drop most of the smaller person. Outliers come last and skip the findings of
the first two.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from arcface_jax.cleaning import (
    duplicates,
    embedding,
    files,
    mixed,
    neighbors,
    outliers,
    photos,
    review,
    separation,
)
from arcface_jax.cleaning.duplicates import Duplicates
from arcface_jax.cleaning.embedding import Embedded
from arcface_jax.cleaning.identities import Identities
from arcface_jax.cleaning.mixed import Mixed
from arcface_jax.cleaning.outliers import Outliers
from arcface_jax.data import fingerprint
from arcface_jax.data.source import Source
from arcface_jax.errors import ImageError
from arcface_jax.evaluation.embed import Model
from arcface_jax.evaluation.embeddings import normalize

Kind = Literal["duplicates", "mixed", "outliers"]
KINDS: tuple[Kind, ...] = ("duplicates", "mixed", "outliers")
EMBEDDINGS = "embeddings"
"""Folder of the store, below the output."""
_COMPARED = 10  # images of an identity to compare for a common photograph


class Findings(NamedTuple):
    """Findings of the detectors; None for one that was not run."""

    duplicates: Duplicates | None
    mixed: Mixed | None
    outliers: Outliers | None
    rank_one: float | None
    """Rank-1 accuracy from `separation.rank_one`, without the errors that were found."""

    @property
    def weak(self) -> bool:
        """Whether the model is too weak to apply its findings."""
        return self.rank_one is None or self.rank_one < separation.ENOUGH


def find(
    images: Identities,
    *,
    kinds: Sequence[Kind] = KINDS,
    seed: int = 0,
    candidates: np.ndarray | None = None,
) -> Findings:
    """Runs the detectors in the right order.

    Args:
      images: the training set.
      kinds: which detectors to report; duplicates are always searched, because the others need
          them.
      seed: random seed of the split halves and samples.
      candidates: as `duplicates.find`.
    """
    same = duplicates.find(images, seed=seed, candidates=candidates)
    groups = same.groups(images.num_classes)
    two = mixed.find(images, seed=seed) if {"mixed", "outliers"} & set(kinds) else None
    several = None if two is None else two.label[two.mixed]
    wrong, rest = None, images
    if several is not None and "outliers" in kinds:
        wrong = outliers.find(images, groups=groups, mixed=several, seed=seed)
        dropped = np.zeros(len(images.labels), bool)
        dropped[wrong.image[wrong.wrong]] = True
        rest = images.without(dropped)
    return Findings(
        same if "duplicates" in kinds else None,
        two if "mixed" in kinds else None,
        wrong,
        separation.rank_one(rest, seed=seed, groups=groups, mixed=several),
    )


def by_images(
    model: Model,
    source: Source,
    output: Path,
    *,
    kinds: Sequence[Kind] = KINDS,
    seed: int = 0,
) -> tuple[Findings, list[Path]]:
    """Embeds all images once and writes the findings.

    Args:
      model: the network.
      source: the training set.
      output: folder for the embeddings and the findings.
      kinds: which detectors to run.
      seed: random seed of the split halves and samples.

    Returns:
      The findings, and the files.
    """
    images = embedding.of_source(source)
    embedded = embedding.embed(model, images, output / EMBEDDINGS, name="the training set")
    found = embedded.identities(source.labels(), source.num_classes)
    findings = find(found, kinds=kinds, seed=seed)
    return findings, write(findings, source, found, model, output, level="images")


def by_centers(
    model: Model, centers: np.ndarray, source: Source, output: Path, *, seed: int = 0
) -> tuple[Findings, list[Path]]:
    """Finds duplicates among class centers, and verifies candidates by embedding a few images.

    Args:
      model: the network.
      centers: (C, D) float32 class centers of its run.
      source: the training set of that run.
      output: folder for the embeddings and the findings.
      seed: random seed of the split halves.

    Returns:
      The findings, and the files.
    """
    labels = source.labels()
    candidates = nearest_centers(centers, labels)
    chosen = some_images(labels, np.unique(candidates))
    images = embedding.of_source(source, chosen=chosen)
    some = embedding.embed(model, images, output / EMBEDDINGS, name="the candidates")
    whole = np.zeros((len(labels), some.embeddings.shape[1]), np.float32)
    whole[chosen] = some.embeddings
    out = np.setdiff1d(np.arange(len(labels)), chosen).tolist()
    unreadable = {int(chosen[place]): text for place, text in some.unreadable.items()}
    found = Embedded(whole, dict.fromkeys(out, "") | unreadable).identities(
        labels, source.num_classes
    )
    findings = find(found, kinds=("duplicates",), seed=seed, candidates=candidates)
    return findings, write(findings, source, found, model, output, level="centers")


def nearest_centers(centers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns (p, 2) int64: each class with images and its nearest other one.

    Args:
      centers: (C, D) float32.
      labels: (n,) identities of the images.
    """
    present = np.unique(labels[labels >= 0])
    unit = normalize(centers)[present]
    rows, _ = neighbors.nearest(unit, 1)
    return np.stack([present, present[rows[:, 0]]], axis=1)


def some_images(labels: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """Returns (n,) int64 ascending: the first images of each identity, at most
    `duplicates.SAMPLE`.
    """
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], identities)
    ends = np.searchsorted(labels[order], identities, side="right")
    ends = np.minimum(ends, starts + duplicates.SAMPLE)
    parts = [order[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    return np.sort(np.concatenate(parts))


def write(
    findings: Findings,
    source: Source,
    images: Identities,
    model: Model,
    output: Path,
    *,
    level: str,
) -> list[Path]:
    """Writes duplicates.csv, mixed.csv, images.csv, clean.json and report.html; returns the
    paths.
    """
    output.mkdir(parents=True, exist_ok=True)
    written, thresholds, notes = [], {}, {}
    if findings.duplicates is not None:
        written.append(_write_duplicates(findings.duplicates, source, images, output))
        thresholds["duplicates"] = vars(findings.duplicates.threshold)
        notes[files.DUPLICATES] = findings.duplicates.threshold.text()
    if findings.mixed is not None:
        written.append(_write_mixed(findings.mixed, images, output))
        thresholds["mixed"] = vars(findings.mixed.threshold)
        notes[files.MIXED] = findings.mixed.threshold.text()
    if findings.outliers is not None:
        written.append(_write_outliers(findings.outliers, source, images, output))
        written.append(_write_issues(findings.outliers, images, output))
        thresholds["outliers"] = vars(findings.outliers.threshold)
        notes[files.IMAGES] = findings.outliers.threshold.text()
    about: dict[str, Any] = {
        "level": level,
        "model": model.digest(),
        "data": fingerprint.of_source(source),
        "rank_one": findings.rank_one,
        "weak": findings.weak,
        "thresholds": thresholds,
    }
    written.append(files.write_about(output, about, files=written))
    halves = () if findings.mixed is None else findings.mixed.halves
    shown = {"notes": notes, "halves": halves, "weak": findings.weak}
    return [*written, review.write(output, source, images, **shown)]


def _write_duplicates(found: Duplicates, source: Source, images: Identities, output: Path) -> Path:
    counts = np.bincount(_known(source.labels()), minlength=images.num_classes)
    groups = found.groups(images.num_classes)
    order, starts = images.sorted()
    rows = []
    for (a, b), score, mutual, merge in zip(
        found.pairs.tolist(), found.score, found.mutual, found.merge, strict=True
    ):
        one, other = (order[starts[x] : starts[x + 1]][:_COMPARED] for x in (a, b))
        group = groups[a] if groups[a] == groups[b] else ""
        photo = same_photo(source, images.embeddings, one, other)
        facts = (a, b, counts[a], counts[b], float(score), int(mutual), int(photo), group)
        rows.append((*facts, "merge" if merge else "review"))
    return files.write(output, files.DUPLICATES, rows)


def same_photo(
    source: Source, embeddings: np.ndarray, first: np.ndarray, second: np.ndarray
) -> bool:
    """Returns whether the most similar images of two identities are one photograph.

    Args:
      source: the training set.
      embeddings: (n, D) float32 of length 1, of its images.
      first: image numbers.
      second: image numbers.
    """
    cosine = embeddings[first] @ embeddings[second].T
    a, b = np.unravel_index(int(np.argmax(cosine)), cosine.shape)
    try:
        one, other = source[int(first[a])][0], source[int(second[b])][0]
    except ImageError:
        return False
    return photos.correlation(one, other) >= photos.SAME


def _write_mixed(found: Mixed, images: Identities, output: Path) -> Path:
    counts = images.counts()[found.label].tolist()
    sizes = [len(half) for half in found.halves]
    columns = (found.within, found.cross, found.score)
    rows = zip(
        found.label.tolist(),
        (count - size for count, size in zip(counts, sizes, strict=True)),
        sizes,
        *(map(float, column) for column in columns),
        ["review"] * len(sizes),
        strict=True,
    )
    return files.write(output, files.MIXED, rows)


def _write_outliers(found: Outliers, source: Source, images: Identities, output: Path) -> Path:
    rows = [
        (
            index,
            source.where(index),
            given,
            "" if suggested < 0 else suggested,
            own,
            other,
            "review",
        )
        for index, given, suggested, own, other in zip(
            found.image.tolist(),
            images.labels[found.image].tolist(),
            found.suggested.tolist(),
            found.own.tolist(),
            found.other.tolist(),
            strict=True,
        )
    ]
    return files.write(output, files.IMAGES, rows)


def _write_issues(found: Outliers, images: Identities, output: Path) -> Path:
    """Writes the same images under cleanlab's column names."""
    given = images.labels[found.image]
    predicted = np.where(found.suggested >= 0, found.suggested, given)
    quality = np.clip((1 - found.score) / 2, 0, 1)
    columns = (found.image, found.wrong, quality, given, predicted)
    return files.write(output, files.ISSUES, zip(*(c.tolist() for c in columns), strict=True))


def _known(labels: np.ndarray) -> np.ndarray:
    return labels[labels >= 0]
