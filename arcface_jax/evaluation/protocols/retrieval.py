"""Retrieval by rank, as in TinyFace: is a probe's person among the first k of a gallery?

The gallery may have several images of a person and any number of distractors, faces of people that
no probe shows. A probe's rank is 1 + the number of images of others that score at least as high as
its best mate; rank-k accuracy is the share of probes whose rank is at most k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from arcface_jax.errors import DataError
from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.evaluation.protocols import identification
from arcface_jax.evaluation.protocols.labeled import NOBODY, Labeled

RANKS = (1, 5, 10, 20)


class Retrieval(NamedTuple):
    """Result of P probes in a gallery."""

    probes: int
    gallery: int
    """Number of images with a name."""
    distractors: int
    accuracy: dict[int, float]
    """Share of the probes found, by rank."""
    rank: np.ndarray
    """(P,) int64 from 1: rank of each probe."""


def retrieve(probes: Labeled, gallery: Labeled, *, distractors: Labeled | None = None) -> Retrieval:
    """Searches every probe in the gallery, distractors included.

    Raises:
      DataError: there are no probes, a probe has no name, its person is not in the gallery, or the
        features have different lengths.
    """
    parts = [gallery] if distractors is None else [gallery, distractors]
    _check_features(probes, gallery, distractors)
    vectors = np.concatenate([part.features for part in parts])
    # Distractors have no person, whatever their names, so they are no probe's mate.
    names = [gallery.people] + [np.full(len(p.people), NOBODY) for p in parts[1:]]
    _, number = np.unique(np.concatenate([*names, probes.people]), return_inverse=True)
    wrong = np.flatnonzero((probes.people == NOBODY) | ~np.isin(probes.people, gallery.people))
    if len(wrong):
        raise DataError(
            f"{len(wrong)} of {len(probes.people)} probes have no image in the gallery, the first "
            f"of {probes.people[wrong[0]]!r}: every probe needs its person there; look at the "
            "names of the folders or at the lists"
        )
    found = identification.search(
        normalize(probes.features),
        number[len(vectors) :],
        gallery=normalize(vectors),
        gallery_subjects=number[: len(vectors)],
    )
    named = int(np.count_nonzero(gallery.people != NOBODY))
    return Retrieval(
        probes=len(probes.people),
        gallery=named,
        distractors=len(vectors) - named,
        accuracy=accuracies(found.rank, RANKS),
        rank=found.rank,
    )


def _check_features(probes: Labeled, gallery: Labeled, distractors: Labeled | None) -> None:
    if not len(probes.people):
        raise DataError("there are no probes: name at least one face to search for")
    width = probes.features.shape[1]
    for name, part in (("gallery", gallery), ("distractors", distractors)):
        if part is not None and part.features.shape[1] != width:
            raise DataError(
                f"the probes have features of length {width}, the {name} of length "
                f"{part.features.shape[1]}: embed both with the same network"
            )


def accuracies(rank: np.ndarray, ranks: Sequence[int]) -> dict[int, float]:
    """Returns the share of the probes that are found at each rank or before it."""
    return {k: float(np.mean(rank <= k)) for k in ranks}
