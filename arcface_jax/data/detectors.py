"""Face detectors as functions: an SCRFD or YuNet ONNX file, or a function of your own.

Photographs are scaled to a bounded size for both, and the points are scaled back. YuNet was trained
on faces of 10 to 300 pixels: at full resolution it misses a face of 1,500 pixels, or takes its chin
for a face.
"""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from arcface_jax import plugins
from arcface_jax.config.choices import FaceChoice
from arcface_jax.errors import ImageError, UserError, install

SCRFD_SIZE, YUNET_SIZE = 640, 1280
"""Default longer side, in pixels, of the images that a detector sees: SCRFD's as in insightface,
YuNet's as measured in docs/data.md."""
THRESHOLD = 0.5
"""Default lowest score of a face."""
_STRIDES = (8, 16, 32)
_LFS = b"version https://git-lfs"
_NMS_OVERLAP = 0.4  # boxes with a larger overlap are the same face


class Faces(NamedTuple):
    """Faces found in an image."""

    points: np.ndarray
    """(n, 5, 2) float: x, y in pixels, in the order of `faces.POINT_NAMES`."""
    scores: np.ndarray
    """(n,) float detection scores; higher is more certain."""


Detector = Callable[[np.ndarray], Faces]
"""Takes a (H, W, 3) uint8 RGB image; safe to call from many threads."""


def load(name: str, *, threshold: float = THRESHOLD, size: int = 0) -> Detector:
    """Opens a detector by name.

    Args:
      name: an ONNX file, or `module:function`; the function takes a (H, W, 3) uint8 RGB image and
        returns the (n, 5, 2) points of its faces.
      threshold: lowest score of a face, of an ONNX file's faces.
      size: longer side in pixels of the images that the network sees, a multiple of 32; a larger
        size finds smaller faces. For SCRFD, smaller images are also scaled up to it. 0 for
        `YUNET_SIZE` or `SCRFD_SIZE`.

    Raises:
      UserError: the file or function does not exist, or is not a supported detector.
    """
    if ":" in name and not Path(name).exists():
        if size:
            raise UserError(f"--detector-size {size} is for ONNX files, and {name} is a function")
        if threshold != THRESHOLD:
            raise UserError(
                f"--threshold {threshold:g} is for ONNX files, and {name} is a function, which "
                "returns points without scores: leave the option out"
            )
        return _own(name)
    if not Path(name).is_file():
        raise UserError(f"--detector {name}: no such ONNX file, and not module:function")
    if size % _STRIDES[-1] or size < 0:
        raise UserError(f"--detector-size {size} must be a multiple of {_STRIDES[-1]}, as 640 is")
    session = _session(name)
    outputs = [output.name for output in session.get_outputs()]
    if {f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in _STRIDES} <= set(
        outputs
    ):
        return _yunet(name, threshold, size or YUNET_SIZE)
    if len(outputs) == 3 * len(_STRIDES):
        side = _scrfd_side(session, size)
        return lambda image: scrfd(session, image, threshold=threshold, size=side)
    raise UserError(
        f"--detector {name} has the outputs {', '.join(outputs)}: it is neither YuNet (cls_8, "
        "obj_8, ...) nor SCRFD with key points (nine outputs: scores, boxes and "
        "points of three strides)"
    )


def resolve(choice: FaceChoice, *, in_identity_folder: bool) -> FaceChoice:
    """Resolves `auto` for an image; returns any other choice unchanged."""
    if choice != "auto":
        return choice
    return "center" if in_identity_folder else "largest"


def choose(
    faces: Faces,
    shape: tuple[int, ...],
    choice: FaceChoice,
    *,
    where: str,
    in_identity_folder: bool = False,
) -> int:
    """Chooses one of the faces of an image, and returns its number.

    Args:
      faces: faces of the image.
      shape: shape of the image.
      choice: which face to take if there are several; center is the one whose points are nearest to
          the middle of the image.
      where: the image, for the error message.
      in_identity_folder: whether the image is in a folder of its identity, for `auto`.

    Raises:
      ImageError: the image has no face.
    """
    if not len(faces.points):
        raise ImageError(where, "no face")
    middle = faces.points.mean(axis=1)
    center = np.array([shape[1], shape[0]]) / 2
    rank = {
        "largest": np.prod(np.ptp(faces.points, axis=1), axis=1),
        "center": -np.linalg.norm(middle - center, axis=1),
        "score": faces.scores,
    }
    return int(np.argmax(rank[resolve(choice, in_identity_folder=in_identity_folder)]))


def identity(detector: "str | Path | Detector") -> str:
    """Returns a detector's identity: a file's SHA-256, or the name of a function."""
    if not isinstance(detector, str | Path):
        kind = detector if hasattr(detector, "__qualname__") else type(detector)
        return f"{kind.__module__}:{kind.__qualname__}"
    if Path(detector).is_file():
        return hashlib.sha256(Path(detector).read_bytes()).hexdigest()
    return str(detector)


def _own(name: str) -> Detector:
    function = plugins.load(name, field="--detector")

    def detect(image: np.ndarray) -> Faces:
        points = np.asarray(function(image), np.float64)
        if points.size == 0:
            points = points.reshape(0, 5, 2)
        if points.ndim != 3 or points.shape[1:] != (5, 2):
            raise UserError(
                f"--detector {name} returned points of shape {points.shape}; expected (n, 5, 2)"
            )
        return Faces(points, np.ones(len(points)))

    return detect


def _session(name: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"detectors need onnxruntime ({error}): {install('onnx')}") from error
    with open(name, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise UserError(
                f"--detector {name} is a Git LFS pointer, not the file: fetch it with "
                "`git lfs pull`, or download the file itself"
            )
    try:
        return onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime does not export its exception types
        raise UserError(
            f"--detector {name} is not an ONNX file that can be run: {error}"
        ) from error


def _scrfd_side(session: Any, size: int) -> int:
    """Returns the requested side, or the input's if the file has a fixed input size."""
    (taken,) = session.get_inputs()
    fixed = taken.shape[2] if len(taken.shape) == 4 else None
    if not isinstance(fixed, int):
        return size or SCRFD_SIZE
    if size not in (0, fixed):
        raise UserError(
            f"--detector-size {size}: this file takes images of {fixed} x {fixed} only; leave the "
            "option out"
        )
    return fixed


def scrfd(session: Any, image: np.ndarray, *, threshold: float, size: int) -> Faces:
    """Runs SCRFD (insightface's `det_10g.onnx` and its like) and decodes its outputs.

    The image is scaled to fit into a square, aligned to its upper left corner. For each stride s
    and each of the anchors at a cell (x, y), the outputs are a score, the distances left, top,
    right, bottom from the anchor's center (s x, s y) to the box, and the offsets of the five points
    from that center, both in units of s (J. Guo et al., "Sample and Computation Redistribution for
    Efficient Face Detection", 2021).

    Args:
      session: ONNX Runtime's session of the model.
      image: (H, W, 3) uint8 RGB.
      threshold: lowest score of a face.
      size: side of the square in pixels, a multiple of 32.
    """
    height, width = image.shape[:2]
    scale = size / max(height, width)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = np.zeros((size, size, 3), np.uint8)
    square[: fitted[1], : fitted[0]] = cv2.resize(image, fitted)
    blob = ((square.astype(np.float32) - 127.5) / 128.0).transpose(2, 0, 1)[None]
    (taken,) = session.get_inputs()
    outputs = [
        values.reshape(-1, values.shape[-1]) for values in session.run(None, {taken.name: blob})
    ]
    scores, boxes, points = [], [], []
    for stride in _STRIDES:
        side = size // stride
        score, box, point = _of_stride(outputs, side * side)
        anchors = len(score) // (side * side)
        cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
        centers = np.repeat(cells * float(stride), anchors, axis=0)
        kept = score[:, 0] >= threshold
        center = centers[kept]
        distance = box[kept] * stride
        scores.append(score[kept, 0])
        boxes.append(np.concatenate([center - distance[:, :2], center + distance[:, 2:]], 1))
        points.append(center[:, None] + point[kept].reshape(-1, 5, 2) * stride)
    score, box = np.concatenate(scores), np.concatenate(boxes)
    kept = _suppress(box, score)
    factors = np.array([width, height]) / fitted
    return Faces(np.concatenate(points)[kept] * factors, score[kept])


def _of_stride(outputs: list[np.ndarray], cells: int) -> tuple[np.ndarray, ...]:
    """Returns the scores, boxes and points of a stride, identified by their shapes."""
    found = []
    for width in (1, 4, 10):
        fits = [v for v in outputs if v.shape[1] == width and len(v) in (cells, 2 * cells)]
        if len(fits) != 1:
            shapes = ", ".join(str(values.shape) for values in outputs)
            raise UserError(
                f"the detector's outputs have the shapes {shapes}: expected one of {cells} or "
                f"{2 * cells} rows and {width} columns for each stride, as SCRFD has"
            )
        found.append(fits[0])
    return tuple(found)


def _suppress(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns which boxes to keep, by descending score: those that overlap no better one."""
    order = np.argsort(-scores, kind="stable")
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        corner = np.maximum(boxes[best, :2], boxes[rest, :2])
        opposite = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        overlap = np.prod(np.maximum(opposite - corner, 0.0), axis=1)
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        order = rest[overlap <= _NMS_OVERLAP * (areas[best] + areas[rest] - overlap)]
    return np.array(kept, np.int64)


_LOGGING = threading.Lock()


def _new_yunet(name: str, size: tuple[int, int], threshold: float) -> cv2.FaceDetectorYN:
    """Creates the model, without the warning of OpenCV 5 on stderr that no target was chosen."""
    log = cv2.utils.logging
    with _LOGGING:
        level = log.getLogLevel()
        log.setLogLevel(log.LOG_LEVEL_ERROR)
        try:
            return cv2.FaceDetectorYN.create(name, "", size, threshold)
        finally:
            log.setLogLevel(level)


def _yunet(name: str, threshold: float, size: int) -> Detector:
    """Opens OpenCV's YuNet, which decodes its own outputs; one instance per thread."""
    own = threading.local()

    def detect(image: np.ndarray) -> Faces:
        height, width = image.shape[:2]
        scale = min(1.0, size / max(height, width))
        seen = (max(1, round(width * scale)), max(1, round(height * scale)))
        if scale < 1:
            image = cv2.resize(image, seen, interpolation=cv2.INTER_AREA)
        if not hasattr(own, "model"):
            own.model = _new_yunet(name, seen, threshold)
        own.model.setInputSize(seen)
        _, found = own.model.detect(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        found = np.zeros((0, 15)) if found is None else found
        # A box, the points from the viewer's left to right, and the score.
        points = found[:, 4:14].reshape(-1, 5, 2) * (np.array([width, height]) / seen)
        return Faces(points, found[:, 14])

    return detect
