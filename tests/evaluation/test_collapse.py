"""The measures of a collapse, against sums over all pairs."""

import numpy as np
import pytest

from arcface_jax.evaluation import collapse, embeddings


def spread(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, size)).astype(np.float32)


@pytest.mark.parametrize(("count", "size"), [(2, 3), (7, 16), (50, 8)])
def test_the_mean_cosine_is_that_of_all_pairs(count: int, size: int):
    x = spread(count, size) + 0.5
    cosines = []
    for i in range(count):
        for j in range(i):
            cosines.append(x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]))
    assert embeddings.mean_cosine(x) == pytest.approx(np.mean(cosines), abs=1e-6)
    assert embeddings.mean_cosine(1e-4 * x) == pytest.approx(np.mean(cosines), abs=1e-6)


def test_the_effective_rank_is_the_entropy_of_the_singular_values():
    for count, size in ((40, 8), (8, 40), (300, 16)):
        x = spread(count, size) @ np.diag(np.linspace(0.1, 2, size)).astype(np.float32)
        unit = x.astype(float) / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
        values = np.linalg.svd(unit, compute_uv=False)
        entropy = -sum(p * np.log(p) for p in values / values.sum())
        assert embeddings.effective_rank(x) == pytest.approx(np.exp(entropy), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
def test_embeddings_spread_evenly_over_r_directions_have_rank_r(rank: int):
    basis = np.linalg.qr(spread(16, 16))[0][:rank]
    assert embeddings.effective_rank(np.tile(basis, (6, 1))) == pytest.approx(rank, rel=1e-5)


def test_a_point_a_line_and_nothing():
    point = np.tile(spread(1, 32), (20, 1))
    assert embeddings.mean_cosine(point) == pytest.approx(1)
    assert embeddings.effective_rank(point) == pytest.approx(1)
    line = point * np.where(np.arange(20) % 2, 3.0, -1.0)[:, None]
    assert embeddings.mean_cosine(line) == pytest.approx(-1 / 19)  # 90 pairs alike, 100 opposite
    assert embeddings.effective_rank(line) == pytest.approx(1)
    nothing = np.zeros((20, 32), np.float32)
    assert (embeddings.mean_cosine(nothing), embeddings.effective_rank(nothing)) == (0, 0)


def test_modes_are_compared_image_by_image_over_one_whole_batch():
    images = np.arange(10)[:, None]
    angle = {"evaluated": 0.0, "trained": 0.3}
    sizes = []

    def network(which: str):
        def run(batch: np.ndarray) -> np.ndarray:
            sizes.append(len(batch))
            turned = batch[:, 0] + angle[which] * (1 + batch[:, 0] % 2)
            return 7 * np.stack([np.cos(turned), np.sin(turned)], axis=1)

        return run

    found = collapse.mode_cosine(*map(network, angle), images, batch_size=16)
    assert sizes == [16, 16]
    drawn = np.linspace(0, 9, 16).astype(int)
    assert found == pytest.approx(np.mean(np.cos(0.3 * (1 + drawn % 2))))
