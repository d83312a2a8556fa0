"""`data pack --format list`: a training set of image files as a list of path,label."""

import csv
import os
from pathlib import Path

from arcface_jax.config.choices import Bad
from arcface_jax.data.files import FilesSource
from arcface_jax.data.source import Source
from arcface_jax.data.tools import packing
from arcface_jax.data.tools.packing import Packed, Selection
from arcface_jax.errors import UserError
from arcface_jax.runtime.files import atomic


def write(
    source: Source, selection: Selection, path: Path, *, bad: Bad = "stop", threads: int = 0
) -> Packed:
    """Writes the list; images are not copied, and their paths are relative to the list.

    Args:
      source: the training set.
      selection: the images to write, their order and their labels.
      path: the new .csv file.
      bad: has no effect, because no image is read.
      threads: has no effect.

    Raises:
      UserError: the set does not consist of image files, or the file exists.
    """
    del bad, threads
    if not isinstance(source, FilesSource):
        raise UserError(
            f"{path} is a list, and this training set is not of image files: name a folder, to "
            "which a record file is written"
        )
    if path.exists():
        raise UserError(f"{path} exists: name a new list")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = packing.names_of(source, selection)
    with atomic(path, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label"))
        for number, label in zip(
            selection.numbers.tolist(), selection.labels.tolist(), strict=True
        ):
            image = os.path.relpath(source.where(number), path.parent)
            writer.writerow((image, label if source.names is None else table[label]))
    return Packed([path], len(selection.numbers), selection.num_classes, [])
