"""The network that an export's command line names: of a workdir, or of a file of weights."""

from dataclasses import dataclass
from pathlib import Path

from arcface_jax.embedder import Embedder
from arcface_jax.errors import UserError
from convert import weights


@dataclass(frozen=True)
class Trained:
    """Either a workdir, or weights and their network."""

    checkpoint: Path | None = None
    """WORKDIR of a training run; its newest checkpoint is exported."""
    weight: Path | None = None
    """Or a backbone: .pth, .pt or .safetensors."""
    network: str = "r50"
    """The network of --weight."""

    def open(self, *, batch_size: int = 16) -> Embedder:
        """The network in float32, on one device.

        Raises:
          UserError: neither or both are named, or what is named cannot be read.
        """
        if (self.checkpoint is None) == (self.weight is None):
            raise UserError("name one network: either --checkpoint WORKDIR or --weight FILE.pth")
        options = {"batch_size": batch_size, "devices": 1}
        if self.checkpoint is not None:
            return Embedder.from_workdir(self.checkpoint, **options)
        assert self.weight is not None
        params, batch_stats = weights.load(self.weight, self.network)
        return Embedder(self.network, params, batch_stats, **options)
