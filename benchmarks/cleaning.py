"""Plant label errors in a training set, detect them without ground truth, and score the findings.

For each seed, people with at least four images are divided between two labels (duplicates), pairs
of people are put under one label (mixed), and images of others get another person's label (wrong
labels). Leaks: two images of each of some people move from the training set to a verification set.
Original errors of the set count as false findings.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.cleaning import embedding, outliers, overlap, pipeline
from arcface_jax.cleaning.identities import Identities
from arcface_jax.data.pairs import bins
from arcface_jax.data.source import Source
from arcface_jax.evaluation.embed import Model


class Planted(NamedTuple):
    """A training set with planted errors."""

    images: Identities
    duplicates: np.ndarray
    """(d, 2) labels of the same person."""
    mixed: np.ndarray
    """(m,) labels of two people."""
    wrong: np.ndarray
    """(w,) images under a wrong label."""
    scored: np.ndarray
    """(n,) bool: images of people who were neither divided nor joined, and have several images."""


class Score(NamedTuple):
    """Detection result for one kind of error and one seed."""

    kind: str
    seed: int
    found: int
    recall: float
    precision: float
    expected_recall: float
    expected_precision: float | None
    auroc: float | None = None


def plant(images: Identities, *, seed: int, divided: int, joined: int, share: float) -> Planted:
    """Plants errors of three kinds.

    Args:
      images: the training set.
      seed: random seed of the choices.
      divided: people who become two labels.
      joined: labels that get two people.
      share: share of the others' images that get another label.
    """
    random = np.random.default_rng(seed)
    truth, counts = images.labels, images.counts()
    people = random.permutation(np.flatnonzero(counts >= 4))[:divided]
    rest = random.permutation(np.setdiff1d(np.flatnonzero(counts >= 2), people))
    pairs, pool = rest[: 2 * joined].reshape(-1, 2), rest[2 * joined :]
    labels = truth.copy()
    for number, person in enumerate(people):
        rows = random.permutation(np.flatnonzero(truth == person))
        labels[rows[: len(rows) // 2]] = images.num_classes + number
    for kept, gone in pairs:
        labels[truth == gone] = kept
    movable = np.flatnonzero(np.isin(truth, pool) & (counts[truth] >= 3))
    wrong = random.permutation(movable)[: round(share * len(movable))]
    for image in wrong:
        labels[image] = random.choice(pool[pool != truth[image]])
    found = Identities(images.embeddings, labels, images.num_classes + len(people))
    new = images.num_classes + np.arange(len(people))
    scored = np.isin(labels, pool) & (found.counts()[labels] >= 2)
    return Planted(found, np.stack([people, new], axis=1), pairs[:, 0], wrong, scored)


def score(planted: Planted, *, seed: int) -> list[Score]:
    """Detects the errors and compares the findings with what was planted."""
    found = pipeline.find(planted.images, seed=seed)
    same, two, bad = found.duplicates, found.mixed, found.outliers
    assert same is not None and two is not None and bad is not None
    size = planted.images.num_classes
    right = np.isin(same.pairs @ [size, 1], planted.duplicates @ [size, 1])[same.merge]
    scores = [_score("duplicates", seed, right, len(planted.duplicates), same.threshold)]
    right = np.isin(two.label, planted.mixed)[two.mixed]
    scores.append(_score("mixed", seed, right, len(planted.mixed), two.threshold))
    is_wrong = np.zeros(len(planted.scored), bool)
    is_wrong[planted.wrong] = True
    flagged = bad.image[bad.wrong]
    flagged = flagged[planted.scored[flagged]]
    total = int((is_wrong & planted.scored).sum())
    one = _score("wrong labels", seed, is_wrong[flagged], total, bad.threshold)
    groups = same.groups(size)
    own, other, _ = outliers.compare(planted.images, groups=groups)
    ranked = planted.scored & ~np.isnan(own)
    return [*scores, one._replace(auroc=auroc((other - own)[ranked], is_wrong[ranked]))]


def leaks(images: Identities, others: np.ndarray, *, seed: int, people: int) -> Score:
    """Moves two images of each of some people to the verification set and searches for them.

    Args:
      images: the training set.
      others: (m, D) embeddings of the verification set.
      seed: random seed of the choice of people.
      people: number of people to move.

    Returns:
      Shares of the people found, and of the found images that are theirs.
    """
    random = np.random.default_rng(seed)
    chosen = random.choice(np.flatnonzero(images.counts() >= 4), people, replace=False)
    moved = np.concatenate(
        [random.permutation(np.flatnonzero(images.labels == person))[:2] for person in chosen]
    )
    out = np.zeros(len(images.labels), bool)
    out[moved] = True
    found = overlap.find(
        images.without(out), np.concatenate([others, images.embeddings[moved]]), seed=seed
    )
    place = found.image - len(others)
    right = (place >= 0) & (images.labels[moved[np.maximum(place, 0)]] == found.label)
    one = _score("leaks", seed, right, people, found.threshold)
    return one._replace(recall=len(set(found.label[right].tolist())) / people)


def measure(model: Model, source: Source, pairs: bins.PairSet, output: Path, *, seeds: int):
    """Measures all kinds of errors for each seed.

    Args:
      model: the network.
      source: the training set.
      pairs: a verification set of other people.
      output: folder for the embeddings.
      seeds: number of random plantings.

    Returns:
      The scores, and what is found without planting: images of the verification set, with the
      training set's identity and the cosine.
    """
    own = embedding.embed(
        model, embedding.of_source(source), output / "embeddings", name="the training set"
    )
    images = own.identities(source.labels(), source.num_classes)
    others = embedding.embed(model, embedding.of_pairs(pairs), output / "pairs", name=pairs.name)
    scores = []
    for seed in range(seeds):
        planted = plant(images, seed=seed, divided=200, joined=100, share=0.1)
        scores += score(planted, seed=seed)
        scores.append(leaks(images, others.embeddings, seed=seed, people=50))
    return scores, overlap.find(images, others.embeddings, seed=0)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the probability that a positive outscores a negative, by ranks."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    count = int(positive.sum())
    above = ranks[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(scores) - count)))


def _score(kind: str, seed: int, right: np.ndarray, total: int, threshold) -> Score:
    hits, found = int(right.sum()), len(right)
    expected = (threshold.recall, threshold.precision)
    return Score(kind, seed, found, hits / total, hits / max(found, 1), *expected)
