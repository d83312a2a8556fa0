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

_ARRAYS = ("features", "labels")

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
    names: list[str]
    """Paths as the list has them, or below the folder: they identify the images after a move."""
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
      UserError: as `shards.extract`.
    """
    if path.suffix == ".npz":
        return _read_npz(path)
    faces = _folder(path) if path.is_dir() else _list(path)
    images = faces.images
    model = open_model()
    extracted = shards.extract(
        model,
        lambda i: face(images[i]),
        names=[str(image) for image in images],
        folder=output,
        settings={
            "model": model.digest(),
            "list": fingerprint.of_names(faces.names),
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
    return _Faces(images, names, np.array(people), "files", dict(walk.ignored))


def _list(path: Path) -> _Faces:
    if not path.is_file():
        raise DataError(f"{path} does not exist: name a folder of faces, a list, or an .npz")
    table = tables.read(path)
    ignored = {"comment lines": table.comments} if table.comments else {}
    names, images, people = [], [], []
    for place, row in enumerate(table.rows):
        cells = _cells(row)
        if len(cells) > 2:
            line = ("," if len(row.cells) > 1 else " ").join(cells)
            raise DataError(
                f"{path}, line {row.line}: {line[:80]!r} is not `image person`; where a name has "
                "blanks in it, put a tab between the two"
            )
        name = Path(tables.native(cells[0]))
        image = path.parent / name
        if place == 0 and cells[0].lower() in lists.PATHS and not image.is_file():
            ignored["headings"] = 1
            continue
        names.append(str(name))
        images.append(image)
        people.append(cells[1] if len(cells) == 2 else NOBODY)
    if not images:
        raise DataError(f"{path} lists no images: give lines `image person`")
    return _Faces(images, names, np.array(people), "lines", ignored)


def _cells(row: tables.Row) -> list[str]:
    """Splits a line into words; if some lines have tabs, only there."""
    if len(row.cells) > 1:
        return row.cells
    text = row.cells[0]
    return [word.strip() for word in text.split("\t")] if "\t" in text else text.split()


def _read_npz(path: Path) -> Labeled:
    if not path.is_file():
        raise DataError(f"{path} does not exist: name a folder of faces, a list, or an .npz")
    read, labels = _arrays(path)
    right = read.ndim == 2 and read.size and read.dtype.kind in "fiu"
    if not right or labels.shape != read.shape[:1] or labels.dtype.kind not in "USfiu":
        raise DataError(
            f"{path}: features {read.shape} {read.dtype} and labels {labels.shape} "
            f"{labels.dtype}; expected (n, D) numbers and (n,) labels, n and D at least 1"
        )
    with np.errstate(over="ignore"):
        features = read.astype(np.float32)
    if not np.isfinite(features).all():
        raise DataError(f"{path}: features must be finite numbers: leave those faces out")
    people = np.char.decode(labels, "utf-8", "replace") if labels.dtype.kind == "S" else labels
    return Labeled(features, people.astype(str))


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads `features` and `labels` of an `.npz`.

    Raises:
      DataError: it is damaged or has other arrays.
    """
    try:
        with path.open("rb") as file:  # which np.load leaves open after an error
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise ValueError("it is a single array, as in a .npy file")
            with arrays:
                held = list(arrays.files)
                found = {name: arrays[name] for name in _ARRAYS if name in held}
    except Exception as error:  # many types, as the zip archive or the headers in it are damaged
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise DataError(
            f"cannot read {path} ({reason}): save it with np.savez(FILE, features=..., labels=...) "
            "and the labels as text or numbers"
        ) from error
    if len(found) < len(_ARRAYS):
        raise DataError(
            f"{path} holds {', '.join(held) or 'nothing'}; expected `features` (n, D) "
            "and `labels` (n,)"
        )
    return found["features"], found["labels"]
