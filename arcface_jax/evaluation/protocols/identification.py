"""Identification: which person of the gallery, if any, does a probe show?

A probe is compared with a whole gallery. It is mated if the gallery has its person. Its rank is 1 +
the number of templates of other people that score at least as high as its best mate: ties count
against the network, so a network with constant output has no rank 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from arcface_jax.errors import DataError
from arcface_jax.evaluation.roc import allowed

RANKS = (1, 5, 10)
FPIRS = (0.01, 0.1)
INSIGHTFACE, STANDARD = "insightface", "standard"
"""The two rules."""
_SCORES = 1 << 23
"""Number of scores in memory at a time."""


class Search(NamedTuple):
    """Result of P probes in one gallery."""

    mate: np.ndarray
    """(P,) float: best score of a template of the same person; -inf if there is none."""
    rank: np.ndarray
    """(P,) int64 from 1; 0 if there is no mate."""
    best_other: np.ndarray
    """(P,) float: best score of a template of another person; -inf if there is none."""
    highest_others: np.ndarray
    """(k,) float, descending: the highest scores between different people."""

    @property
    def mated(self) -> np.ndarray:
        """(P,) bool: whether the gallery has the probe's person."""
        return self.rank > 0

    def accuracy(self, rank: int) -> float:
        """Returns the share of the mated probes whose mate is among the first `rank`."""
        return float(np.mean(self.rank[self.mated] <= rank))


class Tpir(NamedTuple):
    """TPIR at one FPIR; `None` if there are too few non-mated probes to measure it."""

    fpir: float
    tpir: float | None
    threshold: float | None
    """Scores strictly above it are accepted."""


class Identification(NamedTuple):
    """Result by one of the two rules."""

    rule: str
    ranks: dict[int, float]
    tpirs: tuple[Tpir, ...]

    def metrics(self) -> dict[str, float]:
        """Returns `rank1`, `tpir@fpir=0.01` and so on, prefixed with the name of insightface's
        rule.
        """
        values = {f"rank{rank}": value for rank, value in self.ranks.items()}
        for at in self.tpirs:
            if at.tpir is not None:
                values[f"tpir@fpir={at.fpir:g}"] = at.tpir
        front = "" if self.rule == STANDARD else f"{self.rule}_"
        return {front + name: value for name, value in values.items()}


def search(
    probes: np.ndarray,
    probe_subjects: np.ndarray,
    *,
    gallery: np.ndarray,
    gallery_subjects: np.ndarray,
    keep: int = 0,
) -> Search:
    """Compares every probe with every template of the gallery, a block of probes at a time.

    Args:
      probes: (P, D) float, unit vectors.
      probe_subjects: (P,) int: the person of each.
      gallery: (g, D) float, unit vectors.
      gallery_subjects: (g,) int.
      keep: how many of the highest scores between different people to return.
    """
    block = max(1, _SCORES // len(gallery))
    highest = np.empty(0, probes.dtype)
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(probes), block):
        score = probes[start : start + block] @ gallery.T
        mates = probe_subjects[start : start + block, None] == gallery_subjects[None, :]
        mate = score.max(axis=1, where=mates, initial=-np.inf)
        score[mates] = -np.inf
        rank = np.where(mates.any(axis=1), 1 + np.sum(score >= mate[:, None], axis=1), 0)
        columns.append((mate, rank, score.max(axis=1, initial=-np.inf)))
        if keep:
            highest = np.concatenate([highest, score[~mates]])
            if len(highest) > keep:
                highest = np.partition(highest, len(highest) - keep)[-keep:]
    mate, rank, best_other = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return Search(mate, rank, best_other, np.sort(highest)[::-1])


def insightface_rule(
    probes: np.ndarray,
    probe_subjects: np.ndarray,
    *,
    gallery: np.ndarray,
    gallery_subjects: np.ndarray,
    fpirs: Sequence[float] = FPIRS,
) -> Identification:
    """Applies insightface's rule: both galleries as one, and a threshold from all scores.

    Of Q probes, each with exactly one mate, the threshold at an FPIR is the ceil(FPIR Q)-th highest
    of all scores between different people; TPIR is the share of the probes whose mate scores
    strictly above it, at any rank. Every probe has a mate, so this FPIR counts wrong scores rather
    than non-mated probes for which somebody was found.

    Args:
      probes, probe_subjects, gallery, gallery_subjects: as `search`.
      fpirs: the targets.

    Raises:
      DataError: a probe has no mate, or more than one.
    """
    _check_one_mate(probe_subjects, gallery_subjects)
    wanted = [math.ceil(len(probes) * fpir) for fpir in fpirs]
    found = search(
        probes,
        probe_subjects,
        gallery=gallery,
        gallery_subjects=gallery_subjects,
        keep=max(wanted),
    )
    tpirs = []
    for fpir, place in zip(fpirs, wanted, strict=True):
        if place > len(found.highest_others):
            tpirs.append(Tpir(fpir, None, None))
            continue
        threshold = found.highest_others[place - 1]
        tpirs.append(Tpir(fpir, float(np.mean(found.mate > threshold)), float(threshold)))
    ranks = {rank: found.accuracy(rank) for rank in RANKS}
    return Identification(INSIGHTFACE, ranks, tuple(tpirs))


def _check_one_mate(probe_subjects: np.ndarray, gallery_subjects: np.ndarray) -> None:
    subjects, counts = np.unique(gallery_subjects, return_counts=True)
    row = np.minimum(np.searchsorted(subjects, probe_subjects), len(subjects) - 1)
    mates = np.where(subjects[row] == probe_subjects, counts[row], 0)
    wrong = np.flatnonzero(mates != 1)
    if len(wrong):
        raise DataError(
            f"subject {probe_subjects[wrong[0]]} of the probes has {mates[wrong[0]]} templates in "
            f"the galleries ({len(wrong)} probes are like it); insightface's rule needs exactly "
            "one for each: look at the csv files of galleries and probes"
        )


def standard_rule(searches: Sequence[Search], *, fpirs: Sequence[float] = FPIRS) -> Identification:
    """Applies the rule that IJB-B and IJB-C define: each gallery separately, then their mean.

    FPIR is the share of non-mated probes whose highest score is accepted; TPIR is the share of
    mated probes whose mate has rank 1 and is accepted. Of m non-mated probes, k = floor(FPIR m) may
    be accepted, so the threshold is the (k + 1)-th highest of their highest scores, and scores
    strictly above it are accepted (B. Maze et al., "IARPA Janus Benchmark - C", 2018; P. Grother,
    M. Ngan, NIST IR 8009, with rank R = 1).

    Args:
      searches: the same probes in each gallery.
      fpirs: the targets.

    Raises:
      DataError: a gallery has no mated probe.
    """
    for number, found in enumerate(searches, start=1):
        if not found.mated.any():
            raise DataError(
                f"no probe has a mate in gallery {number}, and rank and TPIR need some: check the "
                "csv files of galleries and probes"
            )
    ranks = {rank: float(np.mean([s.accuracy(rank) for s in searches])) for rank in RANKS}
    tpirs = []
    for fpir in fpirs:
        each = [_tpir(found, fpir) for found in searches]
        known = [
            (at.tpir, at.threshold)
            for at in each
            if at.tpir is not None and at.threshold is not None
        ]
        if len(known) < len(each):
            tpirs.append(Tpir(fpir, None, None))
        else:
            tpir, threshold = np.mean(known, axis=0)
            tpirs.append(Tpir(fpir, float(tpir), float(threshold)))
    return Identification(STANDARD, ranks, tuple(tpirs))


def _tpir(found: Search, fpir: float) -> Tpir:
    unmated = np.sort(found.best_other[~found.mated])[::-1]
    count = allowed(fpir, len(unmated)) if len(unmated) else 0
    if not count:
        return Tpir(fpir, None, None)
    threshold = unmated[count]
    hit = (found.mate > threshold) & (found.rank == 1)
    return Tpir(fpir, float(np.mean(hit[found.mated])), float(threshold))
