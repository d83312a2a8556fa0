"""Named faces, as images or as features: the input of retrieval and all-to-all.

Three formats are supported:

- a folder of aligned faces: FOLDER/PERSON/image, and FOLDER/image for unnamed faces
- a text file with lines `image person`, or only `image`, in any encoding and with any separator
  that `data.tables` reads; images are relative to it
- an `.npz` with `features` (n, D) and `labels` (n,), the people as text or numbers
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from arcface_jax.data import fingerprint, lists, tables
from arcface_jax.data.images import IMAGE_SUFFIXES, Walk, decode_any_size, resize
from arcface_jax.data.source import account_of
from arcface_jax.errors import DataError
from arcface_jax.evaluation import shards
from arcface_jax.evaluation.embed import Model

NOBODY = ""
"""The person of a face without a name."""


class Labeled(NamedTuple):
    """Features of n faces."""

    features: np.ndarray
    """(n, D) float32, not normalized."""
    people: np.ndarray
    """(n,) str; `NOBODY` for an unnamed face."""
    unit: str = "features"
    """What the faces were read from, in the plural."""
    ignored: Mapping[str, int] = MappingProxyType({})
    """Number of unused entries, by kind."""

    def account(self) -> str:
        """One line about what was used from the set and what was ignored."""
        people = np.unique(self.people[self.people != NOBODY])
        return account_of(
            self.unit,
            images=len(self.people),
            identities=len(people),
            ignored=self.ignored,
            unreadable={},  # an unreadable image is an error
        )


class _Faces(NamedTuple):
    """Images, before they are embedded."""

    images: list[Path]
    people: np.ndarray
    unit: str
    ignored: Mapping[str, int]


def read(
    path: Path,
    open_model: Callable[[], Model],
    *,
    output: Path,
    flip: bool = True,
    threads: int = 4,
    progress: Callable[[int], None] = lambda count: None,
) -> Labeled:
    """Reads one of the three formats; embeds images, and keeps their features on disk.

    Args:
      path: a folder, a list, or an `.npz`.
      open_model: opens the network, if there are images to embed.
      output: folder for the features, from which a killed run resumes.
      flip: use f(image) + f(flipped image) instead of f(image).
      threads: number of threads that read images.
      progress: called with the number of finished images.

    Raises:
      DataError: the path has none of the three formats, or as `shards.extract`.
    """
    if path.suffix == ".npz":
        return _read_npz(path)
    faces = _folder(path) if path.is_dir() else _list(path)
    images = faces.images
    base = path if path.is_dir() else path.parent
    model = open_model()
    extracted = shards.extract(
        model,
        lambda i: face(images[i]),
        names=[str(image) for image in images],
        folder=output,
        settings={
            "model": model.digest(),
            "list": fingerprint.of_names([str(image.relative_to(base)) for image in images]),
            "sample": fingerprint.of_files(images, read=shards.read_bytes),
        },
        flip=flip,
        threads=threads,
        progress=progress,
    )
    return Labeled(extracted.read(flip=flip), faces.people, faces.unit, faces.ignored)


def face(path: Path) -> np.ndarray:
    """Reads an image as (112, 112, 3) uint8 RGB; other sizes are stretched.

    Raises:
      DataError: the image cannot be read.
    """
    return resize(decode_any_size(shards.read_bytes(path), where=str(path)))


def _folder(folder: Path) -> _Faces:
    walk = Walk(folder)
    names = sorted(walk.files(), key=lambda name: ("/" in name, name.split("/")))
    images = [folder / name for name in names]
    people = [name.partition("/")[0] if "/" in name else NOBODY for name in names]
    if not images:
        raise DataError(
            f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}), neither itself nor in a "
            "folder for each person"
        )
    return _Faces(images, np.array(people), "files", dict(walk.ignored))


def _list(path: Path) -> _Faces:
    if not path.is_file():
        raise DataError(f"{path} does not exist: name a folder of faces, a list, or an .npz")
    table = tables.read(path)
    ignored = {"comment lines": table.comments} if table.comments else {}
    images, people = [], []
    for place, row in enumerate(table.rows):
        cells = _cells(row)
        if len(cells) > 2:
            line = ("," if len(row.cells) > 1 else " ").join(cells)
            raise DataError(
                f"{path}, line {row.line}: {line[:80]!r} is not `image person`; where a name has "
                "blanks in it, put a tab between the two"
            )
        image = path.parent / tables.native(cells[0])
        if place == 0 and cells[0].lower() in lists.PATHS and not image.is_file():
            ignored["headings"] = 1
            continue
        images.append(image)
        people.append(cells[1] if len(cells) == 2 else NOBODY)
    if not images:
        raise DataError(f"{path} lists no images: give lines `image person`")
    return _Faces(images, np.array(people), "lines", ignored)


def _cells(row: tables.Row) -> list[str]:
    """Splits a line into words; if some lines have tabs, only there."""
    if len(row.cells) > 1:
        return row.cells
    text = row.cells[0]
    return [word.strip() for word in text.split("\t")] if "\t" in text else text.split()


def _read_npz(path: Path) -> Labeled:
    if not path.is_file():
        raise DataError(f"{path} does not exist: name a folder of faces, a list, or an .npz")
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"features", "labels"} - set(arrays.files)
        if missing:
            raise DataError(
                f"{path} holds {', '.join(arrays.files) or 'nothing'}; expected `features` (n, D) "
                "and `labels` (n,)"
            )
        read, labels = arrays["features"], arrays["labels"]
    if read.ndim != 2 or labels.shape != read.shape[:1] or not np.isfinite(read).all():
        raise DataError(
            f"{path}: features of shape {read.shape} and labels of shape {labels.shape}; expected "
            "(n, D) finite numbers and (n,) labels"
        )
    return Labeled(read.astype(np.float32), labels.astype(str))
