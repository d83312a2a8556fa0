"""Detect corrupt checkpoints: a hash of each file, stored before the checkpoint is complete.

Orbax renames a checkpoint into place once all of it is written, so a half-written one is never
taken for complete; but a disk may return other bytes than were written.
"""

import hashlib
import json
from pathlib import Path

from arcface_jax.errors import CheckpointError
from arcface_jax.runtime.files import write_atomic

_FOLDER = "checksums"
_DAMAGED = "damaged"
# Orbax adds the commit time to it.
_CHANGED_LATER = ("_CHECKPOINT_METADATA",)


def note(checkpoints: Path) -> None:
    """Write WORKDIR/checksums/STEP.json of the checkpoint that is about to be renamed into place.

    So every complete checkpoint has checksums. Those of removed checkpoints are removed.
    """
    folder = checkpoints.parent / _FOLDER
    folder.mkdir(exist_ok=True)
    written = {path.name.partition(".")[0]: path for path in checkpoints.glob("[0-9]*.*")}
    for step, path in written.items():
        write_atomic(folder / f"{step}.json", json.dumps(_hashes(path), indent=1) + "\n")
    here = {path.name for path in _complete(checkpoints)} | written.keys()
    for path in folder.glob("*.json"):
        if path.stem not in here:
            path.unlink(missing_ok=True)


def set_aside_damaged(checkpoints: Path) -> list[str]:
    """Move the newest checkpoints to WORKDIR/damaged as long as they are corrupt.

    Returns:
      A message about each. The newest remaining one is intact, or was saved without checksums.

    Raises:
      CheckpointError: all checkpoints are corrupt.
    """
    steps = sorted(_complete(checkpoints), key=lambda path: int(path.name))
    damaged = []
    while steps and (wrong := _wrong(steps[-1])):
        damaged.append((steps.pop(), wrong))
    if damaged and not steps:
        path, wrong = damaged[-1]
        raise CheckpointError(
            f"all checkpoints in {checkpoints} failed their checksum ({_listed(wrong)} of step "
            f"{path.name} differ from {_FOLDER}/{path.name}.json); restore one from backup, or "
            "start a new run in another --workdir"
        )
    messages = []
    for path, wrong in damaged:
        target = _free(checkpoints.parent / _DAMAGED / path.name)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        messages.append(
            f"checkpoint {path.name} is corrupt ({_listed(wrong)}); moved to {target}, falling "
            "back to the previous one"
        )
    return messages


def _complete(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("*") if path.name.isdigit()]


def require_whole(checkpoint: Path, item: str) -> None:
    """Verify the files of one item of a checkpoint before it is read.

    Raises:
      CheckpointError: a file is corrupt or missing.
    """
    if wrong := _wrong(checkpoint, item):
        raise CheckpointError(
            f"{checkpoint} is corrupt ({_listed(wrong)}): use another checkpoint of the run "
            "(--step), or restore it from backup"
        )


def _wrong(path: Path, item: str = "") -> list[str]:
    """Files, of one item or of all, that are missing or differ from their checksum."""
    noted = path.parent.parent / _FOLDER / f"{path.name}.json"
    try:
        expected: dict[str, str] = json.loads(noted.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # nothing to compare with
        return []
    of_item = {n: x for n, x in expected.items() if not item or n.startswith(f"{item}/")}
    found = _hashes(path, item)
    return [name for name, value in of_item.items() if found.get(name) != value]


def _hashes(path: Path, item: str = "") -> dict[str, str]:
    hashes = {}
    for file in sorted((path / item).rglob("*")):
        if file.is_file() and file.name not in _CHANGED_LATER:
            with file.open("rb") as stream:
                value = hashlib.file_digest(stream, "blake2b").hexdigest()
            hashes[file.relative_to(path).as_posix()] = value
    return hashes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _free(path: Path) -> Path:
    """The path, or if it exists the first free PATH.N."""
    taken = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 1000))]
    return next(name for name in taken if not name.exists())
