"""Export a network for PyTorch, ONNX, StableHLO or safetensors, checked before the file is named.

arcface-jax export torch --workdir WORKDIR --output backbone.pth
arcface-jax export onnx --workdir WORKDIR --output model.onnx
arcface-jax export onnx --weight backbone.pth --output model.onnx
arcface-jax export stablehlo --workdir WORKDIR --output model.stablehlo
arcface-jax export safetensors --workdir WORKDIR --output backbone.safetensors
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes

from arcface_jax import errors
from arcface_jax.commands import Result, command, console, dispatch
from arcface_jax.config import command_line
from arcface_jax.config.choices import Normalization, Precision
from arcface_jax.inference.open_model import ModelChoice, open_network

T = TypeVar("T")

_TORCH = """Write the backbone of a training run as a state_dict with insightface's names.

    {prog} --workdir WORKDIR --output backbone.pth
    {prog} --workdir WORKDIR --output backbone.safetensors
"""
_SAFETENSORS = """Write the backbone of a training run as safetensors, with insightface's names.

    {prog} --workdir WORKDIR --output backbone.safetensors
"""
_ONNX = """Write a backbone as an ONNX file, checked with ONNX Runtime.

    {prog} --workdir WORKDIR --output model.onnx
    {prog} --weight backbone.pth --output model.onnx
"""
_STABLEHLO = """Write a backbone as StableHLO: a program with its weights, for JAX and XLA.

    {prog} --workdir WORKDIR --output model.stablehlo

It takes (B, 112, 112, 3) uint8 RGB, any B, and gives (B, D) float32, not normalized:

    program = jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
    embeddings = program.call(images)
"""


@dataclass(frozen=True)
class Torch:
    """Options of `export torch` and `export safetensors`."""

    workdir: Annotated[Path, tyro.conf.arg(aliases=["--checkpoint"])]
    """Folder of a training run; its newest checkpoint is exported."""
    output: Path
    """The file to write: .pth, or .safetensors."""


@dataclass(frozen=True)
class Onnx:
    """Options of `export onnx`."""

    model: OmitArgPrefixes[ModelChoice]
    output: Path
    """The .onnx file to write; weights of more than 1.9 GB go to OUTPUT.data beside it."""
    normalization: Normalization = "outside"
    """outside: the graph takes (x - 127.5) / 127.5; inside: it takes 0 .. 255."""
    precision: Precision = "float32"
    """float16, or int8 with --calibration."""
    calibration: str | None = None
    """int8: training data as --data.path names it, whose images give the activations' ranges."""
    targets: tuple[str, ...] = ()
    """Verification sets (.bin) to compare the JAX network and the ONNX file on."""


@dataclass(frozen=True)
class StableHlo:
    """Options of `export stablehlo`."""

    model: OmitArgPrefixes[ModelChoice]
    output: Path
    """The file to write."""


def main(words: Sequence[str], *, prog: str = "arcface-jax export") -> int:
    """Exports to the format that the first word names."""
    formats = {"torch": torch, "onnx": onnx, "stablehlo": stablehlo, "safetensors": safetensors}
    return dispatch(formats, words, prog=prog, description=__doc__ or "")


@command
def torch(words: Sequence[str], *, prog: str = "arcface-jax export torch") -> Result:
    """Writes a .pth or .safetensors file."""
    return _torch(_parse(Torch, words, prog, _TORCH))


@command
def safetensors(words: Sequence[str], *, prog: str = "arcface-jax export safetensors") -> Result:
    """Writes a .safetensors file."""
    arguments = _parse(Torch, words, prog, _SAFETENSORS)
    if arguments.output.suffix != ".safetensors":
        raise errors.UserError(
            f"--output {arguments.output} must end in .safetensors; `arcface-jax export torch` "
            "writes .pth files"
        )
    return _torch(arguments)


def _torch(arguments: Torch) -> Result:
    errors.require("torch", "torch")
    from arcface_jax.convert import to_torch

    error = to_torch.export(arguments.workdir, arguments.output)
    print(f"{arguments.output}: embeddings equal those of JAX to {error:.1e} (relative)")
    return Result({"parity": error}, [arguments.output])


@command
def onnx(words: Sequence[str], *, prog: str = "arcface-jax export onnx") -> Result:
    """Writes an .onnx file and, where targets are named, compares both networks on them."""
    arguments = _parse(Onnx, words, prog, _ONNX)
    for package in ("torch", "onnx"):
        errors.require(package, "onnx")
    from arcface_jax.convert import to_onnx

    calibration = arguments.calibration
    images = to_onnx.calibration_images(calibration) if calibration else None
    model = open_network(arguments.model)
    error = to_onnx.export(
        model,
        arguments.output,
        normalization=arguments.normalization,
        precision=arguments.precision,
        calibration=images,
    )
    print(f"{arguments.output}: embeddings differ from those of JAX by {error:.1e} (relative)")
    values = {"parity": error}
    if arguments.targets:
        from arcface_jax.evaluation.report import tables

        results = to_onnx.compare(model, arguments.output, arguments.targets)
        console().print(*tables.summary(results), *tables.remarks(results), sep="\n")
        values |= {f"eval/{result.name}/accuracy": result.accuracy for result in results}
    return Result(values, [arguments.output])


@command
def stablehlo(words: Sequence[str], *, prog: str = "arcface-jax export stablehlo") -> Result:
    """Writes a StableHLO file."""
    arguments = _parse(StableHlo, words, prog, _STABLEHLO)
    errors.require("torch", "torch")
    from arcface_jax.convert import to_stablehlo

    error = to_stablehlo.export(open_network(arguments.model), arguments.output)
    print(f"{arguments.output}: embeddings differ from those of JAX by {error:.1e} (relative)")
    return Result({"parity": error}, [arguments.output])


def _parse(kind: type[T], words: Sequence[str], prog: str, description: str) -> T:
    text = description.format(prog=prog)
    return command_line.parse(kind, words, prog=prog, description=text, options_only=True)
