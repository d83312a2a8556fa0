"""Open training sets in commands: options about their format, the account line, notes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from arcface_jax.commands import own_names
from arcface_jax.config import DataConfig
from arcface_jax.errors import UserError

if TYPE_CHECKING:
    from arcface_jax.data.source import Source

TrainingSet = Annotated[Positional[str], tyro.conf.arg(metavar="PATH")]
Output = Annotated[Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
Values = dict[str, Any]
"""Values of the RESULT line, including `files`."""


@dataclass(frozen=True)
class Reading:
    """Properties of a training set that its files do not state."""

    columns: str = ""
    """Lists and tables: path=COLUMN,label=COLUMN, names or numbers from 1; by default detected."""
    label_index: int = 0
    """Records with several labels: which of them is the identity, from 0."""
    identity_level: int = 0
    """Image folders: depth of the identities' folders, from 1; 0 detects it."""


How = OmitArgPrefixes[Reading]
AS_FOUND = Reading()
"""All properties detected from the set's content."""
# This command's names for options that errors and notes name as in `train`.
OPTIONS = {
    "data.path": "PATH",
    "data.columns": "--columns",
    "data.label-index": "--label-index",
    "data.identity-level": "--identity-level",
    "data.threads": "--threads",
    "data.workers": "--workers",
    "data.global-batch-size": "--batch-size",
    "data.augment.sets": "--augment",
}


def open_set(
    path: str, reading: Reading, *, output: Path | None = None, quiet: bool = False
) -> "Source":
    """Opens a training set, and prints an account of its contents.

    Args:
      path: the training set.
      reading: properties that its files do not state.
      output: folder, or list, that the command writes.
      quiet: print nothing.

    Raises:
      UserError: the output is inside an image folder, and would be read as an identity of it.
    """
    from arcface_jax.data import lists, opening
    from arcface_jax.data.source import account

    source = opening.open_source(DataConfig(path=path, **asdict(reading)), seed=0)
    if output is not None and output.suffix.lower() not in lists.SUFFIXES:
        _require_apart(output, opening.image_folders(path, source))
    if not quiet:
        print(account(source), *notes(source), sep="\n")
    return source


def _require_apart(output: Path, folders: Sequence[Path]) -> None:
    for folder in folders:
        if output.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"the output {output} is inside {folder}, an image folder, which it would change: "
                "name another folder"
            )


def notes(source: "Source") -> list[str]:
    """Returns the source's notes, with the options of these commands."""
    return [own_names(note, OPTIONS) for note in source.notes]
