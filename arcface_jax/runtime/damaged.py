"""Move damaged parts of a workdir aside, so a run can resume without them and nothing is lost.

Moved files keep their names in WORKDIR/damaged until somebody removes them.
"""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

_FOLDER = "damaged"
_FILES = ("environment.json", "metrics.jsonl", "metrics.csv", "run.txt", "wandb_id")
_FOLDERS = ("checkpoints", "checksums", "eval", "profile", "tensorboard")


def warn(messages: Iterable[str]) -> None:
    """Prints each message as a line on stderr."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)


def set_aside(path: Path, workdir: Path) -> Path:
    """Moves a file, folder or link to WORKDIR/damaged; returns its new path."""
    target = _free_name(workdir, path)
    path.rename(target)
    return target


def keep_copy(path: Path, workdir: Path) -> Path:
    """Copies a file to WORKDIR/damaged before it is shortened; returns the copy's path."""
    target = _free_name(workdir, path)
    shutil.copyfile(path, target)
    return target


def set_aside_wrong_kinds(workdir: Path) -> list[str]:
    """Moves aside folders in place of files, files in place of folders, and dead links.

    A link to a file or folder of the right kind is used like the file or folder.

    Returns:
      A message about each.
    """
    files = [*(workdir / name for name in _FILES), *workdir.glob("eval/*.png")]
    folders = [workdir / name for name in _FOLDERS]
    wrong = [(path, "file") for path in files if is_there(path) and not path.is_file()]
    wrong += [(path, "folder") for path in folders if is_there(path) and not path.is_dir()]
    return [f"{path} is not a {kind}; moved to {set_aside(path, workdir)}" for path, kind in wrong]


def is_there(path: Path) -> bool:
    """Returns whether the path exists; a dead link counts."""
    return path.exists() or path.is_symlink()


def _free_name(workdir: Path, path: Path) -> Path:
    """Returns WORKDIR/damaged/NAME or the first free NAME.N there, and creates the folder."""
    folders = _numbered(workdir / _FOLDER)
    folder = next(name for name in folders if name.is_dir() or not is_there(name))
    folder.mkdir(exist_ok=True)
    return next(name for name in _numbered(folder / path.name) if not is_there(name))


def _numbered(path: Path) -> list[Path]:
    return [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 1000))]
