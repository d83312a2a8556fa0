"""Convert class centers from arcface_torch's files, one per GPU, to one array and back."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from arcface_jax.config.choices import CenterLayout
from arcface_jax.convert import weight_files
from arcface_jax.convert.torch_files import Entry
from arcface_jax.errors import UserError
from arcface_jax.runtime import foreign
from arcface_jax.runtime.files import atomic, require_place
from arcface_jax.training import checkpoint, saved_runs

# File names of a rank, by layout. 2021 has a bare tensor, and the momentum in a separate file;
# early 2022 the module's state_dict; head (since May 2022) has it in a checkpoint with everything.
_NAMES: dict[str, str] = {
    "2021": "rank_{}_softmax_weight.pt",
    "2022": "softmax_fc_gpu_{}.pt",
    "head": "checkpoint_gpu_{}.pt",
}
_SHOWN = 8
_RANK = 6  # most digits of a GPU's number
_MOMENTUM = "rank_{}_softmax_weight_mom.pt"
_HEAD_KEY = "state_dict_softmax_fc"


class Centers(NamedTuple):
    """Centers of all classes, in the order of their labels."""

    rows: np.ndarray
    """(C, D) float32."""
    momentum: np.ndarray | None = None
    """(C, D) float32 SGD momentum, if the files have it."""


def read(source: Path, *, num_classes: int | None = None) -> Centers:
    """Reads class centers from a .npy file, a workdir, or a folder of arcface_torch's head files.

    Raises:
      UserError: there are no centers, a GPU's file is missing, or the files do not match.
    """
    if source.suffix == ".npy":
        centers = Centers(_read_array(source))
    elif (source / checkpoint.CONFIG).is_file():
        centers = _read_workdir(source)
    else:
        centers = _read_folder(source)
    if num_classes is not None and len(centers.rows) != num_classes:
        raise UserError(
            f"{source} has centers of {len(centers.rows)} classes, not of {num_classes}: are files "
            "of the last GPUs missing?"
        )
    return centers


def write(folder: Path, centers: Centers, *, ranks: int, layout: CenterLayout) -> list[Path]:
    """Writes a file per GPU, or two in 2021's layout, and returns their paths.

    In 2021's layout, an unknown momentum is written as zero. The other layouts have none.

    Raises:
      UserError: there are fewer classes than GPUs, a file already exists, or one cannot be written.
    """
    if not 1 <= ranks <= len(centers.rows):
        raise UserError(f"--ranks {ranks} must be 1 to {len(centers.rows)}, the number of classes")
    momentum = np.zeros_like(centers.rows) if centers.momentum is None else centers.momentum
    contents: dict[Path, object] = {}
    for rank, part in enumerate(_ranges(len(centers.rows), ranks)):
        rows = torch.from_numpy(np.array(centers.rows[part]))
        path = folder / _NAMES[layout].format(rank)
        if layout == "2021":
            contents[path] = rows
            contents[folder / _MOMENTUM.format(rank)] = torch.from_numpy(np.array(momentum[part]))
        else:
            state = {"weight": rows}
            contents[path] = {_HEAD_KEY: state} if layout == "head" else state
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder for the files of the GPUs")
    there = [str(path) for path in contents if path.exists()]
    if there:
        raise UserError(f"there already: {', '.join(there)}; name another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    for path, content in contents.items():
        weight_files.write_torch(path, content)
    return list(contents)


def write_array(path: Path, centers: Centers) -> Path:
    """Writes the rows as a .npy file of (C, D) float32; returns its path.

    Raises:
      UserError: the name does not end in .npy, or the file cannot be written.
    """
    if path.suffix != ".npy":
        raise UserError(f"--output {path} must end in .npy")
    require_place(path)
    try:
        with atomic(path, "wb") as file:
            np.save(file, centers.rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def _ranges(classes: int, ranks: int) -> list[slice]:
    """Returns contiguous ranges; the first C mod N ranks have one more class."""
    each, more = divmod(classes, ranks)
    starts = [rank * each + min(rank, more) for rank in range(ranks + 1)]
    return [slice(*ends) for ends in itertools.pairwise(starts)]


def _read_array(path: Path) -> np.ndarray:
    if not foreign.is_file(path):
        raise UserError(f"there is no {path}")
    try:
        rows = foreign.load_array(path)
    except (ValueError, OSError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{path} is not a .npy file of numbers: {reason}") from error
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise UserError(f"{path} holds {rows.dtype} {rows.shape}, not class centers (C, D)")
    return rows.astype(np.float32)


def _read_workdir(workdir: Path) -> Centers:
    subcenters = checkpoint.read_config(workdir).head.subcenters
    if subcenters != 1:
        raise UserError(
            f"{workdir} has {subcenters} sub-centers of each class; arcface_torch knows one"
        )
    return Centers(*saved_runs.restore_centers(workdir))


def _read_folder(folder: Path) -> Centers:
    found = {layout: _ranks(folder, name) for layout, name in _NAMES.items()}
    layouts = [layout for layout, ranks in found.items() if ranks]
    if len(layouts) != 1:
        names = " or ".join(_NAMES[layout].format("R") for layout in layouts or _NAMES)
        raise UserError(
            f"{folder} holds head files of several generations: leave only {names} there"
            if layouts
            else f"{folder} holds no {names}: name a folder that arcface_torch trained in"
        )
    (layout,) = layouts
    rows = _join(folder, _NAMES[layout], found[layout])
    moments = _ranks(folder, _MOMENTUM) if layout == "2021" else []
    momentum = _join(folder, _MOMENTUM, moments) if moments else None
    if momentum is not None and momentum.shape != rows.shape:
        raise UserError(f"{folder}: centers are {rows.shape}, their momentum {momentum.shape}")
    return Centers(rows, momentum)


def _ranks(folder: Path, name: str) -> list[int]:
    pattern = re.compile(re.escape(name).replace(r"\{\}", rf"(\d{{1,{_RANK}}})"))
    found = [pattern.fullmatch(p.name) for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def _join(folder: Path, name: str, ranks: list[int]) -> np.ndarray:
    if ranks != list(range(len(ranks))):
        expected = itertools.count()
        missing = list(itertools.islice((n for n in expected if n not in ranks), _SHOWN))
        missing = [rank for rank in missing if rank < ranks[-1]]
        names = ", ".join(name.format(rank) for rank in missing)
        raise UserError(f"{folder} lacks {names}: the files of all GPUs are needed")
    parts = [_read_rank(folder / name.format(rank)) for rank in ranks]
    widths = {part.shape[1] for part in parts}
    counts = [len(part) for part in parts]
    expected = [part.stop - part.start for part in _ranges(sum(counts), len(parts))]
    if len(widths) > 1 or counts != expected:
        each = ", ".join(f"{name.format(r)} {p.shape}" for r, p in zip(ranks, parts, strict=True))
        raise UserError(
            f"inconsistent head files in {folder} (equal widths expected, and one more row on "
            f"the first GPUs): {each}"
        )
    return np.concatenate(parts)


def _read_rank(path: Path) -> np.ndarray:
    content = weight_files.read_torch(path)
    for key in (_HEAD_KEY, "weight"):
        if isinstance(content, dict):
            content = content.get(key, content)
    if not isinstance(content, Entry) or len(content.shape) != 2 or not content.nbytes:
        raise UserError(f"{path} holds no class centers (rows, D)")
    if not content.dtype.is_floating_point:
        kind = str(content.dtype).removeprefix("torch.")
        raise UserError(f"{path} holds centers of {kind}; expected floating-point numbers")
    return weight_files.read_entry(content, source=str(path)).float().numpy()
