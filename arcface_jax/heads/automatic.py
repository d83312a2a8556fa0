"""Settings of the head that depend on the machine, resolved once at start.

Chosen by timing an H100 (docs/gpu.md) and CPUs.
"""

from dataclasses import replace
from typing import Any, Literal

from arcface_jax.config import HeadConfig
from arcface_jax.errors import ConfigError
from arcface_jax.heads import margins
from arcface_jax.runtime.devices import GPU_PLATFORMS

# On a GPU every block is a dozen kernels: large blocks make them long enough, as long as the L2
# cache holds a block's operands. Small batches, which leave most of the cache to the centers, are
# faster with twice as many.
_BLOCK_SIZE = {"gpu": 8192, "gpu, small batch": 16_384, "cpu": 2048}

# On an H100 `scaled` is faster at 256 samples and `powers` at 512; this is halfway.
_SMALL_BATCH = 384

# An A100's compiled program moves a sixth more bytes with the larger blocks.
_HOPPER = 9.0

# A block's products with a tile of the batch have at most this many bytes of float32.
_TILE_BYTES = 64 * 2**20


def resolve(head: HeadConfig, *, platform: str, batch: int, capability: float = 0.0) -> HeadConfig:
    """Replaces `automatic` settings by actual values.

    Args:
      head: as configured.
      platform: platform of the mesh's devices, which need not be in this machine.
      batch: embeddings over all devices.
      capability: compute capability of NVIDIA GPUs, see `devices.compute_capability`.

    Raises:
      ConfigError: block_form cannot compute this head.
    """
    gpu = platform in GPU_PLATFORMS
    changes: dict[str, Any] = {}
    form = head.block_form
    if form == "automatic":
        form = changes["block_form"] = _form(head, gpu=gpu, batch=batch)
    elif head.block_form == "powers" and not _keeps_cosines(head):
        raise ConfigError(
            "head.block_form powers needs head.dtype bfloat16 or float32, one center per class and "
            f"a margin that leaves other classes' cosines as they are; got {head.dtype}, "
            f"subcenters {head.subcenters}, loss {head.loss}: use automatic"
        )
    elif head.block_form == "scaled" and head.dtype == "float16":
        raise ConfigError(
            "head.block_form scaled needs head.dtype bfloat16 or float32, got float16, in which "
            "gradients divided by the length of a short center overflow: use automatic"
        )
    if head.block_size == 0:
        small = form == "scaled" and batch <= _SMALL_BATCH and head.subcenters == 1
        small &= capability >= _HOPPER
        where = "cpu" if not gpu else "gpu, small batch" if small else "gpu"
        changes["block_size"] = _BLOCK_SIZE[where]
    return replace(head, **changes)


def tiles(head: HeadConfig, *, batch: int, devices: int) -> int:
    """Returns the number of tiles of the batch: a divisor of the samples of a device."""
    largest = max(_TILE_BYTES // (4 * head.block_size * head.subcenters), 1)
    each = batch // devices
    counts = (count for count in range(1, each + 1) if each % count == 0)
    return next((count for count in counts if batch // count <= largest), each)


def _form(head: HeadConfig, *, gpu: bool, batch: int) -> Literal["unit", "scaled", "powers"]:
    if not gpu or head.dtype != "bfloat16":
        return "unit"
    return "powers" if batch > _SMALL_BATCH and _keeps_cosines(head) else "scaled"


def _keeps_cosines(head: HeadConfig) -> bool:
    changed = margins.make(head).negatives is not None
    return head.dtype != "float16" and head.subcenters == 1 and not changed
