"""Neighbors by blocks, against all cosines at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from arcface_jax.cleaning import mixed, neighbors, overlap, thresholds
from arcface_jax.cleaning.identities import Identities
from arcface_jax.errors import DataError
from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.runtime import devices as meshes


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """300 directions, of which the last 30 are near to the first 30; one is zero."""
    random = np.random.default_rng(0)
    unit = normalize(random.standard_normal((300, 24)))
    unit[270:] = normalize(unit[:30] + 0.1 * random.standard_normal((30, 24)))
    unit[100] = 0
    return unit


def dense_pairs(vectors: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    cosine = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    return {(i, j) for i, j in zip(*np.nonzero(cosine >= threshold), strict=True) if i < j}


@pytest.mark.parametrize(("devices", "block"), [(1, 64), (8, 16), (3, 37)])
def test_pairs_are_those_of_all_cosines(vectors, devices, block):
    found = neighbors.similar_pairs(vectors, threshold=0.45, block=block, mesh=meshes.make(devices))
    pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) and set(pairs) == dense_pairs(vectors, 0.45)
    assert (np.diff(found.score) <= 0).all()
    expected = np.sum(vectors[found.first] * vectors[found.second], axis=1)
    np.testing.assert_allclose(found.score, expected, atol=1e-6)


@pytest.mark.parametrize("hits", [1 << 16, 8])
def test_bfloat16_proposals_miss_nothing(vectors, monkeypatch, hits):
    """As on a GPU: hits are compacted on the device, and a block with more is looked at whole."""
    monkeypatch.setattr(meshes, "is_gpu", lambda mesh: True)
    monkeypatch.setattr(neighbors, "_HITS", hits)
    neighbors._hits_of.cache_clear()
    found = neighbors.similar_pairs(vectors, threshold=0.4, block=32, mesh=meshes.make(2))
    neighbors._hits_of.cache_clear()
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs == dense_pairs(vectors, 0.4)


def test_a_cap_keeps_the_most_similar(vectors):
    every = neighbors.similar_pairs(vectors, threshold=0.2, block=32)
    some = neighbors.similar_pairs(vectors, threshold=0.2, block=32, most=25)
    for a, b in zip(every, some, strict=True):
        np.testing.assert_array_equal(a[:25], b)


def test_projected_search_finds_near_pairs(vectors):
    found = neighbors.similar_pairs(vectors, threshold=0.8, block=64, projected=12)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    expected = dense_pairs(vectors, 0.8)
    assert pairs <= expected and len(pairs) >= 0.9 * len(expected)


def test_nearest_rows(vectors):
    unit = np.delete(vectors, 100, axis=0)
    rows, scores = neighbors.nearest(unit, 3, block=64)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    expected = np.argsort(-cosine, axis=1)[:, :3]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(cosine, expected, axis=1), atol=1e-6)


def test_the_best_of_another_group(vectors):
    groups = np.arange(300) % 7
    groups[5] = -1
    found = neighbors.best_other(vectors[:50], groups[:50], vectors, groups, block=64)
    cosine = vectors[:50] @ vectors.T
    cosine[(groups[:50, None] == groups) | (groups == -1)] = -2
    np.testing.assert_array_equal(found.row, cosine.argmax(axis=1))
    np.testing.assert_allclose(found.score, cosine.max(axis=1), atol=1e-6)
    assert found.row.dtype == np.int64 and jnp.isfinite(found.score).all()


def test_a_set_with_one_image_of_each_person_has_no_mixed_identity(vectors):
    single = Identities(vectors, np.arange(len(vectors), dtype=np.int32), len(vectors))
    assert not len(mixed.find(single, seed=0).label)


def test_a_set_without_enough_images_is_no_training_set_to_compare_with(vectors):
    nobody = Identities(np.zeros_like(vectors), np.full(len(vectors), -1, np.int32), 3)
    with pytest.raises(DataError, match="has no readable image to compare with"):
        overlap.find(nobody, vectors[:4], seed=0)
    one = Identities(vectors, np.zeros(len(vectors), np.int32), 1)
    with pytest.raises(DataError, match="no two people with two readable images each"):
        overlap.find(one, vectors[:4], seed=0)


def test_expected_recall_and_precision():
    """200 true findings among 10,000 others: estimates within a few percent of the truth."""
    random = np.random.default_rng(0)
    true, false = random.normal(0.8, 0.1, 200), random.normal(0.2, 0.1, 10_000)
    found = thresholds.choose(
        np.concatenate([true, false]), random.normal(0.8, 0.1, 2000), precision=0.95
    )
    hits, others = (true >= found.threshold).sum(), (false >= found.threshold).sum()
    assert found.found == hits + others
    assert found.recall == pytest.approx(hits / 200, abs=0.05)
    assert found.precision == pytest.approx(hits / found.found, abs=0.08)
    assert hits / found.found > 0.9 and hits / 200 > 0.9


def test_the_tail_of_the_highest_impostor():
    """Maxima of 500 normal numbers: the fitted tail is right within a factor of two."""
    highest = np.random.default_rng(0).normal(size=(5000, 500)).max(axis=1)
    tail = thresholds.gumbel_tail(highest)
    for threshold in (3.3, 3.7):
        assert 0.5 < tail(threshold) / np.mean(highest >= threshold) < 2
    assert tail(0) == pytest.approx(1)
