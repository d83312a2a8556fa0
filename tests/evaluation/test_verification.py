"""insightface's protocol, against the same said slowly in plain Python."""

import json

import numpy as np
import pytest

from arcface_jax.data.pairs import PairSet
from arcface_jax.errors import DataError
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.verification import pair_distances, raw_pixel_accuracy, ten_fold, verify


def restated(distance: np.ndarray, same: np.ndarray) -> tuple[list[float], list[float]]:
    """One threshold and one fold at a time, in plain Python."""
    thresholds = np.arange(0, 4, 0.01).tolist()
    scores = list(zip(distance.tolist(), same.tolist(), strict=True))
    accuracies, chosen = [], []
    begin = 0
    for fold in range(10):
        size = len(scores) // 10 + (1 if fold < len(scores) % 10 else 0)
        test = scores[begin : begin + size]
        train = scores[:begin] + scores[begin + size :]
        begin += size
        best, best_right = 0.0, -1
        for threshold in thresholds:
            right = 0
            for d, is_same in train:
                right += (d < threshold) == is_same
            if right > best_right:  # the first of equally good ones stays
                best, best_right = threshold, right
        accuracies.append(sum((d < best) == is_same for d, is_same in test) / size)
        chosen.append(best)
    assert begin == len(scores)
    return accuracies, chosen


def random_scores(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets of all kinds: sizes that ten does not divide, ties, scores on and beside thresholds."""
    rng = np.random.default_rng(number)
    count = int(rng.integers(10, 60))
    same = rng.random(count) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    distance = np.clip(np.where(same, 1.0, 2.0) + rng.normal(0, 0.6, count), 0, 4)
    kind = number % 5
    if kind == 1:  # exactly on thresholds
        distance = rng.choice(verification.THRESHOLDS, count)
    elif kind == 2:  # the next floating-point number below or above one
        towards = rng.choice([-np.inf, np.inf], count)
        distance = np.abs(np.nextafter(rng.choice(np.arange(0, 4, 0.01), count), towards))
    elif kind == 3:  # few values, so that many thresholds are equally good
        distance = rng.choice([0.0, 0.5, 3.99, 4.0, 3.995], count)
    elif kind == 4:  # sorted, so that folds differ as much as they can
        order = np.argsort(distance)
        distance, same = distance[order], same[order]
    return distance, same


@pytest.mark.parametrize("kind", range(5))
def test_ten_folds_equal_the_protocol_said_slowly(kind: int):
    for number in range(kind, 200, 5):
        distance, same = random_scores(number)
        accuracies, thresholds = ten_fold(distance, same)
        expected_accuracies, expected_thresholds = restated(distance, same)
        np.testing.assert_array_equal(thresholds, expected_thresholds, err_msg=str(number))
        np.testing.assert_allclose(accuracies, expected_accuracies, rtol=1e-15, err_msg=str(number))


def test_a_pair_on_the_threshold_is_not_the_same():
    same = np.array([True] * 10 + [False] * 10)
    # Thresholds 0.51 to 1.00 part these; the first decides, strictly.
    distance = np.where(same, 0.5, 1.0)
    accuracies, thresholds = ten_fold(distance, same)
    np.testing.assert_array_equal(accuracies, 1)
    np.testing.assert_array_equal(thresholds, verification.THRESHOLDS[51])
    # On the test fold alone a distance lies on the threshold that the others choose.
    distance[0] = verification.THRESHOLDS[51]
    assert ten_fold(distance, same)[0][0] == 0.5


def test_all_same_or_all_different_pairs_are_all_recognised():
    distance = np.linspace(0, 3.9, 33)
    accuracies, thresholds = ten_fold(distance, np.ones(33, bool))
    np.testing.assert_array_equal(accuracies[:-1], 1)
    assert thresholds[0] == pytest.approx(3.91)
    accuracies, thresholds = ten_fold(distance, np.zeros(33, bool))
    np.testing.assert_array_equal(accuracies, 1)
    np.testing.assert_array_equal(thresholds, 0)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_fewer_pairs_than_folds_are_refused(count: int):
    with pytest.raises(DataError, match=f"{count} pairs are too few for 10 folds.*at least 10"):
        ten_fold(np.zeros(count), np.zeros(count, bool))


def test_distances_are_those_of_unit_vectors():
    angle = np.array([0.0, 0.3, np.pi / 2, 2.0, np.pi])
    left = np.stack([np.cos(angle - angle), np.sin(angle - angle)], axis=1)
    right = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    length = np.array([1e-3, 1.0, 7.0, 1e3, 1e6])
    embeddings = np.empty((10, 2), np.float32)
    embeddings[0::2], embeddings[1::2] = left * length[:, None], right * length[::-1, None]
    distance = pair_distances(embeddings)
    assert distance.dtype == np.float64
    np.testing.assert_allclose(distance, 2 - 2 * np.cos(angle), rtol=1e-6, atol=1e-12)


def test_an_embedding_of_length_zero_is_at_distance_one_from_any_other():
    embeddings = np.array([[0, 0], [3, 4], [0, 0], [0, 0]], np.float32)
    np.testing.assert_allclose(pair_distances(embeddings), [1, 0], rtol=1e-15)


def a_set(pairs: int = 20, *, name: str = "made") -> PairSet:
    """Images of one grey level a person, darker to the right: mirroring changes them."""
    same = np.arange(pairs) % 2 == 0
    person = np.repeat(np.arange(pairs), 2)
    person[1::2] += np.where(same, 0, 100)
    images = np.zeros((2 * pairs, 112, 112, 3), np.uint8)
    images[...] = person[:, None, None, None]
    images[:, :, 56:] //= 2
    return PairSet(name, images, same)


def embedding_of(person: np.ndarray) -> np.ndarray:
    """A direction for each person, of length 10."""
    unit = np.random.default_rng(0).normal(size=(256, 16))
    return 10 * (unit / np.linalg.norm(unit, axis=1, keepdims=True))[person].astype(np.float32)


def test_verify_sums_an_image_and_its_mirror_image():
    pairs = a_set()
    seen = []

    def left_half(images: np.ndarray) -> np.ndarray:
        """The embedding of what is on the left, and a trace of what came."""
        seen.append(images.copy())
        return embedding_of(images[:, 0, 0, 0])

    result = verify(left_half, pairs)
    plain, mirrored = seen
    np.testing.assert_array_equal(plain, pairs.images)
    np.testing.assert_array_equal(mirrored, np.flip(pairs.images, axis=2))
    person = pairs.images[:, 0, 0, 0]
    total = embedding_of(person).astype(float) + embedding_of(person // 2)
    unit = total / np.linalg.norm(total, axis=1, keepdims=True)
    expected = 2 - 2 * np.sum(unit[0::2] * unit[1::2], axis=1)
    np.testing.assert_allclose(result.distance, expected, atol=1e-6)
    assert result.xnorm == pytest.approx(10, rel=1e-6)
    assert result.accuracy == 1
    assert result.accuracy_std == 0
    assert result.distance[pairs.same].max() < result.threshold <= result.distance.max()
    assert result.metrics() == {
        "eval/made/accuracy": 1.0,
        "eval/made/accuracy_std": 0.0,
        "eval/made/threshold": result.threshold,
        "eval/made/xnorm": result.xnorm,
    }
    json.dumps(result.metrics())  # plain numbers


def test_verify_gives_mean_and_deviation_of_the_folds():
    rng = np.random.default_rng(0)
    pairs = PairSet("noise", np.zeros((60, 112, 112, 3), np.uint8), rng.random(30) < 0.5)
    given = [rng.normal(size=(60, 3)).astype(np.float32) for _ in range(2)]
    answers = iter(given)
    result = verify(lambda images: next(answers), pairs)
    accuracies, thresholds = restated(pair_distances(given[0].astype(float) + given[1]), pairs.same)
    assert result.accuracy == pytest.approx(np.mean(accuracies))
    assert result.accuracy_std == pytest.approx(np.std(accuracies))
    assert result.threshold == pytest.approx(np.mean(thresholds))
    lengths = [np.sqrt((x.astype(float) ** 2).sum(1)) for x in given]
    assert result.xnorm == pytest.approx(np.mean(lengths))


@pytest.mark.parametrize("call", [0, 1], ids=["plain", "mirrored"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_no_result(wrong: float, call: int):
    calls = iter(range(2))

    def run(images: np.ndarray) -> np.ndarray:
        out = np.ones((len(images), 4), np.float32)
        if next(calls) == call:
            out[7, 2] = wrong
        return out

    with pytest.raises(DataError, match=r"made: .* not finite: .*--optimizer\.learning-rate"):
        verify(run, a_set())


def test_a_set_of_fewer_pairs_than_folds_is_refused():
    with pytest.raises(DataError, match="9 pairs are too few"):
        verify(lambda images: np.ones((len(images), 4), np.float32), a_set(9))


def test_raw_pixels_see_patterns_and_neither_brightness_nor_colour():
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 40, (40, 112, 112, 1))
    same = np.arange(20) % 2 == 0
    left, right = pattern[:20], np.where(same[:, None, None, None], pattern[:20], pattern[20:])
    images = np.empty((40, 112, 112, 3), np.uint8)
    images[0::2] = left + rng.integers(0, 60, (20, 1, 1, 3))
    images[1::2] = 2 * right + rng.integers(60, 170, (20, 1, 1, 3))
    assert raw_pixel_accuracy(PairSet("patterns", images, same)) == 1
