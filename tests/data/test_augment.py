"""Augmentation: each operation against a plain formula, rates, and what it may depend on."""

import colorsys
import math
import pickle

import cv2
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest

from arcface_jax.config import AugmentConfig
from arcface_jax.data import augment
from arcface_jax.data.synthetic.faces import draw_face

FACE = draw_face(seed=0, identity=3, index=1)
ALL = ("dali", "adaface", "erasing")


def operation(name: str, *draws: float) -> np.ndarray:
    chosen = augment.OPERATIONS[name]
    assert len(draws) == chosen.draws
    before = FACE.copy()
    after = chosen.apply(FACE, list(draws))
    np.testing.assert_array_equal(FACE, before)
    assert (after.shape, after.dtype) == (FACE.shape, np.uint8)
    return after


def augmented(sets: tuple[str, ...], *, step: int = 5, seed: int = 0, batch: int = 64, **config):
    """The operations' work on a batch of one face."""
    apply = augment.make(AugmentConfig(sets=sets, **config), seed=seed)
    assert apply is not None
    images = np.repeat(FACE[None], batch, axis=0)
    apply(images, step=step, batch_size=batch, part=slice(0, batch))
    return images


# ---- The operations ------------------------------------------------------------------------------


@pytest.mark.parametrize(("hue", "saturation"), [(0, 1), (20, 1), (0, 1.2), (13.5, 1.1), (0, 0)])
def test_hue_and_saturation_are_a_turn_and_a_factor_of_the_chroma(hue, saturation):
    """Against colorsys, whose YIQ (FCC) differs from DALI's in the third digit."""
    expected = np.empty((112 * 112, 3))
    for i, (r, g, b) in enumerate(FACE.reshape(-1, 3) / 255.0):
        y, i_, q = colorsys.rgb_to_yiq(r, g, b)
        turned = complex(i_, q) * saturation * np.exp(-1j * math.radians(hue))
        i_, q = turned.real, turned.imag
        expected[i] = (  # colorsys.yiq_to_rgb clips
            y + 0.9468822170900693 * i_ + 0.6235565819861433 * q,
            y - 0.27478764629897834 * i_ - 0.6356910791873801 * q,
            y - 1.1085450346420322 * i_ + 1.7090069284064666 * q,
        )
    matrix = augment.color_matrix(hue=hue, saturation=saturation)
    ours = FACE.reshape(-1, 3) @ matrix.T
    assert np.abs(ours - 255.0 * expected).max() < 3.0
    if saturation:
        draws = (hue / 20, (saturation - 1) / 0.2)
        applied = operation("dali_colour", *draws).reshape(-1, 3)
        assert np.abs(applied - ours.clip(0, 255)).max() <= 1.0  # OpenCV rounds the matrix


def test_gray_stays_gray_whatever_the_hue():
    matrix = augment.color_matrix(hue=17.0, saturation=1.15)
    np.testing.assert_allclose(matrix @ np.full(3, 80.0), 80.0, atol=0.1)


def test_dali_gray_is_the_luma_in_all_channels():
    gray = operation("dali_gray")
    luma = FACE @ np.array([0.299, 0.587, 0.114])
    assert np.abs(gray - luma[..., None]).max() <= 1.0


@pytest.mark.parametrize(("draw", "sigma", "taps"), [(0.2, 0.8, 3), (0.7, 1.1, 5)])
def test_blur_is_the_gaussian_of_its_window(draw: float, sigma: float, taps: int):
    x = np.arange(taps) - taps // 2
    kernel = np.exp(-0.5 * (x / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(FACE.astype(float), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    for axis in (0, 1):
        padded = np.apply_along_axis(lambda row: np.convolve(row, kernel, "same"), axis, padded)
    assert np.abs(operation("dali_blur", draw) - padded[2:-2, 2:-2]).max() < 2.0


def spectrum(image: np.ndarray) -> float:
    """Share of the energy above half the highest frequency."""
    power = np.abs(np.fft.rfft(image.astype(float) - image.mean(), axis=1)) ** 2
    return power[:, 28:].sum() / power[:, 1:].sum()


@pytest.mark.parametrize("name", ["dali_low_resolution", "adaface_low_resolution"])
def test_low_resolution_loses_what_is_fine_and_keeps_what_is_coarse(name: str):
    more = () if name.startswith("dali") else (0.5, 0.3)  # area down, linear up
    scores = []
    for draw in (0.99, 0.5, 0.0):
        image = operation(name, draw, *more)
        scores.append(spectrum(image))
        coarse = [cv2.resize(x, (8, 8), interpolation=cv2.INTER_AREA) for x in (image, FACE)]
        assert np.abs(coarse[0].astype(int) - coarse[1]).mean() < 4
    assert spectrum(FACE) > scores[0] > scores[1] > scores[2]


def test_the_size_that_resolution_falls_to_is_in_its_range(monkeypatch):
    sides = []
    resize = cv2.resize

    def noted(image, size, interpolation):
        sides.append(size)
        return resize(image, size, interpolation=interpolation)

    monkeypatch.setattr(cv2, "resize", noted)
    for name, low, high in (("dali", 56, 89), ("adaface", 22, 111)):
        draws = () if name == "dali" else (0.1, 0.9)
        for draw, expected in ((0.0, low), (0.999999, high)):
            operation(f"{name}_low_resolution", draw, *draws)
            assert sides[-2:] == [(expected, expected), (112, 112)]


@pytest.mark.parametrize("turns", [(0.1, 0.2, 0.3), (0.3, 0.1, 0.2), (0.5, 0.4, 0.3)])
@pytest.mark.parametrize("draws", [(0.0, 0.5, 0.5), (0.5, 0.1, 0.5), (0.5, 0.5, 1.0), (1, 0, 0.8)])
def test_photometric_equals_pillow(draws, turns):
    """torchvision's ColorJitter is Pillow's three enhancements in a drawn order."""
    kinds = (PIL.ImageEnhance.Brightness, PIL.ImageEnhance.Contrast, PIL.ImageEnhance.Color)
    image = PIL.Image.fromarray(FACE)
    for i in np.argsort(turns):
        image = kinds[i](image).enhance(0.5 + draws[i])
    ours = operation("adaface_photometric", *draws, *turns)
    assert np.abs(ours.astype(int) - np.array(image)).max() <= 4  # each step rounds


def test_a_crop_keeps_a_rectangle_in_its_place_and_blackens_the_rest():
    rng = np.random.default_rng(0)
    areas = []
    for draws in rng.random((400, 4)):
        out = operation("adaface_crop", *draws)
        kept = (out == FACE).all(axis=2) & (FACE.any(axis=2))
        rows, columns = np.flatnonzero(kept.any(1)), np.flatnonzero(kept.any(0))
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        np.testing.assert_array_equal(out[box], FACE[box])
        out[box] = 0
        assert not out.any()
        areas.append(len(rows) * len(columns) / 112**2)
    assert 0.18 < min(areas) < 0.25 and 0.95 < max(areas) <= 1
    assert np.mean(areas) == pytest.approx(0.6, abs=0.05)  # uniform from 0.2 to 1


def test_erasing_hides_a_rectangle_under_noise():
    rng = np.random.default_rng(0)
    areas, values = [], []
    for draws in rng.random((400, 5)):
        changed = (operation("erasing", *draws) != FACE).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert changed[box].mean() > 0.98 and changed.sum() == changed[box].sum()
        areas.append(changed[box].size / 112**2)
        values.append(operation("erasing", *draws)[box].ravel())
    assert 0.015 < min(areas) < 0.04 and 0.36 < max(areas) < 0.41
    assert np.mean(areas) == pytest.approx(0.21, abs=0.02)  # uniform from 0.02 to 0.4
    counts = np.bincount(np.concatenate(values), minlength=256)
    assert counts.min() > 0.95 * counts.mean() and counts.max() < 1.05 * counts.mean()


# ---- Which image gets which ----------------------------------------------------------------------


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_each_happens_at_its_rate_and_alone(name: str):
    """Of 4,096 images; five standard deviations."""
    chosen = name.split("_")[0]
    off = {other: 0.0 for other in augment.OPERATIONS if other != name}
    probability = getattr(AugmentConfig(), name)
    images = augmented((chosen,), batch=4096, **off)
    rate = np.mean([not np.array_equal(image, FACE) for image in images])
    assert abs(rate - probability) < 5 * math.sqrt(probability * (1 - probability) / 4096)


def test_one_operation_changes_nothing_of_another():
    both = augmented(("dali",), dali_blur=0.0, dali_colour=0.0, dali_gray=0.3)
    alone = augmented(("dali",), dali_low_resolution=0, dali_blur=0, dali_colour=0, dali_gray=0.3)
    touched = (alone != FACE).any(axis=(1, 2, 3))
    gray = (both == both[..., :1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(touched, gray)
    assert 5 < gray.sum() < 40


def test_an_image_depends_on_seed_step_and_place_alone():
    whole = augmented(ALL)
    apply = augment.make(AugmentConfig(sets=ALL), seed=0)
    again = pickle.loads(pickle.dumps(apply))
    for part in (slice(0, 16), slice(16, 64)):
        images = np.repeat(FACE[None], part.stop - part.start, axis=0)
        again(images, step=5, batch_size=64, part=part)
        np.testing.assert_array_equal(images, whole[part])
    for other in (augmented(ALL, step=6), augmented(ALL, seed=1)):
        assert (other != whole).any(axis=(1, 2, 3)).mean() > 0.5


def test_all_operations_take_every_draw_and_any_image():
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (112, 112, 3), np.uint8)
    for image in (noise, np.zeros_like(noise), np.full_like(noise, 255)):
        for chosen in augment.OPERATIONS.values():
            for edge in (0.0, np.nextafter(1.0, 0.0)):
                after = chosen.apply(image, [float(edge)] * chosen.draws)
                assert (after.shape, after.dtype) == (image.shape, np.uint8)


def test_nothing_is_made_where_nothing_is_asked_for():
    assert augment.make(AugmentConfig(), seed=0) is None
