"""Import weights as a workdir, or convert arcface_torch's files of class centers.

arcface-jax import backbone.pth --output WORKDIR
arcface-jax import model.onnx --output WORKDIR
arcface-jax import torch --weight backbone.pth --network r50 --output WORKDIR
arcface-jax import centers read FOLDER --output centers.npy
arcface-jax import centers write centers.npy --output FOLDER --ranks 8 --layout 2021
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from arcface_jax import config, errors
from arcface_jax.commands import Result, command, dispatch
from arcface_jax.config import command_line
from arcface_jax.config.choices import CenterLayout, OnnxOptions
from arcface_jax.convert import file_kinds

_TORCH = """Make a workdir of a released backbone, to evaluate, export or fine-tune.

    {prog} --weight backbone.pth --output WORKDIR
    {prog} --weight checkpoint.pt --key state_dict_ema --prefix module. --output WORKDIR
"""
_ONNX = """Make a workdir of an ONNX file, to evaluate, export or fine-tune.

    {prog} --onnx model.onnx --output WORKDIR
"""
_CENTERS = """Convert class centers between arcface_torch's files, one per GPU, and one array.

    {prog} read FOLDER --output centers.npy
    {prog} write centers.npy --output FOLDER --ranks 8 --layout 2021
"""


@dataclass(frozen=True)
class Torch:
    """Options of `import torch`."""

    weight: Path
    """A file of PyTorch or safetensors, from this project or another, or a training checkpoint."""
    output: Path
    """The WORKDIR to create; new or empty."""
    network: config.Network | None = None
    """Network of the weights; by default detected by names and shapes."""
    key: str | None = None
    """Position of the state dict in the file, such as model.state_dict; by default detected."""
    prefix: str | None = None
    """Prefix of the names of its arrays, such as module.; by default detected."""
    color_order: Literal["RGB", "BGR"] | None = None
    """Channel order that the weights expect; by default their project's. BGR
    is converted to RGB."""
    centers: Path | None = None
    """Class centers to keep with them: a folder of arcface_torch's head files, or a .npy."""


@dataclass(frozen=True)
class Onnx:
    """Options of `import onnx`."""

    onnx: Path
    """A float32 file, from any exporter, of a network that `arcface-jax models` lists."""
    output: Path
    """The WORKDIR to create; new or empty."""
    network: config.Network | None = None
    """Network of the file; by default detected by its layers."""
    options: OmitArgPrefixes[OnnxOptions] = field(default_factory=OnnxOptions)


@dataclass(frozen=True)
class Read:
    """Join arcface_torch's files of one training run into a .npy file of (C, D) float32."""

    source: Annotated[Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of the head's files; or a WORKDIR."""
    output: Path
    """The .npy file to write."""
    num_classes: int | None = None
    """Expected number of classes; without it, missing files of the last GPUs go unnoticed."""


@dataclass(frozen=True)
class Write:
    """Split class centers into arcface_torch's files, for a number of GPUs."""

    source: Annotated[Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """A .npy file of (C, D), a WORKDIR, or a folder of the head's files."""
    output: Path
    """Folder to write to; files with these names must not exist."""
    ranks: int
    """Number of GPUs."""
    layout: CenterLayout = "head"
    """checkpoint_gpu_R.pt (head), softmax_fc_gpu_R.pt (2022) or rank_R_softmax_weight.pt (2021)."""


def main(words: Sequence[str], *, prog: str = "arcface-jax import") -> int:
    """Imports a kind that the first word names, or a file, whose kind is detected by content."""
    if words and words[0] not in _COMMANDS and not words[0].startswith("-"):
        path = Path(words[0])
        if path.exists():
            words = [*_kind_of(path), *words]
        elif path.suffix or len(path.parts) > 1:
            with errors.reported():
                raise errors.UserError(f"no file at {path}: name an existing file of weights")
    return dispatch(_COMMANDS, words, prog=prog, description=__doc__ or "")


def _kind_of(path: Path) -> tuple[str, str]:
    """Returns the command that imports a file, and the option that names it."""
    return ("onnx", "--onnx") if file_kinds.is_onnx(path) else ("torch", "--weight")


@command
def torch(words: Sequence[str], *, prog: str = "arcface-jax import torch") -> Result:
    """Converts weights to a workdir."""
    arguments = command_line.parse(
        Torch, words, prog=prog, description=_TORCH.format(prog=prog), options_only=True
    )
    errors.require("torch", "torch")
    from arcface_jax.convert import from_torch
    from arcface_jax.convert.state_dicts import Where

    where = Where(
        network=arguments.network,
        key=arguments.key,
        prefix=arguments.prefix,
        color_order=arguments.color_order,
    )
    made = from_torch.convert(arguments.weight, where, arguments.output, centers=arguments.centers)
    for note in made.notes:
        print(f"{arguments.weight}: {note}")
    print(f"{arguments.output}: embeddings equal torch's to {made.error:.1e} (relative)")
    print(_next(arguments.output, centers=arguments.centers is not None))
    return Result({"parity": made.error, "network": made.network}, [arguments.output])


@command
def onnx(words: Sequence[str], *, prog: str = "arcface-jax import onnx") -> Result:
    """Converts an ONNX file to a workdir."""
    arguments = command_line.parse(
        Onnx, words, prog=prog, description=_ONNX.format(prog=prog), options_only=True
    )
    for package in ("torch", "onnx"):
        errors.require(package, "onnx")
    from arcface_jax.convert import from_onnx

    made = from_onnx.convert(
        arguments.onnx, arguments.output, arguments.network, options=arguments.options
    )
    for note in made.notes:
        print(f"{arguments.onnx}: {note}")
    print(f"{arguments.output}: embeddings equal ONNX Runtime's to {made.error:.1e} (relative)")
    print(_next(arguments.output))
    values = {"parity": made.error, "network": made.network, "folded": made.folded}
    return Result(values, [arguments.output])


def _next(workdir: Path, *, centers: bool = False) -> str:
    """Returns how to train from a workdir of weights."""
    from arcface_jax.training import checkpoint

    model = checkpoint.read_config(workdir).model
    size = "" if model.embedding_size == 512 else f" --model.embedding-size {model.embedding_size}"
    kept = " --finetune.centers kept" if centers else ""
    return f"to train from it: --init-from {workdir} --model.network {model.network}{size}{kept}"


@command
def centers(words: Sequence[str], *, prog: str = "arcface-jax import centers") -> Result:
    """Reads or writes class centers."""
    arguments = command_line.parse(
        cast("type[Read | Write]", Read | Write),
        words,
        prog=prog,
        description=_CENTERS.format(prog=prog),
    )
    errors.require("torch", "torch")
    from arcface_jax.convert import centers as center_files

    if isinstance(arguments, Read):
        found = center_files.read(arguments.source, num_classes=arguments.num_classes)
        files = [center_files.write_array(arguments.output, found)]
    else:
        found = center_files.read(arguments.source)
        files = center_files.write(
            arguments.output, found, ranks=arguments.ranks, layout=arguments.layout
        )
    if found.momentum is not None and (isinstance(arguments, Read) or arguments.layout != "2021"):
        print(
            "note: the momentum of the centers was not written: only --layout 2021 has a file "
            "for it",
            file=sys.stderr,
        )
    classes, size = found.rows.shape
    written = f"{len(files)} files" if len(files) > 1 else str(files[0])
    print(f"{classes:,} class centers of length {size} written to {written}")
    return Result({"classes": classes, "embedding_size": size}, files)


_COMMANDS = {"torch": torch, "onnx": onnx, "centers": centers}
