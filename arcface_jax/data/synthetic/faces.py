"""Procedural face identities: training and verification images without a download.

An identity fixes what is constant for a person (geometry, skin, hair, brows, glasses, beard); a
view fixes what varies between pictures (pose, expression, light, color cast, blur, noise,
occlusion). Both come from random streams keyed by their numbers, so every image is a pure function
of `(seed, identity, index)`, in any thread, process and order.
"""

import cv2
import numpy as np

from arcface_jax.data.synthetic.parameters import (
    LIGHT_UNIT,
    Identity,
    Polygon,
    View,
    blob,
    draw_view,
)
from arcface_jax.data.synthetic.parts import Part, features, person

_IMAGE_SIZE = 112  # pixels, the input size of every backbone
_FOLDS = 10  # folds of the verification protocol
_FIXED_POINT_BITS = 4  # sub-pixel bits of cv2.fillPoly


def draw_face(*, seed: int, identity: int, index: int, size: int = _IMAGE_SIZE) -> np.ndarray:
    """Draws one image of one person.

    Args:
        seed: chooses the population, non-negative.
        identity: number of the person, non-negative; any number is valid.
        index: number of the image of this person, non-negative.
        size: height and width in pixels.

    Returns:
        (size, size, 3) uint8 RGB. A pure function of the arguments, safe to call from threads.

    Raises:
        ValueError: an argument is negative, or `size` below 16.
    """
    if min(seed, identity, index) < 0 or size < 16:
        raise ValueError(
            f"seed={seed}, identity={identity}, index={index}, size={size}: expected numbers of at "
            "least 0 and a size of at least 16 pixels; pass non-negative numbers"
        )
    return _render(seed, identity, draw_view(seed, identity, index), size)


def verification_pairs(
    *, seed: int, first_identity: int, identities: int, pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a balanced verification set in the order of LFW's ten folds.

    Args:
        seed: chooses the population, as in `draw_face`.
        first_identity: the people are `first_identity .. first_identity + identities - 1`.
        identities: number of people, at least 2; every one of them is used.
        pairs: number of pairs, a multiple of 20 with `pairs >= identities`.

    Returns:
        images (2 * pairs, 112, 112, 3) uint8, where 2i and 2i + 1 are pair i, and same (pairs,)
        bool. Each contiguous tenth has its same pairs first, then as many different ones.

    Raises:
        ValueError: `pairs` or `identities` does not allow such a set.
    """
    if pairs < 20 or pairs % 20:
        raise ValueError(
            f"pairs={pairs}: expected a positive multiple of 20, for ten folds with as many same "
            f"as different pairs; use {max(1, round(pairs / 20)) * 20}"
        )
    if not 2 <= identities <= pairs:
        raise ValueError(
            f"identities={identities}: expected 2 to {pairs} (pairs={pairs}) so that every "
            "identity is used; change identities or pairs"
        )
    rng = np.random.default_rng([seed, first_identity, identities, pairs, 2])
    half = pairs // 2
    # Two passes over one shuffled cycle: the same-person pairs take its first `half` places, and
    # the different ones continue from there, so that `pairs` places cover every identity.
    people = np.resize(rng.permutation(identities), pairs)
    other = (people[half:] + rng.integers(1, identities, half)) % identities
    left = first_identity + people
    right = first_identity + np.concatenate([people[:half], other])
    same = np.arange(pairs) < half
    fold_order = np.arange(pairs).reshape(2, _FOLDS, -1).swapaxes(0, 1).ravel()
    images = np.empty((2 * pairs, _IMAGE_SIZE, _IMAGE_SIZE, 3), np.uint8)
    for place, pair in enumerate(fold_order):
        # Numbering the images by pair makes the two images of a pair, and all pairs, distinct.
        index = 2 * int(pair)
        images[2 * place] = draw_face(seed=seed, identity=int(left[pair]), index=index)
        images[2 * place + 1] = draw_face(seed=seed, identity=int(right[pair]), index=index + 1)
    return images, same[fold_order]


def _project(parts: list[Part], p: Identity, v: View, pixels: int) -> list[np.ndarray]:
    """Returns the image positions of all polygons, (n, 2) int32 in fixed point."""
    polygons = [polygon for part in parts for polygon in part.polygons]
    lengths = [len(polygon) for polygon in polygons]
    depth = np.array([(part.relief, part.lift) for part in parts for _ in part.polygons])
    relief, lift = np.repeat(depth, lengths, axis=0).T
    points = np.concatenate(polygons)
    x, y = points.real, points.imag
    bulge = np.maximum(1.0 - (x / (p.width + 0.1)) ** 2 - (y / 1.1) ** 2, 0.0)
    z = 0.75 * relief * np.sqrt(bulge) + lift
    turned = x * np.cos(v.yaw) + z * np.sin(v.yaw)
    z = z * np.cos(v.yaw) - x * np.sin(v.yaw)
    nodded = y * np.cos(v.pitch) + z * np.sin(v.pitch)
    scale = v.scale * pixels * np.exp(1j * v.roll)
    flat = (turned + 1j * nodded) * scale
    flat += complex(0.5 + v.shift_x, 0.52 + v.shift_y) * pixels - complex(0.5, 0.5)
    fixed = _fixed_point(flat)
    ends = np.cumsum(lengths).tolist()
    return [fixed[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _fixed_point(points: Polygon) -> np.ndarray:
    """Converts (n,) complex128 pixels to the (n, 2) int32 that cv2.fillPoly reads."""
    return np.rint(points.view(np.float64) * 2**_FIXED_POINT_BITS).astype(np.int32).reshape(-1, 2)


def _render(seed: int, identity: int, v: View, size: int) -> np.ndarray:
    pixels = 2 * size  # drawn at twice the size: four samples per pixel smooth the edges
    p, behind, below, above = person(seed, identity)
    shoulders = Part(v.cloth, [blob(0.0, 2.15, 1.45, 0.9, power=0.75)], 0.0, -0.2)
    parts = [*behind, shoulders, *below, *features(p, v), *above]
    polygons = iter(_project(parts, p, v, pixels))
    canvas = cv2.resize(v.background, (pixels, pixels), interpolation=cv2.INTER_LINEAR)
    for part in parts:
        shapes = [next(polygons) for _ in part.polygons]
        cv2.fillPoly(canvas, shapes, part.color.tolist(), cv2.LINE_8, _FIXED_POINT_BITS)
    if len(v.occluder):
        shape = _fixed_point(v.occluder * pixels)
        cv2.fillPoly(canvas, [shape], v.occluder_color.tolist(), cv2.LINE_8, _FIXED_POINT_BITS)
    image = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return _photograph(image, v)


def _photograph(image: np.ndarray, v: View) -> np.ndarray:
    """Applies blur, light, color cast and sensor noise to a (H, W, 3) uint8 image."""
    if v.blur > 0.3:
        image = cv2.GaussianBlur(image, (5, 5), v.blur)
    levels = 255.0 * np.linspace(0.0, 1.0, 256)[:, None] ** v.gamma
    curve = np.clip(levels * v.gain + v.offset, 0.0, 255.0).astype(np.uint8)
    light = cv2.resize(v.light, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    image = cv2.multiply(cv2.LUT(image, curve[None]), light, scale=1.0 / LIGHT_UNIT)
    bytes_ = np.random.default_rng(v.noise_seed).bytes(image.size)
    grain = np.frombuffer(bytes_, np.uint8).reshape(image.shape)
    return cv2.addWeighted(image, 1.0, grain, v.noise / 128.0, -v.noise)
