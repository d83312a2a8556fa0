"""Faces with their people's names, as images or as features: the input of retrieval and all-to-all.

Three forms are read:

- a folder of aligned faces: FOLDER/PERSON/image, and FOLDER/image for faces of nobody in particular
- a text file with lines `image<TAB or spaces>person`, or only `image`; images lie beside it
- an `.npz` with `features` (n, D) and `labels` (n,), the people as text or numbers
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.data import fingerprint
from arcface_jax.data.images import IMAGE_SUFFIXES, decode_any_size, is_image, resize
from arcface_jax.errors import DataError
from arcface_jax.evaluation import shards
from arcface_jax.evaluation.embed import Model

NOBODY = ""
"""The person of a face that belongs to nobody in particular."""


class Labeled(NamedTuple):
    """Features of n faces."""

    features: np.ndarray
    """(n, D) float32, not normalized."""
    people: np.ndarray
    """(n,) str; `NOBODY` where no person is named."""


def read(
    path: Path,
    open_model: Callable[[], Model],
    *,
    output: Path,
    flip: bool = True,
    threads: int = 4,
    progress: Callable[[int], None] = lambda count: None,
) -> Labeled:
    """Reads one of the three forms; images are embedded, and their features kept on disk.

    Args:
      path: a folder, a list, or an `.npz`.
      open_model: gives the network, where images are to be embedded.
      output: the folder where features are kept, so that a killed run resumes.
      flip: f(image) + f(flipped image), rather than f(image).
      threads: that read images.
      progress: told how many images are done.

    Raises:
      DataError: the path is none of the three, or as `features.extract`.
    """
    if path.suffix == ".npz":
        return _read_npz(path)
    images, people = _folder(path) if path.is_dir() else _list(path)
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
    return Labeled(extracted.read(flip=flip), people)


def face(path: Path) -> np.ndarray:
    """An image as (112, 112, 3) uint8 RGB; one of another size is stretched to this one.

    Raises:
      DataError: it cannot be read.
    """
    return resize(decode_any_size(shards.read_bytes(path), where=str(path)))


def _folder(folder: Path) -> tuple[list[Path], np.ndarray]:
    images = sorted(p for p in folder.glob("*") if is_image(p))
    people = [NOBODY] * len(images)
    for person in sorted(p for p in folder.iterdir() if p.is_dir()):
        found = sorted(p for p in person.iterdir() if is_image(p))
        images += found
        people += [person.name] * len(found)
    if not images:
        raise DataError(
            f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}), neither itself nor in a "
            "folder for each person"
        )
    return images, np.array(people)


def _list(path: Path) -> tuple[list[Path], np.ndarray]:
    if not path.is_file():
        raise DataError(f"{path} does not exist: name a folder of faces, a list, or an .npz")
    images, people = [], []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) > 2:
            raise DataError(
                f"{path}, line {number}: {line.strip()[:80]!r} is not `image person`; where a name "
                "has blanks in it, put a tab between the two"
            )
        if fields:
            images.append(path.parent / fields[0])
            people.append(fields[1].strip() if len(fields) == 2 else NOBODY)
    if not images:
        raise DataError(f"{path} lists no images: give lines `image person`")
    return images, np.array(people)


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
