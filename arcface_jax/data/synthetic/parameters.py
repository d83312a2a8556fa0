"""Parameters of a synthetic face: the numbers of a person and of a picture.

Face coordinates: x to the right, y down, the origin between nose and eyes, the unit is half the
height of the head. z points at the viewer; features lie on an ellipsoid, so yaw and pitch move them
against the outline as they do in photographs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Polygon = NDArray[np.complex128]
"""(n,) points x + iy: addition shifts, multiplication rotates, and -conj mirrors."""
LIGHT_UNIT = 128
"""Value in a light map that leaves a pixel unchanged."""

_CIRCLE: Polygon = np.exp(1j * np.linspace(0.0, 2.0 * np.pi, 32, endpoint=False))
_SKINS = ((255, 224, 196), (241, 194, 155), (214, 160, 116), (172, 116, 78), (122, 80, 56))
_HAIRS = (
    (36, 28, 30),
    (78, 48, 30),
    (140, 88, 44),
    (226, 188, 108),
    (176, 70, 34),
    (200, 200, 204),
)
_IRISES = ((58, 38, 26), (52, 96, 156), (60, 124, 74), (120, 124, 130))


def _between(low: float, high: float) -> Any:
    """Makes a dataclass field drawn uniformly from [low, high)."""
    return field(metadata={"draw": lambda u: low + (high - low) * u})


def _one_of(*values: float) -> Any:
    """Makes a dataclass field with equally likely values."""
    return field(metadata={"draw": lambda u: values[int(u * len(values))]})


def _chance(probability: float) -> Any:
    """Makes a dataclass field that is true with this probability."""
    return field(metadata={"draw": lambda u: bool(u < probability)})


@dataclass(frozen=True, eq=False, kw_only=True)
class Identity:
    """Parameters shared by all images of a person. Lengths in face units, colors RGB in [0,
    255].
    """

    width: float = _between(0.66, 0.86)  # half width of the head
    jaw: float = _between(
        0.05, 0.42
    )  # narrowing of the face towards the chin, fraction of the width
    squareness: float = _between(0.75, 1.05)  # 1 is an ellipse, less is squarer, see `blob`
    eye_x: float = _between(0.27, 0.42)  # half the distance between the eyes
    eye_y: float = _between(-0.16, 0.06)  # height of the eyes, negative is up
    eye_width: float = _between(0.11, 0.20)  # half width of an eye
    eye_open: float = _between(0.05, 0.14)  # half height of an eye
    eye_tilt: float = _between(-0.22, 0.28)  # radians, positive raises the outer corner
    brow_gap: float = _between(0.17, 0.30)  # from eye to brow
    brow_thickness: float = _between(0.015, 0.08)  # half thickness of the brow
    brow_angle: float = _between(-0.35, 0.35)  # slope of the brow, positive raises the outer end
    brow_arch: float = _between(0.0, 0.08)  # height of the brow's bend
    nose_y: float = _between(0.24, 0.42)  # height of the tip
    nose_width: float = _between(0.08, 0.23)  # half width at the nostrils
    mouth_y: float = _between(0.55, 0.70)  # height of the line between the lips
    mouth_width: float = _between(0.18, 0.38)  # half width of the mouth
    lip: float = _between(0.02, 0.10)  # thickness of one lip
    ear: float = _between(0.10, 0.20)  # radius of an ear
    hairline: float = _between(0.42, 0.80)  # height of its middle above the origin
    hairline_bend: float = _between(-0.25, 0.55)  # positive hangs at the sides, negative peaks
    hair_volume: float = _between(0.05, 0.30)  # thickness of the hair around the head
    hair_length: float = _one_of(-0.2, 0.5, 1.0, 1.7)  # y at which the hair behind the head ends
    hair_waves: float = _one_of(0.0, 0.0, 0.06, 0.12)  # amplitude of bumps on the hair's outline
    hair_wave_count: float = _between(4.0, 14.0)  # bumps over the top of the head
    glasses_size: float = _between(0.20, 0.27)  # half width of a lens
    glasses_roundness: float = _between(0.45, 1.0)  # 1 is round, less is squarer
    glasses_rim: float = _between(0.025, 0.07)  # thickness of the rim
    skin: np.ndarray  # (3,)
    hair: np.ndarray  # (3,)
    iris: np.ndarray  # (3,)
    has_hair: bool = _chance(0.88)
    has_bun: bool = _chance(0.25)  # a knot of hair on top
    has_glasses: bool = _chance(0.45)
    has_moustache: bool = _chance(0.35)
    has_beard: bool = _chance(0.4)
    has_freckles: bool = _chance(0.4)
    has_earrings: bool = _chance(0.4)
    freckles: np.ndarray  # (6, 2) positions on the right half of the face, mirrored when drawn


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """Parameters that vary between images of one person."""

    roll: float = _between(-0.08, 0.08)  # radians, in the image plane
    yaw: float = _between(-0.14, 0.14)  # radians, positive turns to the viewer's right
    pitch: float = _between(-0.08, 0.08)  # radians, positive looks down
    scale: float = _between(0.37, 0.42)  # pixels per face unit, as a fraction of the image size
    shift_x: float = _between(-0.025, 0.025)  # fraction of the image size
    shift_y: float = _between(-0.025, 0.025)  # fraction of the image size
    smile: float = _between(-0.03, 0.10)  # height of the mouth's corners, face units
    mouth_open: float = _between(-0.08, 0.09)  # half the gap between the lips, closed below 0
    brow_raise: float = _between(-0.02, 0.04)  # face units
    eye_closure: float = _between(0.0, 0.25)  # fraction of the identity's eye height that is lost
    gaze: float = _between(-0.3, 0.3)  # fraction of the eye's width
    gamma: float = _between(0.75, 1.3)  # exponent on intensities in [0, 1]
    blur: float = _between(0.0, 0.9)  # standard deviation, pixels; below 0.3 there is none
    noise: float = _between(1.0, 6.0)  # amplitude, gray levels
    gain: np.ndarray  # (3,) multiplier per channel
    offset: np.ndarray  # (3,) gray levels per channel
    light: np.ndarray  # (3, 3, 3) uint8, coarse map of illumination, LIGHT_UNIT is neutral
    background: np.ndarray  # (rows, columns, 3) uint8, coarse texture
    cloth: np.ndarray  # (3,)
    occluder: Polygon  # fractions of the image size; often empty
    occluder_color: np.ndarray  # (3,)
    noise_seed: int


def blob(x: float, y: float, rx: float, ry: float, *, power: float = 1.0, step: int = 1) -> Polygon:
    """Returns (32 / step,) points of a superellipse; power 1 is an ellipse, less is squarer."""
    circle = _CIRCLE[::step]
    if power == 1.0:
        return circle.real * rx + circle.imag * (1j * ry) + complex(x, y)
    u, v = circle.real, circle.imag
    u, v = np.sign(u) * np.abs(u) ** power, np.sign(v) * np.abs(v) ** power
    return u * rx + v * (1j * ry) + complex(x, y)


def _draw_fields(rng: np.random.Generator, kind: type[Identity] | type[View]) -> dict[str, Any]:
    rules = _draw_rules(kind)
    draws = rng.random(len(rules)).tolist()
    return {name: draw(u) for (name, draw), u in zip(rules, draws, strict=True)}


@cache
def _draw_rules(kind: type[Identity] | type[View]) -> list[tuple[str, Callable[[float], Any]]]:
    return [(rule.name, rule.metadata["draw"]) for rule in fields(kind) if rule.metadata]


def draw_identity(seed: int, identity: int) -> Identity:
    """Draws the parameters of person `identity` in the population of a seed."""
    rng = np.random.default_rng([seed, identity, 0])
    tone = rng.random() * (len(_SKINS) - 1)
    lighter, darker = np.array(_SKINS[int(tone) : int(tone) + 2], float)
    skin = lighter + (tone % 1.0) * (darker - lighter)
    # Hair, brows and beard need contrast to the skin, or their shape would not be visible.
    hairs = [hair for hair in _HAIRS if abs(np.mean(hair) - skin.mean()) > 55.0]
    hair = np.array(hairs[rng.integers(len(hairs))]) * rng.uniform(0.85, 1.1)
    return Identity(
        **_draw_fields(rng, Identity),
        skin=skin,
        hair=np.minimum(hair, 255.0),
        iris=np.array(_IRISES[rng.integers(len(_IRISES))], float),
        freckles=rng.uniform((0.2, 0.12), (0.5, 0.42), (6, 2)),
    )


def draw_view(seed: int, identity: int, index: int) -> View:
    """Draws the parameters of picture `index` of a person."""
    # The last number separates this stream from `draw_identity`'s, also at index 0.
    rng = np.random.default_rng([seed, identity, index, 1])
    rows, columns = rng.integers(2, 9, 2).tolist()
    backdrop = rng.uniform(0.0, 255.0, 3) + rng.normal(0.0, 40.0, (rows, columns, 3))
    return View(
        **_draw_fields(rng, View),
        gain=rng.uniform(0.55, 1.1, 3),
        offset=rng.uniform(0.0, 60.0, 3),
        light=_light(rng),
        background=np.clip(backdrop, 0.0, 255.0).astype(np.uint8),
        cloth=rng.uniform(20.0, 240.0, 3),
        occluder=_occluder(rng),
        occluder_color=rng.uniform(0.0, 255.0, 3),
        noise_seed=int(rng.integers(2**32)),
    )


def _light(rng: np.random.Generator) -> np.ndarray:
    """Draws a (3, 3, 3) uint8 light map: a gradient in one direction, and weak colored lamps."""
    angle, strength = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.15, 0.45)
    across = np.array((-1.0, 0.0, 1.0))
    gradient = np.cos(angle) * across + np.sin(angle) * across[:, None]
    lamps = rng.uniform(0.8, 1.2, (3, 3, 3))
    light = (1.0 + strength * gradient)[..., None] * lamps
    return (np.clip(light, 0.15, 1.9) * LIGHT_UNIT).astype(np.uint8)


def _occluder(rng: np.random.Generator) -> Polygon:
    """Draws a bar, or an ellipse like a hand, over a part of every tenth image."""
    kind, angle, x, y, long, wide = rng.random(6)
    if kind < 0.05:
        shape = blob(0.0, 0.0, 0.8, 0.015 + 0.03 * wide, power=0.6)
    elif kind < 0.10:
        shape = blob(0.0, 0.0, 0.05 + 0.08 * long, 0.05 + 0.08 * wide)
    else:
        return np.zeros(0, np.complex128)
    return shape * np.exp(1j * np.pi * angle) + complex(0.1 + 0.8 * x, 0.1 + 0.8 * y)
