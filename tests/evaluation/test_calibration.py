"""The threshold for a FAR against a search over all scores, and what is said when it is weak."""

import json

import numpy as np
import pytest

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import DataError
from arcface_jax.evaluation import calibration


def pair_set(same: np.ndarray) -> PairSet:
    return PairSet("made", np.arange(2 * len(same), dtype=np.uint8)[:, None, None, None], same)


def embeddings(cosine: np.ndarray, seed: int = 0) -> np.ndarray:
    """(2 n, 3): pairs with these cosines, of any lengths."""
    first = np.tile([1.0, 0.0, 0.0], (len(cosine), 1))
    second = np.stack([cosine, np.sqrt(1 - cosine**2), 0 * cosine], 1)
    both = np.stack([first, second], 1).reshape(-1, 3)
    return both * np.random.default_rng(seed).uniform(0.5, 9, (len(both), 1))


def scores(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.4
    return np.clip(rng.normal(np.where(same, 0.5, 0.0), 0.2), -0.99, 0.99), same


def calibrate(cosine: np.ndarray, same: np.ndarray, far: float) -> calibration.Calibration:
    return calibration.calibrate(
        embeddings(cosine), pair_set(same), far=far, flip=True, model="weights"
    )


@pytest.mark.parametrize("far", [0.3, 0.1, 0.01])
@pytest.mark.parametrize("seed", range(5))
def test_the_lowest_threshold_within_the_far(far: float, seed: int):
    cosine, same = scores(400, seed)
    found = calibrate(cosine, same, far)
    fit = [t for t in cosine if np.mean(cosine[~same] >= t) <= far]
    lowest = min(fit)
    assert found.threshold_cosine < lowest
    assert found.threshold_cosine > max(cosine[cosine < lowest])
    assert found.far == np.mean(cosine[~same] >= lowest) <= far
    assert found.tar == np.mean(cosine[same] >= lowest)
    distance = 2 - 2 * cosine
    np.testing.assert_array_equal(
        distance < found.threshold_squared_distance, cosine >= found.threshold_cosine
    )
    assert found.far_low < found.far < found.far_high
    assert found.tar_low < found.tar < found.tar_high
    assert (found.same_pairs, found.different_pairs) == (same.sum(), (~same).sum())


def test_ties_are_accepted_or_refused_together():
    cosine = np.array([0.9] * 5 + [0.6] * 5 + [0.6] * 10 + [0.1] * 10)
    same = np.array([True] * 10 + [False] * 20)
    found = calibrate(cosine, same, 0.4)  # the ten at 0.6 are half of them
    assert (found.far, found.tar) == (0.0, 0.5)
    assert 0.6 < found.threshold_cosine < 0.9


def test_says_whether_the_pairs_suffice():
    same = np.array([True] * 10 + [False] * 300)
    cosine = np.concatenate([np.full(10, 0.8), np.linspace(-0.5, 0.7, 300)])
    enough, weak = calibrate(cosine, same, 0.1), calibrate(cosine, same, 0.09)
    assert enough.enough_pairs and not weak.enough_pairs
    assert "too few" not in calibration.in_words(enough)
    assert "300; a FAR of 9e-02 needs 333" in calibration.in_words(weak)
    with pytest.raises(DataError, match=r"300 pairs .* FAR of 1e-3: .* 1,000, .* 30,000"):
        calibrate(cosine, same, 1e-3)
    with pytest.raises(DataError, match="most alike pairs are of different people"):
        calibrate(np.where(same, 0.1, 0.9), same, 0.1)
    with pytest.raises(DataError, match="a FAR target must be between 0 and 1"):
        calibrate(cosine, same, 1.5)


def test_json_round_trip_and_set_identity(tmp_path):
    cosine, same = scores(400, 1)
    found = calibrate(cosine, same, 0.1)
    calibration.write(found, tmp_path / "c.json")
    assert calibration.read(tmp_path / "c.json") == found
    other = same.copy()
    other[0] = not other[0]
    assert calibrate(cosine, other, 0.1).set_digest != found.set_digest
    with pytest.raises(DataError, match="cannot write"):
        calibration.write(found, tmp_path / "none" / "c.json")


def test_a_second_threshold_for_pairs_to_check(tmp_path):
    cosine, same = scores(400, 2)
    found = calibration.calibrate(
        embeddings(cosine), pair_set(same), far=0.01, far_check=0.1, flip=True, model="weights"
    )
    strict, loose = calibrate(cosine, same, 0.01), calibrate(cosine, same, 0.1)
    assert found.threshold_cosine == strict.threshold_cosine > loose.threshold_cosine
    assert (found.threshold_check, found.far_check) == (loose.threshold_cosine, loose.far)
    assert (found.tar_check, found.far_check_target) == (loose.tar, 0.1)
    assert f"to check: cosine {loose.threshold_cosine:.4f} to" in calibration.in_words(found)
    calibration.write(found, tmp_path / "c.json")
    assert calibration.read(tmp_path / "c.json") == found
    for far_check in (0.01, 0.001, 1.0):
        with pytest.raises(DataError, match="higher --far-check"):
            calibration.calibrate(
                embeddings(cosine),
                pair_set(same),
                far=0.01,
                far_check=far_check,
                flip=True,
                model="",
            )


def test_a_calibration_of_before_has_one_threshold(tmp_path):
    cosine, same = scores(400, 1)
    calibration.write(calibrate(cosine, same, 0.1), tmp_path / "c.json")
    stored = json.loads((tmp_path / "c.json").read_text())
    for name in ("threshold_check", "far_check_target", "far_check", "tar_check"):
        assert stored.pop(name) is None
    (tmp_path / "c.json").write_text(json.dumps(stored))
    assert calibration.read(tmp_path / "c.json") == calibrate(cosine, same, 0.1)
