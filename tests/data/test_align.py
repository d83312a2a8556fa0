"""Alignment against scikit-image, an independent least squares, and pictures with known points."""

import numpy as np
import pytest

from arcface_jax.data.faces import TEMPLATE, align, similarity
from arcface_jax.errors import DataError


def faces(count: int, seed: int = 0, noise: float = 4.0) -> np.ndarray:
    """(count, 5, 2): the template turned, scaled, moved, and shaken."""
    rng = np.random.default_rng(seed)
    angle, scale = rng.uniform(-np.pi, np.pi, count), rng.uniform(0.3, 8, count)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = scale[:, None, None] * np.einsum("ijn,kj->nki", turn, TEMPLATE)
    return moved + rng.uniform(-500, 500, (count, 1, 2)) + rng.normal(0, noise, (count, 5, 2))


def least_squares(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The same by linear least squares in the four unknowns of the matrix."""
    rows, right = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        right += [u, v]
    (c, s, dx, dy), *_ = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)
    return np.array([[c, -s, dx], [s, c, dy]])


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """S. Umeyama's formula (1991), equations 34 to 43, in float64: by a singular decomposition."""
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    covariance = (target - target_mean).T @ (source - source_mean) / len(source)
    u, d, vt = np.linalg.svd(covariance)
    signs = np.diag([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ signs @ vt
    scale = np.trace(np.diag(d) @ signs) / np.mean(np.sum((source - source_mean) ** 2, axis=1))
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])


def test_the_matrix_is_umeyamas_to_the_ends_of_a_large_photograph():
    # Points of detectors are float32, which insightface's package estimates in too.
    source = (faces(200, seed=1) + np.array([5000, 3000])).astype(np.float32)
    expected = [umeyama(points.astype(np.float64), TEMPLATE) for points in source]
    np.testing.assert_allclose(similarity(source, TEMPLATE), expected, rtol=0, atol=1e-6)


def test_the_crop_is_sampled_between_pixels_where_the_matrix_says():
    """Of an image linear in x and y, bilinear sampling is exact at every place."""
    y, x = np.mgrid[:300, :400]
    image = np.stack([x / 4, y / 2, (x + y) / 4], axis=-1).round().astype(np.uint8)
    points = faces(1, seed=2, noise=0)[0]
    points = (points - points.mean(axis=0)) / np.ptp(points) * 60 + (200, 150)
    back = umeyama(TEMPLATE, points)
    rows, columns = np.mgrid[:112, :112]
    at = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back.T
    expected = np.stack([at[..., 0] / 4, at[..., 1] / 2, at.sum(axis=-1) / 4], axis=-1)
    # The image is rounded to whole values, and so is the crop.
    np.testing.assert_allclose(align(image, points), expected, atol=1.02)
    assert abs(np.mean(align(image, points) - expected)) < 0.02


def test_all_faces_at_once_equal_a_least_squares_of_each():
    source = faces(200)
    expected = [least_squares(points, TEMPLATE) for points in source]
    matrices = similarity(source, TEMPLATE)
    assert (matrices.shape, matrices.dtype) == ((200, 2, 3), np.float64)
    np.testing.assert_allclose(matrices, expected, rtol=1e-8, atol=1e-8)
    # And backwards: one source, many targets, leading axes of any number.
    there = similarity(TEMPLATE, source.reshape(20, 10, 5, 2))
    expected = [least_squares(TEMPLATE, points) for points in source]
    np.testing.assert_allclose(there.reshape(200, 2, 3), expected, rtol=1e-8, atol=1e-8)


def test_equals_scikit_image():
    transform = pytest.importorskip("skimage.transform")
    mirrored = faces(20, seed=1)[:, [1, 0, 2, 4, 3]]  # where Umeyama's determinant is negative
    for points in [*faces(50, seed=2), *mirrored]:
        expected = transform.SimilarityTransform.from_estimate(points, TEMPLATE).params[:2]
        np.testing.assert_allclose(similarity(points, TEMPLATE), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [112, 224])
def test_the_points_land_on_the_template(size: int):
    """Soft dots of three colors, drawn on the points, are found where the template has them."""
    points = faces(1, seed=3, noise=0.0)[0]
    points = (points - points.mean(0)) * 60 / np.ptp(points) + 150  # inside the picture
    image = np.zeros((300, 300, 3))
    channels = (0, 1, 2, 0, 1)
    y, x = np.mgrid[:300, :300]
    for (px, py), channel in zip(points, channels, strict=True):
        image[..., channel] += 255 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 2.0**2))
    aligned = align(np.clip(image, 0, 255).astype(np.uint8), points, size=size)
    assert (aligned.shape, aligned.dtype) == ((size, size, 3), np.uint8)
    y, x = np.mgrid[:size, :size]
    for (px, py), channel in zip(TEMPLATE * size / 112, channels, strict=True):
        near = aligned[..., channel] * ((x - px) ** 2 + (y - py) ** 2 < (12 * size / 112) ** 2)
        center = [(near * grid).sum() / near.sum() for grid in (x, y)]
        np.testing.assert_allclose(center, (px, py), atol=0.1)


def test_what_lies_outside_the_picture_is_black_and_colors_keep_their_order():
    image = np.full((112, 112, 3), (200, 100, 50), np.uint8)
    same = align(image, TEMPLATE)
    np.testing.assert_array_equal(same, image)
    left = align(
        image, TEMPLATE + np.array([[56, 0]])
    )  # the picture's right half moves to the left
    np.testing.assert_array_equal(left[:, :55], image[:, :55])
    assert not left[:, 57:].any()


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (np.full((5, 2), 1000.1), "coincide"),
        (np.where(np.eye(5, 2), np.nan, TEMPLATE), "not finite"),
        (TEMPLATE.reshape(-1), r"\(10,\); expected \(5, 2\)"),
        (TEMPLATE[:3], r"\(3, 2\); expected \(5, 2\)"),
    ],
)
def test_points_that_cannot_be_aligned(points: np.ndarray, words: str):
    with pytest.raises(DataError, match=words):
        align(np.zeros((112, 112, 3), np.uint8), points)


def test_points_that_no_rotation_fits_best():
    """Corners of a square, two of them exchanged: its mirror image, to every rotation alike."""
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(DataError, match="1 of 2 faces"):
        similarity(np.stack([square, square[[1, 0, 3, 2]]]), square)
