"""Pictures of a training set: how many images identities have, and what they look like."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from arcface_jax.data.images import IMAGE_SIZE, decode_any_size, encode
from arcface_jax.data.source import Source
from arcface_jax.errors import ImageError
from arcface_jax.runtime.files import write_atomic

_ROWS, _COLUMNS = 8, 8
_CAPTION, _LINE = 168, 20  # pixels of the names' column, letters of its lines


def histogram(per_identity: np.ndarray, path: Path) -> Path:
    """Identities by their number of images, as a PNG.

    Args:
      per_identity: (identities,) images of each.
      path: of the picture.
    """
    from matplotlib.figure import Figure

    most = int(per_identity.max(initial=1))
    edges = np.unique(np.round(np.geomspace(1, most + 1, 40)).astype(int))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(per_identity, [0, *edges.tolist()], color="#3b6ea5", edgecolor="white")
    axes.set(xlabel="images of an identity", ylabel="identities", yscale="log")
    axes.set_xscale("symlog", linthresh=1.0)
    figure.savefig(path, dpi=120)
    return path


def sheet(source: Source, path: Path, *, seed: int) -> Path:
    """Images of identities drawn at random, a row each, as a PNG; a red square is unreadable.

    Where identities have names, these stand to the left of the rows.

    Args:
      source: the training set.
      path: of the picture.
      seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    labels = source.labels()
    counts = np.bincount(labels[labels >= 0], minlength=source.num_classes)
    # Those that fill a row show most; where there are too few, any that has an image.
    order = rng.permutation(len(counts))
    chosen = order[np.argsort(-np.minimum(counts[order], _COLUMNS), kind="stable")][:_ROWS]
    canvas = np.full((_ROWS * IMAGE_SIZE, _COLUMNS * IMAGE_SIZE, 3), 255, np.uint8)
    shown = chosen[counts[chosen] > 0].tolist()
    for row, identity in enumerate(shown):
        numbers = rng.permutation(np.flatnonzero(labels == identity))[:_COLUMNS]
        for column, number in enumerate(numbers.tolist()):
            y, x = row * IMAGE_SIZE, column * IMAGE_SIZE
            canvas[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] = _thumbnail(source, number)
    if source.names is not None:
        canvas = np.hstack([_captions([source.names[identity] for identity in shown]), canvas])
    write_atomic(path, encode(canvas))
    return path


def _captions(words: Sequence[str]) -> np.ndarray:
    """(896, _CAPTION, 3) uint8: a name beside each row, broken into lines."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    # OpenCV writes ASCII only.
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = ImageFont.truetype(str(file), 13)
    image = Image.new("RGB", (_CAPTION, _ROWS * IMAGE_SIZE), "white")
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(words):
        text = name.encode("utf-8", "replace").decode()
        lines = textwrap.wrap(text, _LINE, max_lines=5, placeholder="...")
        draw.text((6, row * IMAGE_SIZE + 8), "\n".join(lines), fill="black", font=font)
    return np.array(image)


def _thumbnail(source: Source, number: int) -> np.ndarray:
    try:
        data = source.read(number).data
        image = decode_any_size(data, where=source.where(number))
    except ImageError:
        return np.full((IMAGE_SIZE, IMAGE_SIZE, 3), (200, 0, 0), np.uint8)
    return cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
