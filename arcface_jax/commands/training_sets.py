"""Open training sets in commands: options about their format, the account line, notes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from arcface_jax.commands import own_names
from arcface_jax.config import DataConfig

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


def open_set(path: str, reading: Reading, *, quiet: bool = False) -> "Source":
    """Opens a training set, and prints an account of its contents."""
    from arcface_jax.data import opening
    from arcface_jax.data.source import account

    source = opening.open_source(DataConfig(path=path, **asdict(reading)), seed=0)
    if not quiet:
        print(account(source), *notes(source), sep="\n")
    return source


def notes(source: "Source") -> list[str]:
    """Returns the source's notes, with the options of these commands."""
    return [own_names(note, OPTIONS) for note in source.notes]
