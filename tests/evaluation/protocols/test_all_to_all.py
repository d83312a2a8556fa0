"""TAR at FAR of streamed scores, against the same scores sorted."""

import numpy as np
import pytest

from arcface_jax.errors import DataError
from arcface_jax.evaluation import roc
from arcface_jax.evaluation.protocols import all_to_all

FARS = (0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-6)


def streamed(score: np.ndarray, same: np.ndarray, *, parts: int = 7):
    blocks = list(zip(np.array_split(score, parts), np.array_split(same, parts), strict=True))
    return all_to_all.tar_at_far(lambda: blocks, fars=FARS)


@pytest.mark.parametrize("seed", range(30))
def test_streamed_equals_sorted_exactly(seed: int):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(20, 30_000))
    same = rng.random(count) < rng.uniform(0.01, 0.9)
    same[:2] = True, False
    score = rng.normal(size=count) * rng.choice([1e-3, 0.2, 10]) + 0.1 * same
    match seed % 3:
        case 1:
            score = np.round(score * 5) / 5  # ties, zeros of both signs
        case 2:
            score = score - 20  # all negative
    score = score.astype(np.float32)
    assert streamed(score, same) == roc.tar_at_far(score, same, fars=FARS)


@pytest.mark.parametrize("value", [0.0, -1.0, 0.25])
def test_scores_that_are_all_equal(value: float):
    same = np.arange(50) % 2 == 0
    score = np.full(50, value, np.float32)
    score[::3] *= -1 if value == 0 else 1  # -0 ties with 0
    assert streamed(score, same) == roc.tar_at_far(score, same, fars=FARS)


@pytest.mark.parametrize("count", [40, 300])
def test_all_pairs_of_images_equal_the_whole_matrix(monkeypatch, count: int):
    monkeypatch.setattr(all_to_all, "_SIDE", 64)
    rng = np.random.default_rng(count)
    labels = rng.integers(0, count // 5, count)
    # Corners of a cube: products of these unit vectors are exact, in whatever order summed.
    features = rng.choice([-3.0, 3.0], (count, 16)) * np.where(rng.random((count, 1)) < 0.5, 1, 2)
    blocks = all_to_all.pairs_of(features, labels)
    unit = np.sign(features) / 4
    upper = np.triu_indices(count, 1)
    score = (unit @ unit.T)[upper].astype(np.float32)
    same = (labels[:, None] == labels)[upper]
    seen = np.sort(np.concatenate([block for block, _ in blocks()]))
    np.testing.assert_array_equal(seen, np.sort(score))
    assert all_to_all.tar_at_far(blocks, fars=FARS) == roc.tar_at_far(score, same, fars=FARS)


@pytest.mark.parametrize("far", [0.0, -0.5, 1.0, 2.0, float("nan")])
def test_a_target_that_is_no_rate_is_refused(far: float):
    blocks = all_to_all.pairs_of(np.eye(4), np.array(["a", "a", "b", "c"]))
    with pytest.raises(DataError, match=f"FAR target must be between 0 and 1.*got {far}"):
        all_to_all.tar_at_far(blocks, fars=[0.1, far])


def test_names_serve_as_labels_and_odd_input_is_refused():
    features = np.eye(4)
    blocks = all_to_all.pairs_of(features, np.array(["a", "a", "b", "c"]))
    (first, *_) = all_to_all.tar_at_far(blocks, fars=[0.5])
    assert (first.tar, first.threshold) == (0.0, np.inf)
    with pytest.raises(DataError, match="6 pairs show one person, 0 two"):
        all_to_all.tar_at_far(all_to_all.pairs_of(features, np.zeros(4)), fars=[0.5])
    with pytest.raises(DataError, match="3 labels"):
        all_to_all.pairs_of(features, np.zeros(3))
    features[1, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        all_to_all.pairs_of(features, np.zeros(4))
