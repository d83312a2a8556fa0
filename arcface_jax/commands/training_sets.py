"""How commands open training sets: options of their form, the account line, notes."""

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
"""Of the RESULT line, `files` among them."""


@dataclass(frozen=True)
class Reading:
    """What a training set's form does not tell."""

    columns: str = ""
    """Lists and tables: path=COLUMN,label=COLUMN, names or numbers from 1; by default found."""
    label_index: int = 0
    """Records with several labels: which of them is the identity, from 0."""
    identity_level: int = 0
    """Image folders: how many folders down the identities are, from 1; 0 finds out."""


How = OmitArgPrefixes[Reading]
AS_FOUND = Reading()
"""By the set's content."""
# What the tools call the options that errors and notes name as `train` does.
OPTIONS = {
    "data.path": "PATH",
    "data.columns": "--columns",
    "data.label-index": "--label-index",
    "data.identity-level": "--identity-level",
}


def open_set(path: str, reading: Reading, *, quiet: bool = False) -> "Source":
    """Opens a training set, and prints what became of all that it holds."""
    from arcface_jax.data import opening
    from arcface_jax.data.source import account

    source = opening.open_source(DataConfig(path=path, **asdict(reading)), seed=0)
    if not quiet:
        print(account(source), *notes(source), sep="\n")
    return source


def notes(source: "Source") -> list[str]:
    """What the source tells of itself, with the options of these commands."""
    return [own_names(note, OPTIONS) for note in source.notes]
