"""Read state dicts from torch's `.pth` and `.pt` and from `.safetensors`, detected by content."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from arcface_jax.convert import file_kinds, torch_files
from arcface_jax.convert.packages import require
from arcface_jax.convert.safe_pickle import Skipped
from arcface_jax.convert.torch_files import Entry, Unusable
from arcface_jax.errors import UserError
from arcface_jax.runtime.files import atomic_files

StateDict = dict[str, torch.Tensor]

# Keys of the backbone in checkpoints of training programs, the likeliest first.
_KEYS = (
    *("state_dict_backbone", "state_dict", "model_state_dict", "model", "backbone", "net"),
    *("network", "weights", "params", "module"),
)
_NUMPY = {"scalar": "numpy scalar", "_reconstruct": "numpy array"}
_DEEPEST = 32
_MOST_MODULES, _LONGEST = 100_000, 1000


class Stored(NamedTuple):
    """A dict of tensors somewhere in a file."""

    key: str
    """Keys that lead to it, joined with dots; empty for the top level."""
    entries: dict[str, Entry | Unusable]

    @property
    def likeliness(self) -> tuple[bool, int, int]:
        """Sort key: likeliest to be the backbone first; averaged weights before others."""
        keys = self.key.split(".")
        known = min((_KEYS.index(key) for key in keys if key in _KEYS), default=len(_KEYS))
        return not is_averaged(self.key), known if self.key else -1, len(keys)


class Contents(NamedTuple):
    """Contents of a file."""

    dicts: list[Stored]
    skipped: tuple[str, ...]
    """Kinds of objects that are not tensors and were not built, with counts."""
    nbytes: float
    """Size of the file, which limits the total size of its tensors."""
    folder: Path | None = None
    """Folder of the file, which may have files that describe it."""
    metadata: Mapping[str, str] = MappingProxyType({})
    """Metadata of a safetensors file, such as the description of the model's input."""


def is_averaged(name: str) -> bool:
    """Returns whether a key or prefix names a running mean of weights, such as `state_dict_ema`."""
    return "ema" in name.lower().replace(".", "_").split("_")


def contents(path: Path) -> Contents:
    """Finds every dict of tensors in a file; no tensor is read yet.

    Raises:
      UserError: the file does not exist, or is not a file of weights; names what it is instead.
    """
    kind = file_kinds.recognize(path)
    if kind == "onnx":
        raise UserError(f"{path} is an ONNX file: name it with --onnx, or import it")
    nbytes = path.stat().st_size
    if kind == "safetensors":
        state, metadata = _read_safetensors(path)
        entries = {name: torch_files.entry_of(tensor) for name, tensor in state.items()}
        return Contents([Stored("", dict(entries))], (), nbytes, path.parent, metadata)
    skipped: Counter[str] = Counter()
    dicts = list(_dicts(torch_files.read(path), (), set(), skipped))
    names = tuple(f"{name} ({n})" if n > 1 else name for name, n in skipped.most_common())
    return Contents(dicts, names, nbytes, path.parent)


def in_memory(state: StateDict) -> Contents:
    """Returns the contents of a state dict in memory."""
    entries: dict[str, Entry | Unusable] = {n: torch_files.entry_of(t) for n, t in state.items()}
    return Contents([Stored("", entries)], (), float("inf"))


def read(path: Path) -> StateDict:
    """Reads the tensors of a file, or of the likeliest dict in a full checkpoint, by its names.

    Raises:
      UserError: the file does not exist, or has no dict of tensors.
    """
    found = contents(path)
    if not found.dicts:
        raise UserError(no_tensors(found, str(path)))
    return tensors(min(found.dicts, key=lambda s: s.likeliness).entries, found, source=str(path))


def no_tensors(found: Contents, source: str) -> str:
    """Returns the message for a file without any dict of tensors."""
    held = f": it holds {', '.join(found.skipped[:5])}" if found.skipped else ""
    return f"{source} has no dict of tensors by name{held}; expected a state_dict, at any depth"


def tensors(entries: dict[str, Entry | Unusable], held: Contents, *, source: str) -> StateDict:
    """Reads tensors, contiguous on the CPU; those that are in memory already may not be copied.

    Raises:
      UserError: a tensor's kind is not supported, or their total size exceeds the file's.
    """
    usable: dict[str, Entry] = {}
    for name, entry in entries.items():
        if isinstance(entry, Unusable):
            raise UserError(
                f"{source}: {name} is a tensor {entry.kind}; save dense float tensors instead"
            )
        usable[name] = entry
    claimed = sum({entry.place: entry.nbytes for entry in usable.values()}.values())
    if claimed > held.nbytes:
        raise UserError(
            f"{source}: its tensors claim {claimed:,} bytes of a file of {held.nbytes:,}; they "
            "share storage in a way that no weights do"
        )
    return {name: read_entry(entry, source=source) for name, entry in usable.items()}


def read_entry(entry: Entry, *, source: str) -> torch.Tensor:
    """Reads one tensor.

    Raises:
      UserError: the tensor is damaged.
    """
    try:
        return entry.read()
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        reason = (str(error) or repr(error)).partition("\n")[0][:200]
        raise UserError(f"{source} is damaged ({reason}): copy it again") from error


def read_torch(path: Path) -> object:
    """Reads a torch file: plain containers, with tensors as `Entry`.

    Raises:
      UserError: it is not a torch file.
    """
    if file_kinds.recognize(path) not in ("zip", "legacy"):
        raise UserError(f"{path} was not written by torch.save")
    return torch_files.read(path)


def write(path: Path, state: StateDict, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a state dict atomically, in the format of the suffix.

    Args:
      path: path of the file.
      state: the tensors.
      metadata: metadata of a safetensors file; torch files do not support it.

    Raises:
      UserError: the file cannot be written.
    """
    if path.suffix != ".safetensors":
        write_torch(path, state)
        return
    save = require("safetensors.torch").save_file
    try:
        with atomic_files(path) as part:
            save(state, part, metadata={"format": "pt", **(metadata or {})})
    except (OSError, RuntimeError, require("safetensors").SafetensorError) as reason:
        raise _unwritable(path, reason) from reason


def write_torch(path: Path, content: object) -> None:
    """Writes any content atomically with torch.save.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with atomic_files(path) as part:
            torch.save(content, part)
    except (OSError, RuntimeError) as reason:
        raise _unwritable(path, reason) from reason


def _unwritable(path: Path, reason: Exception) -> UserError:
    text = getattr(reason, "strerror", None) or str(reason).partition("\n")[0][:200]
    return UserError(f"cannot write {path}: {text}")


def _dicts(
    value: object, at: tuple[str, ...], seen: set[int], skipped: Counter[str]
) -> Iterator[Stored]:
    """Walks containers, each once; treats pickled modules as dicts of their contents."""
    if len(at) > _DEEPEST or id(value) in seen:
        return
    seen.add(id(value))  # ids in the file's data; the dicts made below are short-lived
    if isinstance(value, Skipped):
        if _is_module(value):
            yield Stored(".".join(at), _of_module(value))
            return
        name = _NUMPY.get(value.name.rpartition(".")[2], value.name)
        skipped[ascii(name)[1:-1][:80]] += 1
        value = value.items
    if isinstance(value, list | tuple) and not isinstance(value, Entry):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, dict):
        return
    named = {name: item for name, item in value.items() if isinstance(name, str)}
    found = {n: item for n, item in named.items() if isinstance(item, Entry | Unusable)}
    if found:
        yield Stored(".".join(at), found)
    unnamed = (k for k, v in value.items() if isinstance(v, Entry) and not isinstance(k, str))
    for key in unnamed:
        skipped[f"tensors under keys of type {type(key).__name__}"] += 1
    for name, item in named.items():
        if not isinstance(item, Entry | Unusable | str | bytes | int | float):
            yield from _dicts(item, (*at, name), seen, skipped)


def _is_module(value: Skipped) -> bool:
    return isinstance(value.state, dict) and isinstance(value.state.get("_modules"), dict)


def _of_module(module: Skipped) -> dict[str, Entry | Unusable]:
    """Returns the state dict of a module that was pickled as a whole."""
    found: dict[str, Entry | Unusable] = {}
    waiting: list[tuple[str, object]] = [("", module)]
    for _ in range(_MOST_MODULES):  # a module may have one child under many names
        if not waiting:
            break
        prefix, value = waiting.pop()
        state = value.state if isinstance(value, Skipped) else None
        parts = {} if not isinstance(state, dict) else state
        for kind in ("_parameters", "_buffers", "_modules"):
            held = parts.get(kind)
            for name, item in held.items() if isinstance(held, dict) else ():
                if isinstance(item, Entry | Unusable):
                    found[f"{prefix}{name}"] = item
                elif kind == "_modules" and len(prefix) < _LONGEST:
                    waiting.append((f"{prefix}{name}.", item))
    return found


def _read_safetensors(path: Path) -> tuple[StateDict, Mapping[str, str]]:
    """The tensors, and the texts in the header."""
    files = require("safetensors")
    damaged = (files.SafetensorError, OSError, KeyError, ValueError, RuntimeError)
    try:
        with files.safe_open(path, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return state, opened.metadata() or {}
    except (*damaged, TypeError, AttributeError) as error:
        reason = (str(error) or repr(error)).partition("\n")[0][:200]
        raise UserError(
            f"{path} is a damaged safetensors file ({reason}): copy it again"
        ) from error
