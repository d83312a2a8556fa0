"""Drawn faces: purity, the verification protocol's order, and what tells identities apart."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from arcface_jax.data.synthetic.faces import draw_face, verification_pairs

IDENTITIES, PAIRS = 50, 200


@pytest.fixture(scope="module")
def drawn_pairs() -> tuple[np.ndarray, np.ndarray]:
    return verification_pairs(seed=3, first_identity=900, identities=IDENTITIES, pairs=PAIRS)


def ten_fold_accuracy(score: np.ndarray, same: np.ndarray) -> float:
    """Mean accuracy over ten contiguous folds, each at the best threshold of the other nine."""
    correct = []
    for fold in np.split(np.arange(len(same)), 10):
        others = np.setdiff1d(np.arange(len(same)), fold)
        hits = (score[others] >= score[others][:, None]) == same[others]
        threshold = score[others][np.argmax(hits.mean(1))]
        correct.append(((score[fold] >= threshold) == same[fold]).mean())
    return float(np.mean(correct))


def pair_cosine(features: np.ndarray) -> np.ndarray:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.sum(unit[0::2] * unit[1::2], axis=1)


def test_an_image_depends_on_its_numbers_alone():
    numbers = [
        (seed, identity, index) for seed in (0, 1) for identity in (0, 7) for index in (0, 1)
    ]

    def draw(key: tuple[int, int, int]) -> bytes:
        return draw_face(seed=key[0], identity=key[1], index=key[2]).tobytes()

    once = {key: draw(key) for key in numbers}
    assert len(set(once.values())) == len(numbers)
    with ThreadPoolExecutor(4) as pool:
        shuffled = [numbers[i] for i in np.random.default_rng(0).permutation(8 * len(numbers)) // 8]
        for key, image in zip(shuffled, pool.map(draw, shuffled), strict=True):
            assert image == once[key], key


def test_no_stream_is_shared_between_identities_and_views():
    # Neighboring numbers must not swap roles: image 1 of person 0 is not image 0 of person 1.
    images = [draw_face(seed=s, identity=i, index=k) for s, i, k in np.ndindex(3, 3, 3)]
    assert len({image.tobytes() for image in images}) == 27


@pytest.mark.parametrize("size", [16, 64, 112, 225])
def test_size_and_type(size: int):
    image = draw_face(seed=0, identity=1, index=2, size=size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


def test_a_size_shows_the_same_face():
    large = draw_face(seed=0, identity=1, index=2, size=224).astype(float)
    small = draw_face(seed=0, identity=1, index=2).astype(float)
    shrunk = large.reshape(112, 2, 112, 2, 3).mean((1, 3))
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.95


def test_values_use_the_range_without_clipping(drawn_pairs):
    images, _ = drawn_pairs
    clipped = ((images == 0) | (images == 255)).mean((1, 2, 3))
    assert clipped.mean() < 0.08
    assert np.quantile(clipped, 0.95) < 0.35
    contrast = images.astype(np.float32).mean(3).std((1, 2))
    assert np.quantile(contrast, 0.05) > 12.0


def test_negative_numbers_and_tiny_sizes_are_refused():
    with pytest.raises(ValueError, match="index=-1"):
        draw_face(seed=0, identity=0, index=-1)
    with pytest.raises(ValueError, match="size=4"):
        draw_face(seed=0, identity=0, index=0, size=4)


def test_each_fold_is_balanced(drawn_pairs):
    images, same = drawn_pairs
    assert images.shape == (2 * PAIRS, 112, 112, 3)
    assert images.dtype == np.uint8
    assert same.shape == (PAIRS,)
    assert same.dtype == bool
    np.testing.assert_array_equal(same.reshape(10, -1).sum(1), PAIRS // 20)
    assert len({image.tobytes() for image in images}) == 2 * PAIRS


@pytest.mark.parametrize(("identities", "pairs"), [(2, 20), (60, 60), (37, 100), (41, 40 + 20)])
def test_labels_tell_whether_two_people_are_drawn(monkeypatch, identities: int, pairs: int):
    drawn = []

    def record(*, seed: int, identity: int, index: int) -> np.ndarray:
        drawn.append((identity, index))
        return np.zeros((112, 112, 3), np.uint8)

    monkeypatch.setattr("arcface_jax.data.synthetic.faces.draw_face", record)
    _, same = verification_pairs(seed=1, first_identity=10, identities=identities, pairs=pairs)
    people = np.array([identity for identity, _ in drawn])
    np.testing.assert_array_equal(people[0::2] == people[1::2], same)
    assert set(people) == set(range(10, 10 + identities))
    assert len(set(drawn)) == 2 * pairs


@pytest.mark.parametrize("pairs", [0, 10, 30, 601])
def test_a_pair_count_that_folds_cannot_share_is_refused(pairs: int):
    with pytest.raises(ValueError, match=f"pairs={pairs}.*multiple of 20.*use [1-9][0-9]*0$"):
        verification_pairs(seed=0, first_identity=0, identities=5, pairs=pairs)


@pytest.mark.parametrize("identities", [1, 21])
def test_an_identity_count_that_pairs_cannot_cover_is_refused(identities: int):
    with pytest.raises(ValueError, match=f"identities={identities}: expected 2 to 20"):
        verification_pairs(seed=0, first_identity=0, identities=identities, pairs=20)


def test_pixels_and_colors_do_not_tell_identities_apart(drawn_pairs):
    images, same = drawn_pairs
    color = (images.astype(np.float32) - 127.5) / 127.5
    gray = color.mean(3).reshape(len(images), -1)
    gray -= gray.mean(1, keepdims=True)
    assert ten_fold_accuracy(pair_cosine(gray), same) <= 0.70
    assert ten_fold_accuracy(pair_cosine(color.reshape(len(images), -1)), same) <= 0.70
    assert ten_fold_accuracy(pair_cosine(color.mean((1, 2))), same) <= 0.65


def mean_gray(identity: int, indices: range) -> np.ndarray:
    """Average of standardized gray images: color is gone, and with many images the view too."""
    total = np.zeros((112, 112))
    for index in indices:
        gray = draw_face(seed=5, identity=identity, index=index).mean(2)
        total += (gray - gray.mean()) / gray.std()
    return (total - total.mean()).ravel() / np.linalg.norm(total - total.mean())


def matched(images_each: int, people: int = 16) -> float:
    """Share of people whose mean image is nearest to the mean of other images of themselves."""
    first = np.array([mean_gray(i, range(images_each)) for i in range(people)])
    second = np.array([mean_gray(i, range(images_each, 2 * images_each)) for i in range(people)])
    return float(np.mean(np.argmax(first @ second.T, axis=1) == np.arange(people)))


def test_geometry_identifies_once_the_view_is_averaged_away():
    assert matched(images_each=32) >= 0.9
    assert matched(images_each=1) <= 0.5  # a single view hides what the average shows
