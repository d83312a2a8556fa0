"""`label_map.csv` in a training set that was made from another one: old labels to new ones."""

import csv
import io
from pathlib import Path

import numpy as np

from arcface_jax.data.names import Names
from arcface_jax.errors import DataError
from arcface_jax.runtime import foreign
from arcface_jax.runtime.files import atomic
from arcface_jax.runtime.text import cell

FILE = "label_map.csv"
_COLUMNS = ("old_label", "new_label", "name")


def write(folder: Path, new: np.ndarray, names: Names) -> Path:
    """Writes the map next to a set, and returns the file.

    Args:
      folder: folder of the new set.
      new: (C,) int: the new label of each old one, -1 if it has no images left.
      names: names of the new identities.
    """
    with atomic(folder / FILE, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for old, label in enumerate(new.tolist()):
            writer.writerow((old, label, cell(names[label])) if label >= 0 else (old, "", ""))
    return folder / FILE


def read(folder: Path) -> np.ndarray | None:
    """Returns (C,) int64: the new label of each old one, -1 for none; None without a map.

    Raises:
      DataError: the file is damaged.
    """
    path = folder / FILE
    try:
        rows = list(csv.DictReader(io.StringIO(foreign.read(path).decode(), newline="")))
        old = [int(row["old_label"]) for row in rows]
        new = [int(row["new_label"] or -1) for row in rows]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"cannot read {path} ({error!r}): run `data apply` again") from error
    if old != list(range(len(old))):
        raise DataError(f"{path}: old labels are not 0 .. {len(old) - 1}; run `data apply` again")
    return np.array(new, np.int64)
