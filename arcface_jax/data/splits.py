"""Choose the files of one split in a folder with several: FOLDER#SPLIT, by default `train`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from arcface_jax.errors import DataError

DEFAULT = "train"
OTHERS = "files of other splits"
"""Kind under which files that are left out are counted."""

_BEGIN, _END = r"(?:^|[-_.])", r"(?![A-Za-z0-9])"  # of a split's name in the name of a file
_USUAL = "test|testing|eval|evaluation|val|valid|validation|dev"
_SHOWN = 5


class Chosen(NamedTuple):
    """The files of one split."""

    files: list[Path]
    ignored: dict[str, int]
    """Number of files that are left out, by kind."""


NOTHING = Chosen([], {})


def counted(files: list[Path], *, others: int) -> Chosen:
    """Returns the files, with the number of those that are left out."""
    return Chosen(files, {OTHERS: others} if others else {})


def by_name(place: Path, files: Sequence[Path], split: str) -> Chosen:
    """Chooses files by the split in their names, as in `train-00000-of-00004.parquet`.

    Args:
      place: the folder, for messages.
      files: all files of the folder.
      split: the split; "" for `train`, or for all files if they belong to one split.

    Raises:
      DataError: no file belongs to the split, or none was named and there are several.
    """
    named = re.escape(split) + _END if split not in ("", DEFAULT) else DEFAULT
    kept = [file for file in files if re.search(_BEGIN + named, file.name, re.IGNORECASE)]
    if split and not kept:
        shown = ", ".join([file.name for file in files[:_SHOWN]])
        raise DataError(
            f"{place} has no file of the split {split} (it has {shown}): name one of its splits as "
            f"{place}#SPLIT"
        )
    if not kept:
        kept = list(files)
        found = {_usual(file.name) for file in files} - {""}
        if len(found) > 1:
            raise DataError(
                f"{place} has the splits {', '.join(sorted(found))} and no {DEFAULT}: name one as "
                f"{place}#SPLIT"
            )
    return counted(kept, others=len(files) - len(kept))


def _usual(name: str) -> str:
    """Returns the usual name of a split in a file's name; "" without one."""
    found = re.search(f"{_BEGIN}({_USUAL}){_END}", name, re.IGNORECASE)
    return found[1].lower() if found else ""
