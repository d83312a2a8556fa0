"""Inference as a library: images in, embeddings out."""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from arcface_jax import checkpoint, mesh, models, step
from arcface_jax.evaluation import embed
from arcface_jax.models import Arrays


class Embedder:
    """A trained backbone, in float32, on the devices of this machine.

    `Embedder.from_workdir("runs/demo")(images)` gives the embeddings of (n, 112, 112, 3) uint8 RGB
    images as (n, D) float32, not normalised; the cosine of two says how alike the faces are.

    Args:
      network: a name in `arcface_jax.models.NETWORKS`.
      params: the backbone's parameters.
      batch_stats: its BatchNorm statistics.
      batch_size: images per forward pass, a multiple of the number of devices.
      devices: how many devices share a batch; all of them when not given.
    """

    def __init__(
        self,
        network: str,
        params: Arrays,
        batch_stats: Arrays,
        *,
        batch_size: int = 64,
        devices: int | None = None,
    ):
        self.network = network
        device_mesh = mesh.make(devices)
        self.params, self.batch_stats = jax.device_put(
            (params, batch_stats), mesh.replicated(device_mesh)
        )
        backbone = models.build(network, embedding_size=models.embedding_size(params) or 0)
        self._run = embed.batched(
            partial(step.make_embed(backbone), self.params, self.batch_stats),
            batch_size=batch_size,
            mesh=device_mesh,
        )

    @classmethod
    def from_workdir(cls, workdir: str | Path, **options) -> "Embedder":
        """The newest checkpoint of a run; options as in the class.

        Raises:
          CheckpointError: the folder holds none.
        """
        config, params, batch_stats, _ = checkpoint.restore_backbone(Path(workdir))
        return cls(config.model.network, params, batch_stats, **options)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(n, 112, 112, 3) uint8 RGB to (n, D) float32."""
        if images.ndim != 4 or images.shape[1:] != (112, 112, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"images are {images.shape} {images.dtype}; expected (n, 112, 112, 3) uint8, RGB, "
                "aligned faces"
            )
        return self._run(images)
