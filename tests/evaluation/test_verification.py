"""A set from its images to its numbers, and the sets that are refused."""

import json

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics
from sklearn.preprocessing import normalize

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import DataError
from arcface_jax.evaluation.verification import (
    pair_distances,
    raw_pixel_accuracy,
    ten_fold,
    ten_fold_tar,
    verify,
)


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


def test_distances_are_those_of_scikit_learns_normalize_to_the_last_digit():
    embeddings = np.random.default_rng(0).normal(size=(2000, 512)).astype(np.float32)
    embeddings[7] = 0
    unit = normalize(embeddings.astype(np.float64))
    expected = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    np.testing.assert_array_equal(pair_distances(embeddings), expected)


def test_an_embedding_of_length_zero_is_at_distance_one_from_any_other():
    embeddings = np.array([[0, 0], [3, 4], [0, 0], [0, 0]], np.float32)
    np.testing.assert_allclose(pair_distances(embeddings), [1, 0], rtol=1e-15)


def a_set(pairs: int = 20, *, name: str = "made") -> PairSet:
    """Images of one gray level a person, darker to the right: mirroring changes them."""
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
    assert result.threshold_cosine == 1 - result.threshold / 2
    np.testing.assert_array_equal(result.same, pairs.same)
    assert (result.auc, result.eer, result.fold_tar) == (1, 0, 1)
    # Ten different pairs show a FAR of 1e-1 and no smaller one.
    assert [at.tar for at in result.tars] == [1, None, None, None, None, None]
    assert [at.pairs_needed for at in result.tars] == [10**k for k in range(1, 7)]
    assert result.metrics() == {
        "eval/made/accuracy": 1.0,
        "eval/made/accuracy_low": result.interval[0],
        "eval/made/accuracy_high": 1.0,
        "eval/made/accuracy_std": 0.0,
        "eval/made/threshold": result.threshold,
        "eval/made/threshold_cosine": result.threshold_cosine,
        "eval/made/xnorm": result.xnorm,
        "eval/made/auc": 1.0,
        "eval/made/eer": 0.0,
        "eval/made/tar@far=1e-1": 1.0,
        "eval/made/mean_cosine": result.mean_cosine,
        "eval/made/effective_rank": result.effective_rank,
    }
    cosines = unit @ unit.T
    assert result.mean_cosine == pytest.approx((cosines.sum() - 40) / (40 * 39), abs=1e-6)
    np.testing.assert_allclose(result.norms, 10, rtol=1e-6)
    assert result.norms.shape == (80,)
    named = verify(left_half, pairs, model="net").metrics()
    assert named == {k.replace("eval/", "eval/net/"): v for k, v in result.metrics().items()}
    json.dumps(result.metrics())  # plain numbers


def test_verify_gives_what_the_distances_say():
    rng = np.random.default_rng(0)
    same = rng.permutation(np.arange(3000) < 1200)
    pairs = PairSet("noise", np.zeros((6000, 2, 2, 3), np.uint8), same)
    person = np.repeat(rng.normal(size=(3000, 16)), 2, axis=0)
    person[1::2][~same] = rng.normal(size=(1800, 16))
    given = [(person + rng.normal(size=(6000, 16))).astype(np.float32) for _ in range(2)]
    answers = iter(given)
    result = verify(lambda images: next(answers), pairs)
    distance = pair_distances(given[0].astype(float) + given[1])
    np.testing.assert_array_equal(result.distance, distance)
    accuracies, thresholds = ten_fold(distance, same)
    assert (result.accuracy, result.accuracy_std) == (np.mean(accuracies), np.std(accuracies))
    assert result.threshold == np.mean(thresholds)
    assert result.fold_tar == np.mean(ten_fold_tar(distance, same, far=1e-3)[0])
    expected = scipy.stats.binomtest(round(result.accuracy * 3000), 3000)
    interval = expected.proportion_ci(0.95, method="wilson")
    assert result.interval == pytest.approx((interval.low, interval.high), abs=1e-12)
    lengths = [np.sqrt((x.astype(float) ** 2).sum(1)) for x in given]
    assert result.xnorm == pytest.approx(np.mean(lengths))

    cosine = 1 - distance / 2
    assert result.auc == pytest.approx(metrics.roc_auc_score(same, cosine), abs=1e-13)
    fpr, tpr, cosines = metrics.roc_curve(same, cosine, drop_intermediate=False)
    assert abs(result.eer - fpr[np.argmin(abs(fpr - (1 - tpr)))]) < 1e-3
    for at, far in zip(result.tars, [1e-1, 1e-2, 1e-3], strict=False):
        assert at.tar == tpr[fpr <= far].max()
        assert at.threshold == cosines[fpr <= far].min()
        assert result.metrics()[f"eval/noise/tar@far={at.label}"] == at.tar
    assert 0 < result.tars[2].tar < result.tars[0].tar < 1
    assert [at.tar for at in result.tars[3:]] == [None] * 3
    assert result.metrics()["eval/noise/fold_tar@far=1e-3"] == result.fold_tar


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": np.zeros((41, 2, 2, 3), np.uint8)}, "41 images for 20 pairs; .* be 40"),
        ({"same": np.arange(9) % 2 == 0}, "40 images for 9 pairs; there should be 18"),
        ({"same": np.ones(20, bool)}, "20 of 20 pairs show one person, 0 two: .* both kinds"),
        ({"same": np.zeros(20, bool)}, "0 of 20 pairs show one person, 20 two: .* both kinds"),
        (a_set(9)._asdict(), "9 pairs are too few for 10 folds"),
    ],
)
def test_a_set_that_cannot_be_verified_is_refused_before_it_is_embedded(changes, words: str):
    def never(images: np.ndarray) -> np.ndarray:
        raise AssertionError("embedded")

    with pytest.raises(DataError, match=f"made: {words}"):
        verify(never, a_set()._replace(**changes))


def test_raw_pixels_see_patterns_and_neither_brightness_nor_color():
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 40, (40, 112, 112, 1))
    same = np.arange(20) % 2 == 0
    left, right = pattern[:20], np.where(same[:, None, None, None], pattern[:20], pattern[20:])
    images = np.empty((40, 112, 112, 3), np.uint8)
    images[0::2] = left + rng.integers(0, 60, (20, 1, 1, 3))
    images[1::2] = 2 * right + rng.integers(60, 170, (20, 1, 1, 3))
    assert raw_pixel_accuracy(PairSet("patterns", images, same)) == 1
