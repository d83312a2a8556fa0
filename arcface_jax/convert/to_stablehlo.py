"""Write a backbone as StableHLO: a program with its weights, for JAX and XLA.

It takes (B, 112, 112, 3) uint8 RGB, any B, and returns (B, D) float32, not normalized:

    program = jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
    embeddings = program.call(images)
"""

from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from arcface_jax import errors
from arcface_jax.convert import parity
from arcface_jax.convert.packages import require
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.runtime.files import require_place, write_atomic
from arcface_jax.training import step
from arcface_jax.training.network import Network

PLATFORMS = ("cpu", "cuda")
# The serialized form is a flat buffer, which is limited to 2 GiB.
_LARGEST_FILE = 1_900_000_000


def export(model: Network, output: Path) -> float:
    """Writes the file after reading it back and checking its embeddings at batch 1 and 3.

    Returns:
      Largest relative difference of the embeddings.

    Raises:
      UserError: the network is too large for the format, the embeddings differ, or the file cannot
        be written.
    """
    require_place(output)
    parity.require_finite(model)
    arrays = [np.asarray(a) for a in (*model.params.values(), *model.batch_stats.values())]
    if sum(array.nbytes for array in arrays) > _LARGEST_FILE:
        raise errors.UserError(
            f"{model.network} has more than 1.9 GB of weights, too many for a StableHLO file: "
            "use `arcface-jax export onnx`, which puts them into a file of their own"
        )
    weights = jax.tree.map(np.asarray, (model.params, model.batch_stats))
    # Not tied to a device, or the program would only run on that one.
    embed = partial(step.make_embed(model.backbone), *weights)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.uint8)
    require("flatbuffers")  # needed by JAX
    exported = jax.export.export(jax.jit(embed), platforms=PLATFORMS)(images)
    content = exported.serialize()
    error = _check(content, model)
    try:
        write_atomic(output, bytes(content))
    except OSError as reason:
        raise errors.UserError(f"cannot write {output}: {reason.strerror}") from reason
    return error


def _check(content: bytearray, model: Network) -> float:
    program = jax.export.deserialize(content)
    faces = parity.drawn_faces()
    reference = model(faces)
    return max(
        parity.require_equal(
            np.asarray(program.call(faces[:batch])),
            reference[:batch],
            what="StableHLO program",
            bound=parity.TOLERANCE,
        )
        for batch in (1, 3)
    )
