"""`data pack --format list`: a training set of image files as a list of path,label."""

import csv
import os
import re
from pathlib import Path

from arcface_jax.config.choices import Bad
from arcface_jax.data import lists, names
from arcface_jax.data.files import FilesSource
from arcface_jax.data.source import Source
from arcface_jax.data.tools import packing
from arcface_jax.data.tools.packing import Packed, Selection
from arcface_jax.errors import DataError, UserError
from arcface_jax.runtime.files import atomic

# Control characters that no list may have, line breaks, and what is not UTF-8.
_UNFIT = re.compile("[\0-\x08\n\r\x0e-\x1f\ud800-\udfff]")


def write(
    source: Source, selection: Selection, path: Path, *, bad: Bad = "stop", threads: int = 0
) -> Packed:
    """Writes the list, and the identities' names to PATH.identities.txt.

    Labels are numbers, because names may occur twice or sort differently. Images are not copied,
    and their paths are relative to the list.

    Args:
      source: the training set.
      selection: the images to write, their order and their labels.
      path: the new .csv file.
      bad: has no effect, because no image is read.
      threads: has no effect.

    Raises:
      UserError: the set does not consist of image files, or the file exists.
      DataError: a list cannot hold the name of an image.
    """
    del bad, threads
    if not isinstance(source, FilesSource):
        raise UserError(
            f"{path} is a list, and this training set is not of image files, so there are no paths "
            "to list: name a folder, and a --format that holds images"
        )
    if path.exists():
        raise UserError(f"{path} exists: name a new list")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label"))
        for number, label in zip(
            selection.numbers.tolist(), selection.labels.tolist(), strict=True
        ):
            writer.writerow((_relative(source.where(number), path.parent), label))
        # Before the list takes its name, so that it is never without its table.
        table = names.write(
            path.parent, packing.names_of(source, selection), file=lists.table_of(path)
        )
    return Packed([path, table], len(selection.numbers), selection.num_classes, [])


def _relative(image: str, folder: Path) -> str:
    """Returns an image's path as `lists` reads it back: relative, and never like a comment.

    Raises:
      DataError: reading would change the path.
    """
    name = os.path.relpath(image, folder)
    if _UNFIT.search(name) or name != name.rstrip():
        raise DataError(
            f"{name!r} has a line break or other control character, a blank at its end, or bytes "
            "that are not UTF-8, which a list cannot hold: rename it, or use another --format"
        )
    return name if name.startswith("../") else f"./{name}"
