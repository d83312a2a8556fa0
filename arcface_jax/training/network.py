"""A trained network as a function from images to embeddings, on the devices of this machine."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from arcface_jax import plugins
from arcface_jax.config.choices import Which
from arcface_jax.evaluation import embed
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.models import registry
from arcface_jax.models.registry import Arrays
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import saved_runs, step, teacher_record


class Network:
    """A trained backbone in float32.

    `Network.from_workdir("runs/demo")(images)` returns the embeddings of (n, 112, 112, 3) uint8 RGB
    images as (n, D) float32, not normalized.

    Args:
      network: as `model.network`.
      params: the backbone's parameters.
      batch_stats: its BatchNorm statistics.
      batch_size: images per forward pass, rounded up to a multiple of the number of devices. Fewer
        images run as one or eight per device, so that at most three programs are compiled.
      embedding_size: D; by default read from the parameters, which only built-in networks allow.
      options: as `model.options`.
      devices: how many devices share a batch; by default all, and "own" for this process's devices
        only.
      compatible_with: as `ModelInput.compatible_with`.

    Raises:
      ConfigError: the batch size is below 1, or there are fewer devices.
    """

    def __init__(
        self,
        network: str,
        params: Arrays,
        batch_stats: Arrays,
        *,
        batch_size: int = 64,
        embedding_size: int | None = None,
        options: plugins.Options = (),
        devices: int | Literal["own"] | None = None,
        compatible_with: str = "",
    ):
        embed.check_batch_size(batch_size)
        self.network = network
        self._compatible_with = compatible_with
        self._digest = ""
        device_mesh = self._mesh = meshes.make(devices)
        batch_size = -(-batch_size // device_mesh.size) * device_mesh.size
        self.params, self.batch_stats = jax.device_put(
            (params, batch_stats), meshes.replicated(device_mesh)
        )
        self.embedding_size = embedding_size or registry.embedding_size(params) or 512
        self.backbone = registry.build(network, embedding_size=self.embedding_size, options=options)
        run = partial(step.make_embed(self.backbone), self.params, self.batch_stats)
        sizes = {size for size in (device_mesh.size, 8 * device_mesh.size) if size < batch_size}
        self._runs = {
            size: embed.batched(run, batch_size=size, mesh=device_mesh)
            for size in sorted({*sizes, batch_size})
        }

    @classmethod
    def from_workdir(cls, workdir: str | Path, *, which: Which = "latest", **options) -> "Network":
        """Loads a checkpoint of a run, by default the newest; options as in the class.

        Raises:
          CheckpointError: the folder has no checkpoint.
        """
        config, params, batch_stats, _ = saved_runs.restore_backbone(Path(workdir), which)
        model, taught = config.model, teacher_record.read(Path(workdir))
        return cls(
            model.network,
            params,
            batch_stats,
            embedding_size=model.embedding_size,
            options=model.options,
            compatible_with=taught.model if taught and taught.compatible else "",
            **options,
        )

    def __call__(self, images: np.ndarray, /) -> np.ndarray:
        """Embeds (n, 112, 112, 3) uint8 RGB images as (n, D) float32, not normalized."""
        if images.ndim != 4 or images.shape[1:] != (112, 112, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"images are {images.shape} {images.dtype}; expected (n, 112, 112, 3) uint8, RGB, "
                "aligned faces"
            )
        return self._runs[self._size(len(images))](images)

    def rows_of_this_host(self, count: int) -> np.ndarray:
        """Returns (count,) bool: which images of a call this host reads; on a single host all."""
        return embed.rows_of_this_host(count, batch_size=self._size(count), mesh=self._mesh)

    def _size(self, count: int) -> int:
        """Returns the batch size of the program that runs `count` images."""
        return min((size for size in self._runs if size >= count), default=max(self._runs))

    @property
    def input(self) -> ModelInput:
        """RGB, (x - 127.5) / 127.5, as for every network of the registry, and a hash of the
        weights.
        """
        return ModelInput(
            embedding_size=self.embedding_size,
            digest=self.digest(),
            compatible_with=self._compatible_with,
        )

    def digest(self) -> str:
        """`weights_digest` of this network: the same for a run and its `.pth` export."""
        if not self._digest:
            self._digest = weights_digest(self.network, self.params, self.batch_stats)
        return self._digest


def weights_digest(network: str, params: Arrays, batch_stats: Arrays) -> str:
    """Returns a SHA-256 of a network's name and weights, independent of their file format."""
    total = hashlib.sha256(network.encode())
    for arrays in (params, batch_stats):
        for name in sorted(arrays):
            total.update(name.encode())
            total.update(np.ascontiguousarray(arrays[name], np.float32).data)
    return total.hexdigest()
