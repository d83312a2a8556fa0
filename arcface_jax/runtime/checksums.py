"""Detect damage in a workdir: hashes of a checkpoint's files, stored before it is complete.

Orbax renames a checkpoint into place once it is fully written, so a partial one is never taken for
complete; but a disk may return other bytes than were written, and people delete files.
WORKDIR/checksums/STEP.json has the hashes of a checkpoint, the length and hash of metrics.jsonl up
to its step, and a hash of itself. WORKDIR/checksums/config.json is a copy of the configuration.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from arcface_jax.errors import CheckpointError, UserError
from arcface_jax.runtime import damaged, foreign
from arcface_jax.runtime.files import complete_steps, unfinished_steps, write_atomic

_FOLDER = "checksums"
_CONFIG = "config.json"
# Orbax later adds the commit time to it.
_METADATA = "_CHECKPOINT_METADATA"
_SELF = "blake2b"
# Orbax reads every file in this folder of an item, whatever its name.
_READ_WHOLE = "array_metadatas"
# Every checkpoint of a training run has these items.
_ITEMS = ("backbone", "dataset", "training")


class _Noted(NamedTuple):
    """Contents of WORKDIR/checksums/STEP.json."""

    files: dict[str, str]
    """Hash by path inside the checkpoint."""
    history: tuple[int, str] | None
    """Bytes and hash of metrics.jsonl up to the step; None if an earlier version wrote the file."""


class _Unreadable(Exception):
    """Raised if the checksums are missing or damaged; the message tells which."""


# ---- Written during the run ----------------------------------------------------------------------


def note(checkpoints: Path, history: Path) -> None:
    """Writes WORKDIR/checksums/STEP.json of a checkpoint just before it is renamed into place.

    Every complete checkpoint thus has checksums. Checksums of removed checkpoints are removed.

    Args:
      checkpoints: the folder of checkpoints.
      history: path of metrics.jsonl, which may be missing.
    """
    folder = checkpoints.parent / _FOLDER
    folder.mkdir(exist_ok=True)
    written = {path.name.partition(".")[0]: path for path in checkpoints.glob("[0-9]*.*")}
    content = history.read_bytes() if history.is_file() else b""
    for step, path in written.items():
        length = _length_up_to(content, int(step))
        noted = {
            "files": _hashes(path),
            "history": {"bytes": length, "blake2b": _hash(content[:length])},
        }
        _write_with_hash(folder / f"{step}.json", noted)
    here = {str(step) for step in complete_steps(checkpoints.parent)} | written.keys()
    for path in folder.glob("*.json"):
        if path.stem.isdigit() and path.stem not in here:
            path.unlink(missing_ok=True)


def _length_up_to(content: bytes, step: int) -> int:
    """Returns the length of metrics.jsonl up to a step; lines of later steps follow."""
    end = len(content)
    while end:
        begin = content.rfind(b"\n", 0, end - 1) + 1
        with contextlib.suppress(ValueError, TypeError, KeyError):  # an incomplete line
            if foreign.parse_json(content[begin:end])["step"] <= step:
                return end
        end = begin
    return 0


def keep_config(workdir: Path, text: str) -> None:
    """Keeps a copy of the configuration, from which a damaged config.json is restored."""
    folder = workdir / _FOLDER
    folder.mkdir(exist_ok=True)
    _write_with_hash(folder / _CONFIG, {"config": text})


# ---- Read by a run that resumes ------------------------------------------------------------------


def set_aside_damaged(checkpoints: Path) -> list[str]:
    """Moves stray files and the newest checkpoints, if corrupt, to WORKDIR/damaged.

    Returns:
      A message about each, about missing checkpoints, and if the newest remaining checkpoint cannot
      be verified. That one is intact, or was saved without checksums.

    Raises:
      CheckpointError: none of the saved checkpoints is left, or one is a link. Nothing has changed.
    """
    workdir = checkpoints.parent
    _refuse_links(checkpoints)
    foreign = _foreign(checkpoints)
    steps = [step for step in complete_steps(workdir) if checkpoints / str(step) not in foreign]
    gone = _missing_steps(workdir)
    broken = []
    while steps and (wrong := _wrong(path := checkpoints / str(steps[-1])) or _unlistable(path)):
        broken.append((steps.pop(), wrong))
    newest = len(broken)
    for step in steps[:-1]:
        if wrong := _unlistable(checkpoints / str(step)):
            broken.append((step, wrong))
    if not steps and (broken or gone):
        raise _none_left(checkpoints, gone, broken)
    messages = [
        f"{path} is not a checkpoint; moved to {damaged.set_aside(path, workdir)}"
        for path in foreign
    ]
    if gone:
        messages.append(f"{_gone(gone, workdir)}; falling back to step {steps[-1]}")
    for number, (step, wrong) in enumerate(broken):
        target = damaged.set_aside(checkpoints / str(step), workdir)
        with contextlib.suppress(OSError):  # so that it no longer counts as missing
            _path_of(workdir, step).rename(target / f"{_FOLDER}.json")
        back = ", falling back to the previous one" if number < newest else ""
        messages.append(f"checkpoint {step} is corrupt ({_listed(wrong)}); moved to {target}{back}")
    for step in unfinished_steps(workdir):  # otherwise it counts as missing once it is removed
        _path_of(workdir, step).unlink(missing_ok=True)
    if steps:
        newest_path = checkpoints / str(steps[-1])
        for path in _strays(newest_path):
            messages.append(f"{path} is a stray file; moved to {damaged.set_aside(path, workdir)}")
        messages += [problem] if (problem := unverifiable(newest_path)) else []
    return messages


def _none_left(
    checkpoints: Path, gone: list[int], broken: list[tuple[int, list[str]]]
) -> CheckpointError:
    fix = "restore one from backup, or start a new run in another --workdir"
    if not broken:
        return CheckpointError(f"{_gone(gone, checkpoints.parent)}, and no earlier one: {fix}")
    step, wrong = broken[-1]
    return CheckpointError(
        f"all checkpoints in {checkpoints} failed their checksum ({_listed(wrong)} of step "
        f"{step} differ from {_FOLDER}/{step}.json); {fix}"
    )


def _refuse_links(checkpoints: Path) -> None:
    for step in complete_steps(checkpoints.parent):
        if (path := checkpoints / str(step)).is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, which a run cannot remove when it is done "
                "with the checkpoint: move the folder back in its place"
            )


def _foreign(checkpoints: Path) -> list[Path]:
    """Lists what has the name of a checkpoint and is not one."""
    if not checkpoints.is_dir():
        return []
    complete = {str(step) for step in complete_steps(checkpoints.parent)}
    found = []
    for path in sorted(checkpoints.iterdir()):
        alike = path.name.isdigit() and path.name not in complete
        empty = path.name in complete and not (path / "backbone").is_dir()
        if alike or (empty and not damaged.is_there(_path_of(checkpoints.parent, int(path.name)))):
            found.append(path)
    return found


def missing(workdir: Path) -> list[str]:
    """Returns a message about lost checkpoints after the newest complete one, if any."""
    return [_gone(steps, workdir)] if (steps := _missing_steps(workdir)) else []


def _missing_steps(workdir: Path) -> list[int]:
    """Lists steps saved after the newest complete checkpoint whose checkpoint is gone.

    A run that saves at the same time does not interfere: it writes the checksums first, and they
    are read first.
    """
    noted = [int(p.stem) for p in (workdir / _FOLDER).glob("*.json") if p.stem.isdecimal()]
    unfinished = unfinished_steps(workdir)
    newest = max(complete_steps(workdir), default=-1)
    return sorted(step for step in noted if step > newest and step not in unfinished)


def _gone(steps: list[int], workdir: Path) -> str:
    names = ", ".join(map(str, steps))
    return f"{workdir / 'checkpoints'} has lost the checkpoint of step {names}"


def config_copy(workdir: Path) -> str | None:
    """Reads the copy of the configuration that `keep_config` wrote.

    Raises:
      ValueError: the copy is damaged.
    """
    path = workdir / _FOLDER / _CONFIG
    if not damaged.is_there(path):
        return None
    try:
        text = _read_with_hash(path)["config"]
    except (_Unreadable, KeyError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{path} is damaged")
    return text


def history(workdir: Path, step: int) -> tuple[int, str] | None:
    """Returns bytes and BLAKE2b hash of metrics.jsonl up to a saved step; None if unknown."""
    try:
        return _read(_path_of(workdir, step)).history
    except _Unreadable:
        return None


# ---- Read by everyone ----------------------------------------------------------------------------


def require_listable(workdir: Path) -> None:
    """Verifies the files that Orbax reads to list checkpoints.

    Raises:
      CheckpointError: one is corrupt.
    """
    for step in complete_steps(workdir):
        path = workdir / "checkpoints" / str(step)
        if wrong := _unlistable(path):
            raise CheckpointError(
                f"{path} is corrupt ({_listed(wrong)}): move it elsewhere to use the other "
                "checkpoints, or restore it from backup"
            )


def require_whole(checkpoint: Path, item: str) -> None:
    """Verifies the files of one item of a checkpoint before it is read.

    If that is impossible, a line on stderr explains why.

    Raises:
      CheckpointError: a file is corrupt or missing.
    """
    if wrong := _wrong(checkpoint, item):
        raise CheckpointError(
            f"{checkpoint} is corrupt ({_listed(wrong)}): use another checkpoint of the run "
            "(--step), or restore it from backup"
        )
    if strays := _strays(checkpoint, item):
        raise CheckpointError(
            f"{strays[0]} is a stray file, on which Orbax fails: move it elsewhere"
        )
    if problem := unverifiable(checkpoint):
        damaged.warn([problem])


@contextlib.contextmanager
def reporting_unreadable(checkpoint: Path) -> Iterator[None]:
    """Turns any error of the block into one line, if the checkpoint cannot be verified.

    Raises:
      CheckpointError: it cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Insufficient memory is not damage.
        if unverifiable(checkpoint) is None or "RESOURCE_EXHAUSTED" in str(error):
            raise
        first = (str(error) or repr(error)).splitlines()[0][:200]
        raise CheckpointError(
            f"{checkpoint} cannot be read, nor verified ({first}): move it elsewhere to use the "
            "checkpoint before it, or restore it from backup"
        ) from error


def unverifiable(checkpoint: Path) -> str | None:
    """Returns why a checkpoint cannot be verified, or None if it can."""
    try:
        _read(_path_of(checkpoint.parent.parent, int(checkpoint.name)))
    except _Unreadable as error:
        return f"checkpoint {checkpoint.name} cannot be verified: {error}"
    return None


def _wrong(path: Path, item: str = "") -> list[str]:
    """Lists files, of one item or all, that are missing or differ from their checksum."""
    workdir = path.parent.parent
    try:
        expected = _read(_path_of(workdir, int(path.name))).files
    except _Unreadable:  # no checksums, but a run's checkpoint has all items
        items = _ITEMS if (workdir / "environment.json").exists() else _ITEMS[:1]
        wanted = (item,) if item else items
        return [f"{name}/" for name in wanted if not (path / name).is_dir()]
    of_item = {n: x for n, x in expected.items() if not item or n.startswith(f"{item}/")}
    found = _hashes(path, item)
    return [name for name, value in of_item.items() if found.get(name) != value]


def _special(path: Path) -> list[str]:
    """Lists pipes and devices in a checkpoint, which would block a reader."""
    found = (file for file in sorted(path.rglob("*")) if file.exists())
    other = (file for file in found if not (file.is_file() or file.is_dir()))
    return [file.relative_to(path).as_posix() for file in other]


def _strays(path: Path, item: str = "*") -> list[Path]:
    """Lists files that are not part of the checkpoint, in folders that Orbax reads as a whole."""
    try:
        expected = _read(_path_of(path.parent.parent, int(path.name))).files
    except _Unreadable:
        return []
    found = sorted(path.glob(f"{item}/{_READ_WHOLE}/*"))
    return [file for file in found if file.relative_to(path).as_posix() not in expected]


def _unlistable(path: Path) -> list[str]:
    """Lists damaged files among those that Orbax reads to list checkpoints."""
    wrong = _wrong(path, "metrics") if (path / "metrics").is_dir() else []
    wrong += [name for name in _special(path) if name not in wrong]
    return wrong + [n for n in (_METADATA, "metrics/metrics") if _is_other_json(path / n)]


def _is_other_json(path: Path) -> bool:
    """Returns whether a file is valid JSON but not an object; Orbax ignores invalid JSON."""
    with contextlib.suppress(OSError, ValueError):
        return not isinstance(foreign.parse_json(foreign.read(path)), dict)
    return False


def _path_of(workdir: Path, step: int) -> Path:
    return workdir / _FOLDER / f"{step}.json"


def _read(path: Path) -> _Noted:
    """Reads the checksums in a file.

    Raises:
      _Unreadable: the file is missing or corrupt.
    """
    if not damaged.is_there(path):
        raise _Unreadable(f"{path} is missing")
    content = _read_with_hash(path)
    files, history = content.get("files", content), content.get("history")
    if not (isinstance(files, dict) and all(_is_hash(value) for value in files.values())):
        raise _Unreadable(f"{path} is damaged")
    if not files:
        raise _Unreadable(f"{path} is empty")
    return _Noted(files, (history["bytes"], history["blake2b"]) if history else None)


def _read_with_hash(path: Path) -> dict[str, Any]:
    """Reads what `_write_with_hash` wrote; files of earlier versions have no hash of themselves.

    Raises:
      _Unreadable: the file is corrupt.
    """
    try:
        content = foreign.parse_json(foreign.read(path))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise _Unreadable(f"{path} is {'damaged' if _size(path) else 'empty'}")
    expected = content.pop(_SELF, None)
    if expected is None and all(_is_hash(value) for value in content.values()):
        return content
    if expected != _hash_of_json(content):
        raise _Unreadable(f"{path} is damaged")
    return content


def _write_with_hash(path: Path, content: dict[str, Any]) -> None:
    if damaged.is_there(path) and not path.is_file():
        damaged.set_aside(path, path.parent.parent)
    content = {**content, _SELF: _hash_of_json(content)}
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _hash_of_json(content: dict[str, Any]) -> str:
    return _hash(json.dumps(content, sort_keys=True).encode())


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 128 and set(value) <= set("0123456789abcdef")


def _hashes(path: Path, item: str = "") -> dict[str, str]:
    hashes = {}
    for file in sorted((path / item).rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(path).as_posix()
        if name == _METADATA:
            hashes[name] = _hash(_handlers(file))
            continue
        with file.open("rb") as stream:
            hashes[name] = hashlib.file_digest(stream, "blake2b").hexdigest()
    return hashes


def _handlers(metadata: Path) -> bytes:
    """Returns the part of Orbax's metadata that does not change: how to read the items."""
    try:
        content = foreign.parse_json(foreign.read(metadata))
        return json.dumps(content["item_handlers"]).encode()
    except (OSError, ValueError, TypeError, KeyError):
        return b"damaged"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
