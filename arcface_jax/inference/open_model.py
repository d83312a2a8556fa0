"""The network that a command line names: a run, torch weights, or an ONNX file.

Commands parse `ModelChoice` before they open anything, so what opens a network is imported by the
functions that do.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from arcface_jax.config import Config
from arcface_jax.config.choices import Which
from arcface_jax.errors import UserError

if TYPE_CHECKING:
    from arcface_jax.evaluation.embed import Model
    from arcface_jax.training.network import Network


@dataclass(frozen=True)
class ModelChoice:
    """The network; name one of --workdir, --weight, --onnx."""

    workdir: Annotated[Path | None, tyro.conf.arg(aliases=["--checkpoint"])] = None
    """Folder of a training run."""
    step: Which = "latest"
    """Which of the run's checkpoints: a step, the newest, or the best by checkpoint.best_metric."""
    weight: Path | None = None
    """Or a file of PyTorch weights, of this project or another (docs/modelzoo.md)."""
    network: str | None = None
    """The network that --weight is of; by default found by its names and shapes."""
    onnx: Path | None = None
    """Or an ONNX file."""


def open_model(choice: ModelChoice, *, batch_size: int = 64, devices: int | None = None) -> "Model":
    """Opens the one network that is named.

    Args:
      choice: what the command line says.
      batch_size: images per forward pass, over all devices.
      devices: as in `arcface_jax.training.network.Network`; an ONNX file chooses for itself.

    Raises:
      UserError: none or several are named, or it cannot be read.
    """
    named = [name for name in ("workdir", "weight", "onnx") if getattr(choice, name) is not None]
    if len(named) != 1:
        raise UserError(
            f"{len(named)} networks are named ({', '.join(f'--{n}' for n in named) or 'none'}); "
            "name one: --workdir FOLDER, --weight FILE.pth, or --onnx FILE.onnx"
        )
    if choice.workdir is not None:
        from arcface_jax.training.network import Network

        options = {"batch_size": batch_size, "devices": devices}
        return Network.from_workdir(choice.workdir, which=choice.step, **options)
    if choice.weight is not None:
        from arcface_jax.convert import weights  # only these files need torch
        from arcface_jax.training.network import Network

        found = weights.load(choice.weight, choice.network)
        for note in found.notes:
            print(f"{choice.weight}: {note}", file=sys.stderr)
        arrays = (found.params, found.batch_stats)
        return Network(found.network, *arrays, batch_size=batch_size, devices=devices)
    assert choice.onnx is not None  # it is the one named
    from arcface_jax.convert.onnx_runner import onnx_embedder

    return onnx_embedder(choice.onnx, batch_size=batch_size)


def config_of(choice: ModelChoice) -> Config:
    """The recipe of the run that is named; the default one where the network is of no run."""
    if choice.workdir is None:
        return Config()
    from arcface_jax.training import checkpoint

    return checkpoint.read_config(choice.workdir)


def open_network(choice: ModelChoice, *, batch_size: int = 16) -> "Network":
    """Opens a run or torch weights to export them, on one device.

    Raises:
      UserError: none or several are named, it cannot be read, or it is an ONNX file.
    """
    from arcface_jax.training.network import Network

    model = open_model(choice, batch_size=batch_size, devices=1)
    if not isinstance(model, Network):
        raise UserError(
            f"--onnx {choice.onnx} has been exported already: name its --workdir or --weight"
        )
    return model


@dataclass(frozen=True)
class ModelChoices:
    """The networks, of any kinds."""

    workdir: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["--checkpoint"])] = ()
    """Folders of training runs."""
    step: Which = "latest"
    """Which of their checkpoints: a step, the newest, or the best by checkpoint.best_metric."""
    weight: tuple[Path, ...] = ()
    """backbone.pth files, of this project or of insightface."""
    network: tuple[str, ...] = ()
    """The network of all --weight, or one for each; by default found by names and shapes."""
    onnx: tuple[Path, ...] = ()
    """ONNX files."""

    def each(self) -> list[ModelChoice]:
        """One by one, in the order of the options.

        Raises:
          UserError: the networks are not as many as the weights.
        """
        networks: tuple[str | None, ...] = self.network or (None,)
        count = len(self.weight)
        if len(networks) not in (1, count):
            raise UserError(
                f"{count} --weight and {len(networks)} --network: name one network, or one for each"
            )
        networks = networks * count if len(networks) == 1 else networks
        return [
            *(ModelChoice(workdir=path, step=self.step) for path in self.workdir),
            *(ModelChoice(weight=w, network=n) for w, n in zip(self.weight, networks, strict=True)),
            *(ModelChoice(onnx=path) for path in self.onnx),
        ]


def open_models(choices: ModelChoices, *, batch_size: int = 64) -> dict[str, "Model"]:
    """Opens several networks, each named after its folder or file, a second of one name NAME-2.

    Raises:
      UserError: none is named, or one cannot be read.
    """
    each = choices.each()
    if not each:
        open_model(ModelChoice())  # which says how to name one
    models: dict[str, Model] = {}
    for choice in each:
        path = choice.workdir or choice.weight or choice.onnx or Path()
        stem = path.resolve().name if choice.workdir else path.stem
        names = [stem, *(f"{stem}-{number}" for number in range(2, len(each) + 1))]
        name = next(name for name in names if name not in models)
        models[name] = open_model(choice, batch_size=batch_size)
    return models
