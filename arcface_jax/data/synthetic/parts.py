"""The colored polygons of a synthetic face, from the parameters of a person and of a picture."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from arcface_jax.data.synthetic.parameters import Identity, Polygon, View, blob, draw_identity

_ARC = np.linspace(np.pi, 2.0 * np.pi, 33)  # left to right over the top of the head
_SPAN = np.linspace(-1.0, 1.0, 15)  # left to right across an eye, a brow, the mouth, the hairline
_EYE_WHITE = np.array((246.0, 244.0, 240.0))


class Part(NamedTuple):
    """Polygons of one color; z = relief * ellipsoid + lift.

    Points are complex numbers x + iy: addition shifts, multiplication rotates, and -conj mirrors.
    """

    color: np.ndarray  # (3,) RGB
    polygons: list[Polygon]  # face units
    relief: float = 1.0  # 1 lies on the face, 0 on the silhouette
    lift: float = 0.0  # face units towards the viewer


def _band(x: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> Polygon:
    """Returns a (2n,) polygon between two curves over the same x."""
    return np.concatenate([x + 1j * top, (x + 1j * bottom)[::-1]])


def _both(polygon: Polygon) -> list[Polygon]:
    """Returns the polygon and its mirror image: faces are symmetric, so a flip keeps the
    identity.
    """
    return [polygon, -polygon.conj()]


def _head(p: Identity, grow: float = 0.0) -> Polygon:
    outline = blob(0.0, 0.0, p.width + grow, 1.0 + grow, power=p.squareness)
    outline.real *= 1.0 - p.jaw * np.maximum(outline.imag, 0.0) ** 1.5
    return outline


def _hair_back(p: Identity) -> list[Part]:
    if not p.has_hair:
        return []
    radius = 1.0 + p.hair_waves * np.sin(p.hair_wave_count * (_ARC + np.pi / 2)) ** 2
    half_width = p.width + p.hair_volume + 0.02
    cap = radius * (half_width * np.cos(_ARC) + 1j * (1.0 + 0.8 * p.hair_volume) * np.sin(_ARC))
    # Short hair closes in on the head, long hair falls outwards.
    end = half_width + 0.06 * p.hair_length if p.hair_length > 0 else p.width
    cap = np.concatenate([cap, [end + 1j * p.hair_length, -end + 1j * p.hair_length]])
    parts = [Part(p.hair * 0.82, [cap], 0.0, -0.15)]
    if p.has_bun:
        parts.append(Part(p.hair, [blob(0.0, -1.1 - 0.8 * p.hair_volume, 0.3, 0.24)], 0.0))
    return parts


def _hair_front(p: Identity) -> list[Part]:
    if not p.has_hair:
        return []
    x = (p.width + 0.04) * np.sin(_SPAN * np.pi / 2)
    line = -p.hairline + p.hairline_bend * (_SPAN**2 - 0.25)
    line += (-0.12 - line) * np.maximum((np.abs(_SPAN) - 0.7) / 0.3, 0.0) ** 2
    top = -(1.0 + 0.6 * p.hair_volume) * np.sqrt(1.0 - (_SPAN * 0.98) ** 2) - 0.02
    x_shine, shine = x[4:11], (0.35 * line + 0.65 * top)[4:11]
    light = np.minimum(p.hair * 1.25 + 12.0, 255.0)
    return [
        Part(p.hair, [_band(x, np.minimum(top, line), line)], 0.85),
        Part(light, [_band(x_shine, shine - 0.03, shine + 0.03)], 0.5),
    ]


def _nose(p: Identity) -> list[Part]:
    w, tip = p.nose_width, p.nose_y
    x = np.array([0.035, 0.05, w, 0.85 * w, 0.0])
    side = x + 1j * np.array([p.eye_y + 0.1, tip - 0.14, tip - 0.03, tip + 0.05, tip + 0.08])
    light = np.minimum(p.skin * 1.08, 255.0)
    return [
        Part(p.skin * 0.86, [np.concatenate([side, -side.conj()[::-1]])], 1.0, 0.12),
        Part(light, [blob(0.0, tip - 0.03, w * 0.42, 0.06, step=2)], 1.0, 0.2),
        Part(p.skin * 0.45, _both(blob(w * 0.5, tip + 0.035, w * 0.22, 0.022, step=2)), 1.0, 0.12),
    ]


def _cheeks(p: Identity) -> list[Part]:
    parts = [Part(p.skin * (1.0, 0.86, 0.84), _both(blob(p.width * 0.58, 0.3, 0.16, 0.11)))]
    if p.has_freckles:
        dots = [blob(x, y, 0.03, 0.03, step=4) for x, y in p.freckles]
        parts.append(Part(p.skin * 0.6, [side for dot in dots for side in _both(dot)]))
    return parts


def _beard(p: Identity) -> list[Part]:
    parts = []
    if p.has_beard:
        outer, inner = _head(p, 0.03), blob(0.0, 0.22, p.width * 0.72, 0.30)
        lower = [outer[outer.imag > 0.2], inner[inner.imag > 0.2][::-1]]
        parts.append(Part(p.hair * 0.9, [np.concatenate(lower)], 0.6))
    if p.has_moustache:
        x, half = (p.mouth_width + 0.05) * _SPAN, 0.055 * (1.1 - _SPAN**2)
        y = p.mouth_y - p.lip - 0.06 + 0.1 * _SPAN**2
        parts.append(Part(p.hair * 0.8, [_band(x, y - half, y + half)]))
    return parts


def _glasses(p: Identity) -> list[Part]:
    if not p.has_glasses:
        return []
    size, rim, y = p.glasses_size, p.glasses_rim, p.eye_y
    center = max(p.eye_x, size + 0.05)
    outer = blob(center, y + 0.02, size, size * 0.86, power=p.glasses_roundness)
    inner = blob(center, y + 0.02, size - rim, size * 0.86 - rim, power=p.glasses_roundness)
    bridge = blob(0.0, y - 0.02, center - size + 0.01, rim * 0.6, step=2)
    hinge, ear = center + size, p.width + 0.02
    temple = np.array([hinge - 0.04j, ear - 0.05j, ear, hinge + 0.02j]) + 1j * y
    color = np.array((30.0, 28.0, 34.0))
    # Two contours in one fill leave the lens open, since the overlap counts twice.
    return [
        Part(color, [*_both(outer), *_both(inner)], 1.0, 0.1),
        Part(color, [bridge, *_both(temple)], 1.0, 0.1),
    ]


def _body(p: Identity) -> list[Part]:
    """Returns neck, ears and head."""
    neck = np.array([-0.36 + 0.5j, 0.36 + 0.5j, 0.42 + 1.5j, -0.42 + 1.5j])
    parts = [
        Part(p.skin * 0.78, [neck], 0.0, -0.1),
        Part(p.skin * 0.9, _both(blob(p.width + 0.01, 0.06, p.ear * 0.7, p.ear * 1.2)), 0.0, -0.05),
        Part(p.skin, [_head(p)], 0.0),
    ]
    if p.has_earrings:
        ring = blob(p.width + 0.03, 0.1 + p.ear * 1.2, 0.075, 0.075, step=2)
        parts.append(Part(np.array((250.0, 214.0, 96.0)), _both(ring), 0.0))
    return parts


def _eyes(p: Identity, v: View) -> list[Part]:
    height = p.eye_open * (1.0 - v.eye_closure)
    iris = min(p.eye_open * 0.95, p.eye_width * 0.62)
    gaze = v.gaze * (p.eye_width - iris)
    centers = (gaze - p.eye_x, gaze + p.eye_x)

    def discs(radius: float) -> list[Polygon]:
        return [blob(x, p.eye_y, radius, min(radius, height * 0.96), step=2) for x in centers]

    x, y = p.eye_x + p.eye_width * _SPAN, p.eye_y - p.eye_tilt * p.eye_width * _SPAN
    lid = height * (1.0 - np.abs(_SPAN) ** 2.2)
    glint = [blob(x - 0.02, p.eye_y - 0.35 * height, 0.018, 0.018, step=4) for x in centers]
    return [
        Part(p.skin * 0.3, _both(_band(x, y - lid - 0.035, y + 0.8 * lid))),
        Part(_EYE_WHITE, _both(_band(x, y - lid, y + 0.8 * lid))),
        Part(p.iris, discs(iris)),
        Part(p.iris * 0.2, discs(iris * 0.5)),
        Part(_EYE_WHITE, glint),
    ]


def _brows(p: Identity, v: View) -> list[Part]:
    x = p.eye_x + 0.01 + (p.eye_width + 0.05) * _SPAN
    y = p.eye_y - p.brow_gap - v.brow_raise - p.brow_angle * 0.16 * _SPAN
    y = y - p.brow_arch * (1.0 - _SPAN**2)
    half = p.brow_thickness * (1.0 - 0.55 * np.maximum(_SPAN, 0.0))
    return [Part(p.hair * 0.7, _both(_band(x, y - half, y + half)))]


def _mouth(p: Identity, v: View) -> list[Part]:
    x, bow = (p.mouth_width + 0.3 * max(v.smile, 0.0)) * _SPAN, 1.0 - _SPAN**2
    center = p.mouth_y - v.smile * _SPAN**2
    gap = max(v.mouth_open, 0.0)
    dent = 1.0 - 0.35 * np.exp(-((_SPAN / 0.16) ** 2))
    upper, lower = center - gap * 0.6 * bow, center + (gap + 0.008) * bow
    lips = _band(x, upper - p.lip * bow * dent - 0.008, lower + 1.15 * p.lip * bow + 0.008)
    parts = [
        Part(p.skin * (0.80, 0.52, 0.52), [lips]),
        Part(p.skin * 0.22, [_band(x, upper, lower)]),
    ]
    if gap > 0.03:
        teeth = _band(x * 0.8, upper + 0.005, upper + 0.5 * gap * bow)
        parts.append(Part(_EYE_WHITE, [teeth]))
    return parts


def features(p: Identity, v: View) -> list[Part]:
    """Returns the parts that expression moves: mouth, eyes, brows."""
    return [*_mouth(p, v), *_eyes(p, v), *_brows(p, v)]


@lru_cache(maxsize=1024)
def person(seed: int, identity: int) -> tuple[Identity, list[Part], list[Part], list[Part]]:
    """Returns the identity and its constant parts: back of the shoulders, below and above features.

    Cached because a data set shows each person many times; the parts are never modified.
    """
    p = draw_identity(seed, identity)
    below = [*_body(p), *_cheeks(p), *_beard(p), *_nose(p)]
    return p, _hair_back(p), below, [*_hair_front(p), *_glasses(p)]
