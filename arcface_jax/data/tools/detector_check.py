"""`data.py detector`: identify a detector's file, open it, and test that it finds faces."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.data import detectors
from arcface_jax.data.detectors import Detector, Faces
from arcface_jax.data.faces import TEMPLATE, read
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.data.synthetic.faces import draw_face

DRAWN = 12
"""Number of synthetic faces that a detector is tested on."""
_CANVAS = (480, 640, 3)
_CORNERS = ((40, 60), (180, 260), (300, 420))  # corners of the pasted face, y and x
_TOLERANCE = 0.25  # share of the distance of the eyes: a synthetic face is not a photograph


class Known(NamedTuple):
    """A published detector."""

    name: str
    source: str
    license: str


_INSIGHTFACE = "insightface's models, for non-commercial research"
KNOWN = {
    "ebafce4e3c118d6554634be5c27ab333b4c047a9a8c3faf1d7cf93101c22f0f0": Known(
        "YuNet, May 2026",
        "OpenCV Zoo, models/face_detection_yunet/face_detection_yunet_2026may.onnx",
        "MIT",
    ),
    "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4": Known(
        "YuNet, March 2023",
        "OpenCV Zoo, models/face_detection_yunet/face_detection_yunet_2023mar.onnx",
        "MIT",
    ),
    "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91": Known(
        "SCRFD, 10 GFLOPs, with points",
        "insightface's release v0.7, det_10g.onnx in buffalo_l.zip",
        _INSIGHTFACE,
    ),
    "5e4447f50245bbd7966bd6c0fa52938c61474a04ec7def48753668a9d8b4ea3a": Known(
        "SCRFD, 0.5 GFLOPs, with points",
        "insightface's release v0.7, det_500m.onnx in buffalo_sc.zip",
        _INSIGHTFACE,
    ),
}
"""Published detectors by SHA-256."""


class Checked(NamedTuple):
    """Result of a detector's check."""

    sha256: str
    known: Known | None
    found: int
    """Number of the `DRAWN` synthetic faces whose five points were found."""
    in_photograph: Faces | None
    """Faces found in the photograph, if one was given."""


def check(path: Path, *, photograph: Path | None = None, size: int = 0) -> Checked:
    """Opens a detector and tests it on synthetic faces, and on a photograph if given.

    Args:
      path: the ONNX file.
      photograph: an image file.
      size: as `detectors.load`.

    Raises:
      UserError: the file is missing, or is not a supported detector.
    """
    detect = detectors.load(str(path), size=size)
    digest = detectors.identity(path)
    found = sum(_finds(detect, number) for number in range(DRAWN))
    in_photograph = None if photograph is None else detect(read(photograph))
    return Checked(digest, KNOWN.get(digest), found, in_photograph)


def _finds(detect: Detector, number: int) -> bool:
    """Returns whether a synthetic face's points are found, in the order of `faces.POINT_NAMES`."""
    y, x = _CORNERS[number % len(_CORNERS)]
    picture = np.full(_CANVAS, 128, np.uint8)
    picture[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] = draw_face(seed=0, identity=number, index=0)
    expected = TEMPLATE + np.array([x, y])
    eyes = np.linalg.norm(expected[1] - expected[0])
    errors = np.linalg.norm(detect(picture).points - expected, axis=-1).mean(axis=-1)
    return bool((errors < _TOLERANCE * eyes).any())
