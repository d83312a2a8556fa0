"""The page to review findings: report.html, and its pictures in a folder next to it.

A picture is a strip of up to five images of an identity, so thousands of findings need few files
and the page loads only the visible ones. The page has every cell of the findings' files and writes
them again with the decisions made on it.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from markupsafe import Markup

from arcface_jax.cleaning import files
from arcface_jax.cleaning.files import Row
from arcface_jax.cleaning.identities import Identities
from arcface_jax.data.images import encode_jpeg
from arcface_jax.data.source import Source, account
from arcface_jax.data.tools import pictures
from arcface_jax.errors import ImageError, UserError
from arcface_jax.evaluation import page
from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.runtime import sealed
from arcface_jax.runtime.files import write_atomic

PAGE = "report.html"
PICTURES = "report"
"""Folder of the strips, next to the page."""
REVIEWED = (files.DUPLICATES, files.MIXED, files.IMAGES)
"""Files whose findings are on the page."""
FACES = 5
"""Most images in a strip."""
_SIDE, _QUALITY = 96, 80  # pixels of an image in a strip; JPEG quality
_PICTURED = 20_000  # findings per file with pictures, which limits their size
_LOOKED_AT = 100  # images of an identity from which its strip is chosen
_THREADS = 4


def write(
    output: Path,
    source: Source,
    images: Identities,
    *,
    notes: dict[str, str],
    halves: Sequence[np.ndarray] = (),
    weak: bool = False,
) -> Path:
    """Writes report.html and its pictures for the files of findings in a folder.

    Args:
      output: folder with the findings and clean.json.
      source: the training set.
      images: its embeddings, used to choose the images to show.
      notes: a line about each file of `REVIEWED` on the page.
      halves: image numbers of the smaller half of each identity in mixed.csv, in its order.
      weak: warn that the model is too weak.

    Returns:
      The page.

    Raises:
      UserError: the folder cannot be written.
      DataError: a file of findings cannot be read.
    """
    strips = Strips(images)
    tables = {}
    for name in REVIEWED:
        if name in notes:
            rows = files.read(output / name, name)
            tables[name] = {
                "columns": files.COLUMNS[name],
                "decisions": files.DECISIONS[name],
                "rows": [[row[column] for column in files.COLUMNS[name]] for row in rows],
                "pictures": list(_strips_of(name, rows[:_PICTURED], strips, halves)),
            }
    strips.write(output / PICTURES, source)
    content = {
        "digest": sealed.file_digest(output / files.ABOUT),
        "folder": PICTURES,
        "side": _SIDE,
        "strips": strips.lengths(),
        "names": _names(source, tables),
        "tables": tables,
    }
    page.write(
        output / PAGE,
        "report/review.html",
        account=account(source),
        notes=[(name, len(tables[name]["rows"]), text) for name, text in notes.items()],
        weak=weak,
        output=str(output),
        data=_inside_script(content),
    )
    return output / PAGE


class Strips:
    """The pictures of a page: strips of images of an identity."""

    def __init__(self, images: Identities):
        self._images = images
        self._order, self._starts = images.sorted()
        self._found: dict[tuple[int, ...], int] = {}

    def rows(self, label: int) -> np.ndarray:
        """Returns (n,) image numbers of an identity."""
        return self._order[self._starts[label] : self._starts[label + 1]][:_LOOKED_AT]

    def typical(self, rows: np.ndarray) -> np.ndarray:
        """Sorts image numbers of an identity, the closest to their mean first."""
        some = self._images.embeddings[rows]
        return rows[np.argsort(-(some @ normalize(some.sum(0)[None])[0]), kind="stable")]

    def closest(self, first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
        """Returns the two most similar images of two identities."""
        cosine = self._images.embeddings[first] @ self._images.embeddings[second].T
        a, b = np.unravel_index(int(np.argmax(cosine)), cosine.shape)
        return int(first[a]), int(second[b])

    def add(self, numbers: np.ndarray) -> int:
        """Returns the number of the strip with these images, or -1 for no images."""
        key = tuple(numbers[:FACES].tolist())
        return self._found.setdefault(key, len(self._found)) if key else -1

    def lengths(self) -> list[int]:
        """Returns the number of images in each strip."""
        return [len(key) for key in self._found]

    def write(self, folder: Path, source: Source) -> None:
        """Writes NUMBER.jpg for every strip, and removes the pictures of an earlier page.

        Raises:
          UserError: the folder cannot be written.
        """

        def one(strip: tuple[int, Sequence[int]]) -> None:
            number, images = strip
            pixels = np.hstack([_small(source, image) for image in images])
            content = encode_jpeg(pixels, quality=_QUALITY)
            write_atomic(folder / f"{number}.jpg", content, durable=False)

        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.jpg"):
                if path.stem.isdecimal():
                    path.unlink()
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(one, enumerate(self._found)):
                    pass
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from error


def _strips_of(
    name: str, rows: Sequence[Row], strips: Strips, halves: Sequence[np.ndarray]
) -> Iterator[list[int]]:
    """Yields the strips of each finding, in the order of the page."""
    for place, row in enumerate(rows):
        if name == files.DUPLICATES:
            yield _of_pair(strips, int(row["label_a"]), int(row["label_b"]))
        elif name == files.MIXED:
            smaller = halves[place]
            larger = np.setdiff1d(strips.rows(int(row["label"])), smaller)
            yield [strips.add(strips.typical(half)) for half in (larger, smaller)]
        else:
            yield _of_image(strips, row)


def _of_pair(strips: Strips, a: int, b: int) -> list[int]:
    """Returns the strips of two identities, each starting with the image most similar to the
    other.
    """
    both = [strips.typical(strips.rows(label)) for label in (a, b)]
    if not all(len(rows) for rows in both):
        return [strips.add(rows) for rows in both]
    return [
        strips.add(np.concatenate([[first], rows[rows != first]]))
        for rows, first in zip(both, strips.closest(*both), strict=True)
    ]


def _of_image(strips: Strips, row: Row) -> list[int]:
    """Returns the strips of an image: itself, its label's others, and the suggested identity."""
    index = int(row["index"])
    own = strips.rows(int(row["given_label"]))
    found = [strips.add(np.array([index])), strips.add(strips.typical(own[own != index]))]
    if row["suggested_label"]:
        found.append(strips.add(strips.typical(strips.rows(int(row["suggested_label"])))))
    return found


def _small(source: Source, number: int) -> np.ndarray:
    try:
        image = pictures.thumbnail(source, number)
    except ImageError:
        image = np.full((_SIDE, _SIDE, 3), 128, np.uint8)
    return cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def _names(source: Source, tables: dict) -> dict[str, str]:
    """Returns the name of every label in the tables; empty if identities are numbers."""
    if source.names is None:
        return {}
    labels = {
        row[column]
        for table in tables.values()
        for column, title in enumerate(table["columns"])
        if "label" in title
        for row in table["rows"]
    }
    return {label: source.names[int(label)] for label in sorted(labels - {""}, key=int)}


def _inside_script(content: dict) -> Markup:
    """Escapes JSON so that no text in it can end the surrounding <script>."""
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))
