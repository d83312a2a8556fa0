"""The network that a command line names: a run, torch weights, or an ONNX file."""

from dataclasses import dataclass
from pathlib import Path

from arcface_jax.checkpoint import Which
from arcface_jax.errors import UserError
from arcface_jax.network import Model, Network


@dataclass(frozen=True)
class ModelChoice:
    """Options of a command that takes one network, of any of three kinds."""

    checkpoint: Path | None = None
    """WORKDIR of a training run."""
    step: Which = "latest"
    """Which of the run's checkpoints: a step, the newest, or the best by checkpoint.best_metric."""
    weight: Path | None = None
    """Or a backbone.pth, of this project or of insightface."""
    network: str = "r50"
    """The network that --weight is of."""
    onnx: Path | None = None
    """Or an ONNX file."""


def open_model(choice: ModelChoice, *, batch_size: int = 64, devices: int | None = None) -> Model:
    """Opens the one network that is named.

    Args:
      choice: what the command line says.
      batch_size: images per forward pass, over all devices.
      devices: as in `arcface_jax.network.Network`; an ONNX file chooses for itself.

    Raises:
      UserError: none or several are named, or it cannot be read.
    """
    named = [name for name in ("checkpoint", "weight", "onnx") if getattr(choice, name) is not None]
    if len(named) != 1:
        raise UserError(
            f"{len(named)} networks are named ({', '.join(f'--{n}' for n in named) or 'none'}); "
            "name one: --checkpoint WORKDIR, --weight FILE.pth with --network, or --onnx FILE.onnx"
        )
    if choice.checkpoint is not None:
        options = {"batch_size": batch_size, "devices": devices}
        return Network.from_workdir(choice.checkpoint, which=choice.step, **options)
    if choice.weight is not None:
        from convert import weights  # torch is needed for these files alone

        arrays = weights.load(choice.weight, choice.network)
        return Network(choice.network, *arrays, batch_size=batch_size, devices=devices)
    assert choice.onnx is not None  # it is the one named
    from convert.onnx_runner import onnx_embedder

    return onnx_embedder(choice.onnx, batch_size=batch_size)
