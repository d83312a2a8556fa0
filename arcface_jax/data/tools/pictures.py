"""Plots of a training set: a histogram of images per identity, and sample images."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from arcface_jax.data.images import IMAGE_SIZE, decode_any_size, encode
from arcface_jax.data.source import Source
from arcface_jax.errors import ImageError
from arcface_jax.runtime.files import atomic_files, write_atomic

_ROWS, _COLUMNS = 8, 8
_SINGLE, _BINS = 31, 20  # numbers of images that each have a bin; bins above them
_SPREAD = 5  # from this ratio of largest to smallest on, bins grow by a factor
_NUMBERED, _LETTERS = 16, 90  # bars with numbers on them; letters of the axis labels
_LOG_ABOVE = 50  # ratio of the highest bar to the lowest
_CAPTION, _LINE = 168, 20  # width of the names' column in pixels, of its lines in letters


class Bin(NamedTuple):
    """Identities that have from `low` to `high` images."""

    low: int
    high: int
    identities: int

    @property
    def label(self) -> str:
        """Label for an axis."""
        # An en dash, as between numbers in print.
        return f"{self.low}" if self.low == self.high else f"{self.low}\N{EN DASH}{self.high}"


def bins(per_identity: np.ndarray) -> list[Bin]:
    """Counts identities by their number of images: a bin for each number, or for growing ranges.

    Args:
      per_identity: (identities,) number of images.

    Returns:
      Adjacent bins, from the smallest number to the largest; more than 31 numbers share about 20
      bins, of one width or, where they spread over more than a factor of 5, with ends that grow by
      a factor. 0 then has a bin of its own.
    """
    if not per_identity.size:
        return []
    low, high = int(per_identity.min()), int(per_identity.max())
    if high - low < _SINGLE:
        starts = np.arange(low, high + 1)
    elif high < _SPREAD * low:
        starts = np.arange(low, high + 1, -(-(high - low) // _BINS))
    else:
        starts = np.unique(np.round(np.geomspace(max(1, low), high + 1, _BINS + 1)).astype(int))
        starts = np.concatenate([[0] if low == 0 else [], starts[:-1]]).astype(int)
    ends = [*(starts[1:] - 1).tolist(), high]
    counts, _ = np.histogram(per_identity, [*starts.tolist(), high + 1])
    return [Bin(*each) for each in zip(starts.tolist(), ends, counts.tolist(), strict=True)]


def needs_log(counts: Sequence[int]) -> bool:
    """Returns whether bars of these heights need a logarithmic axis."""
    found = [count for count in counts if count]
    return bool(found) and max(found) > _LOG_ABOVE * min(found)


def histogram(per_identity: np.ndarray, path: Path) -> Path:
    """Plots the number of identities by number of images, as a PNG.

    Args:
      per_identity: (identities,) number of images.
      path: path of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    found = bins(per_identity)
    heights = [one.identities for one in found]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar(range(len(found)), heights, width=0.92, color="#3b6ea5")
    if len(found) <= _NUMBERED:
        axes.bar_label(bars, [f"{height:,}" if height else "" for height in heights], fontsize=8)
    if needs_log(heights):
        axes.set_yscale("log")
        axes.set_ylim(0.7, 2 * max(heights))
    else:
        axes.set_ylim(0, 1.1 * max([1, *heights]))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    longest = 2 + max([0, *(len(one.label) for one in found)])
    shown = range(0, len(found), max(1, -(-longest * len(found) // _LETTERS)))
    beside = max(0.6, 2.5 - len(found) / 2)  # keeps few bars narrower than the picture
    axes.set_xticks(list(shown), [found[i].label for i in shown])
    axes.set_xlim(-beside, len(found) - 1 + beside)
    axes.set(xlabel="images of an identity", ylabel="identities", title=title(per_identity))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    with atomic_files(path) as part:
        figure.savefig(part, dpi=120)
    return path


def title(per_identity: np.ndarray) -> str:
    """Returns the sizes of a set in one line."""
    if not per_identity.size:
        return "no identities"
    low, high = per_identity.min(), per_identity.max()
    return (
        f"{len(per_identity):,} identities, {per_identity.sum():,} images: {low:,} to {high:,} of "
        f"each, median {np.median(per_identity):,.0f}"
    )


class Row(NamedTuple):
    """An identity and some of its images."""

    identity: int
    numbers: list[int]


def sample(source: Source, *, seed: int) -> list[Row]:
    """Draws up to eight identities at random, with up to eight images of each.

    Args:
      source: the training set.
      seed: random seed of the choice.
    """
    rng = np.random.default_rng(seed)
    labels = source.labels()
    counts = np.bincount(labels[labels >= 0], minlength=source.num_classes)
    # Identities that fill a row show most; if there are too few, take any with an image.
    order = rng.permutation(len(counts))
    chosen = order[np.argsort(-np.minimum(counts[order], _COLUMNS), kind="stable")][:_ROWS]
    return [
        Row(identity, rng.permutation(np.flatnonzero(labels == identity))[:_COLUMNS].tolist())
        for identity in chosen[counts[chosen] > 0].tolist()
    ]


def sheet(source: Source, path: Path, *, seed: int) -> Path:
    """Draws the images of `sample`, a row per identity, as a PNG; a red square is unreadable.

    Identities' names, if any, are to the left of the rows.

    Args:
      source: the training set.
      path: path of the picture.
      seed: random seed of the choice.
    """
    rows = sample(source, seed=seed)
    canvas = np.full((_ROWS * IMAGE_SIZE, _COLUMNS * IMAGE_SIZE, 3), 255, np.uint8)
    for row, (_, numbers) in enumerate(rows):
        for column, number in enumerate(numbers):
            y, x = row * IMAGE_SIZE, column * IMAGE_SIZE
            try:
                tile = thumbnail(source, number)
            except ImageError:
                tile = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), (200, 0, 0), np.uint8)
            canvas[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] = tile
    if source.names is not None:
        canvas = np.hstack([_captions([source.names[row.identity] for row in rows]), canvas])
    write_atomic(path, encode(canvas))
    return path


def _captions(words: Sequence[str]) -> np.ndarray:
    """Draws (896, _CAPTION, 3) uint8: a name next to each row, broken into lines."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    # OpenCV's text is ASCII only.
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = ImageFont.truetype(str(file), 13)
    image = Image.new("RGB", (_CAPTION, _ROWS * IMAGE_SIZE), "white")
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(words):
        text = name.encode("utf-8", "replace").decode()
        lines = textwrap.wrap(text, _LINE, max_lines=5, placeholder="...")
        draw.text((6, row * IMAGE_SIZE + 8), "\n".join(lines), fill="black", font=font)
    return np.array(image)


def thumbnail(source: Source, number: int) -> np.ndarray:
    """Returns an image of a set, (112, 112, 3) uint8 RGB.

    Raises:
      ImageError: the image cannot be read.
    """
    data = source.read(number).data
    return fitted(decode_any_size(data, where=source.where(number)))


def fitted(image: np.ndarray) -> np.ndarray:
    """Scales an image of any size to fit into (112, 112, 3) uint8, on gray."""
    height, width = image.shape[:2]
    scale = IMAGE_SIZE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 128, np.uint8)
    top, left = (IMAGE_SIZE - size[1]) // 2, (IMAGE_SIZE - size[0]) // 2
    smaller = image if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    canvas[top : top + size[1], left : left + size[0]] = smaller
    return canvas
