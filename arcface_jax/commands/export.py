"""Export a network to PyTorch, ONNX, StableHLO, safetensors or a model hub, with a check.

arcface-jax export torch --workdir WORKDIR --output backbone.pth
arcface-jax export onnx --workdir WORKDIR --output model.onnx
arcface-jax export onnx --weight backbone.pth --output model.onnx
arcface-jax export other.onnx --dynamic-batch --output free.onnx
arcface-jax export stablehlo --workdir WORKDIR --output model.stablehlo
arcface-jax export safetensors --workdir WORKDIR --output backbone.safetensors
arcface-jax export hub --workdir WORKDIR --output FOLDER
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes

from arcface_jax import errors
from arcface_jax.commands import (
    Result,
    command,
    console,
    dispatch,
    own_options,
    refuse_changed,
)
from arcface_jax.config import command_line
from arcface_jax.config.choices import GraphInput, Normalization, Precision
from arcface_jax.inference.open_model import ModelChoice, open_network, refuse_unused

if TYPE_CHECKING:
    from rich.table import Table

    from arcface_jax.convert.onnx_layer_errors import LayerError

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
    {prog} --weight backbone.pth --output model.onnx --opset 13 --input uint8-nhwc

Or give the ONNX file of others a free batch axis:

    {prog} --onnx other.onnx --dynamic-batch --output free.onnx
"""
_STABLEHLO = """Write a backbone as StableHLO: a program with its weights, for JAX and XLA.

    {prog} --workdir WORKDIR --output model.stablehlo

It takes (B, 112, 112, 3) uint8 RGB, any B, and gives (B, D) float32, not normalized:

    program = jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
    embeddings = program.call(images)
"""
_HUB = """Write a folder for a model hub: safetensors, its description and a model card, no code.

    {prog} --workdir WORKDIR --output FOLDER --license apache-2.0
    {prog} --weight backbone.pth --output FOLDER --training-data "MS1MV3"
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
    """The .onnx file to write; weights above 1.9 GB go to OUTPUT.data next to it."""
    normalization: Normalization | None = None
    """outside, the default: the graph takes (x - 127.5) / 127.5; inside: it takes 0 .. 255."""
    input: GraphInput = "float"
    """float: (batch, 3, 112, 112); uint8-nhwc: decoded images, (batch, 112, 112, 3) uint8 RGB."""
    opset: int | None = None
    """Operator version, from 13; by default 18, or 23 for networks without a torch twin."""
    ir_version: int = 8
    """Version of the file format; 8 loads in ONNX Runtime from 1.15 on and in OpenCV."""
    dynamic_batch: bool = False
    """With --onnx: write the same model with a free batch axis."""
    precision: Precision = "float32"
    """float16, or int8 with --calibration; errors of int8 layers go to OUTPUT.layers.json."""
    calibration: str | None = None
    """int8: training data as in --data.path, whose images set the ranges of activations."""
    targets: tuple[str, ...] = ()
    """Verification sets (.bin) to compare the JAX network and the ONNX file on."""


@dataclass(frozen=True)
class StableHlo:
    """Options of `export stablehlo`."""

    model: OmitArgPrefixes[ModelChoice]
    output: Path
    """The file to write."""


@dataclass(frozen=True)
class Hub:
    """Options of `export hub`."""

    model: OmitArgPrefixes[ModelChoice]
    output: Path
    """Folder to create; new or empty."""
    name: str = ""
    """Title of the model card; by default the folder's name."""
    license: str = "other"
    """License of the weights by the hub's identifiers, such as apache-2.0."""
    license_name: str = ""
    """Name of the license, for --license other."""
    license_link: str = ""
    """Link to its text, for --license other."""
    training_data: str = ""
    """A sentence about the training data; the run's own record follows it."""
    intended_use: str = ""
    """Replaces the model card's paragraph about intended use."""
    calibration: Path | None = None
    """A calibration for this network, whose operating points the model card lists."""


def main(words: Sequence[str], *, prog: str = "arcface-jax export") -> int:
    """Exports to the format that the first word, or `--format NAME`, names."""
    formats = {
        "torch": torch,
        "onnx": onnx,
        "stablehlo": stablehlo,
        "safetensors": safetensors,
        "hub": hub,
    }
    if words and words[0].endswith(".onnx"):
        words = ["onnx", "--onnx", *words]
    if words and words[0].partition("=")[0] == "--format":
        words = " ".join(words[:1]).replace("=", " ").split()[1:] + list(words[1:])
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
    print(f"{arguments.output}: embeddings equal JAX's to {error:.1e} (relative)")
    return Result({"parity": error}, [arguments.output])


@command
def onnx(words: Sequence[str], *, prog: str = "arcface-jax export onnx") -> Result:
    """Writes an .onnx file and, if targets are named, compares both networks on them."""
    arguments = _parse(Onnx, words, prog, _ONNX)
    for package in ("torch", "onnx"):
        errors.require(package, "onnx")
    if arguments.dynamic_batch:
        return _free_batch(arguments)
    from arcface_jax.convert import to_onnx
    from arcface_jax.convert.onnx_graph import Form

    calibration = arguments.calibration
    with own_options({"data.path": "--calibration"}):
        images = to_onnx.calibration_images(calibration) if calibration else None
    model = open_network(arguments.model)
    form = Form(
        input=arguments.input,
        normalization=arguments.normalization,
        opset=arguments.opset,
        ir_version=arguments.ir_version,
    )
    made = to_onnx.export(
        model, arguments.output, form=form, precision=arguments.precision, calibration=images
    )
    print(f"{arguments.output}: embeddings differ from JAX's by {made.error:.1e} (relative)")
    values: dict[str, object] = {"parity": made.error}
    files = [arguments.output]
    if made.layers:
        console().print(_layer_errors(made.layers))
        files.append(to_onnx.write_layers(made.layers, arguments.output))
    if arguments.targets:
        from arcface_jax.evaluation.report import tables

        with own_options({"evaluation.targets": "--targets"}):
            results = to_onnx.compare(model, arguments.output, arguments.targets)
        console().print(*tables.summary(results), *tables.remarks(results), sep="\n")
        values |= {f"eval/{result.name}/accuracy": result.accuracy for result in results}
    return Result(values, files)


def _free_batch(arguments: Onnx) -> Result:
    from arcface_jax.convert import onnx_batch

    source = arguments.model.onnx
    if source is None:
        raise errors.UserError(
            "--dynamic-batch is for an ONNX file (--onnx FILE.onnx): exports of runs and weights "
            "have a free batch axis anyway"
        )
    refuse_changed(
        arguments,
        *("normalization", "input", "opset", "ir_version", "precision", "calibration", "targets"),
        because="does not go with --dynamic-batch, which keeps the graph of the file: give one of "
        "the two",
    )
    choice = arguments.model
    how = {name: getattr(choice, name) for name in ("network", "step", "onnx_options")}
    refuse_unused(source, "onnx", **how)
    error = onnx_batch.free(source, arguments.output, options=choice.onnx_options)
    print(
        f"{arguments.output}: at batch 1, 3 and 64 embeddings differ by {error:.1e} (relative) "
        f"from {source}'s at batch 1"
    )
    return Result({"parity": error}, [arguments.output])


def _layer_errors(layers: "Sequence[LayerError]") -> "Table":
    from rich.table import Table

    table = Table("layer", "operator", "precision", title="relative error of each layer's output")
    table.add_column("error", justify="right")
    for layer in layers:
        precision = "int8" if layer.quantized else "float32"
        table.add_row(layer.layer, layer.operator, precision, f"{layer.error:.4f}")
    return table


@command
def stablehlo(words: Sequence[str], *, prog: str = "arcface-jax export stablehlo") -> Result:
    """Writes a StableHLO file."""
    arguments = _parse(StableHlo, words, prog, _STABLEHLO)
    errors.require("torch", "torch")
    from arcface_jax.convert import to_stablehlo

    error = to_stablehlo.export(open_network(arguments.model), arguments.output)
    print(f"{arguments.output}: embeddings differ from JAX's by {error:.1e} (relative)")
    return Result({"parity": error}, [arguments.output])


@command
def hub(words: Sequence[str], *, prog: str = "arcface-jax export hub") -> Result:
    """Writes a hub folder."""
    arguments = _parse(Hub, words, prog, _HUB)
    for package, extra in (("torch", "torch"), ("safetensors", "onnx")):
        errors.require(package, extra)
    from arcface_jax.convert import hub as folders
    from arcface_jax.convert import model_card
    from arcface_jax.evaluation import calibration

    choice, path = arguments.model, arguments.calibration
    model = open_network(choice)
    found = None if path is None else calibration.read(path)
    if found is not None and found.model not in (model.digest(), model.input.digest):
        raise errors.UserError(
            f"--calibration {path} is of another model: make one for this with "
            "`arcface-jax calibrate`"
        )
    options = {"intended_use": arguments.intended_use} if arguments.intended_use else {}
    card = model_card.Card(
        name=arguments.name or arguments.output.resolve().name,
        license=arguments.license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        training_data=arguments.training_data,
        run=model_card.of_run(choice.workdir, choice.step) if choice.workdir else None,
        calibration=found,
        **options,
    )
    error = folders.export(model, arguments.output, card=card)
    print(f"{arguments.output}: embeddings equal torch's to {error:.1e} (relative)")
    return Result({"parity": error}, sorted(arguments.output.iterdir()))


def _parse(kind: type[T], words: Sequence[str], prog: str, description: str) -> T:
    text = description.format(prog=prog)
    return command_line.parse(kind, words, prog=prog, description=text, options_only=True)
