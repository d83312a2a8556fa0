"""Writes a backbone as StableHLO: a program with its weights, which JAX and XLA alone can run.

python -m convert.to_stablehlo --checkpoint WORKDIR --output model.stablehlo

It takes (B, 112, 112, 3) uint8 RGB, any B, and gives (B, D) float32, not normalised:

    program = jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
    embeddings = program.call(images)
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import tyro

from arcface_jax import errors
from arcface_jax.convert import parity
from arcface_jax.convert.packages import require
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.inference.open_model import ModelChoice, open_network
from arcface_jax.training import step
from arcface_jax.training.network import Network

PLATFORMS = ("cpu", "cuda")
# The serialised form is a flat buffer, which has less than 2 GiB.
_LARGEST_FILE = 1_900_000_000


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    model: Annotated[ModelChoice, tyro.conf.arg(name="")]
    output: Path
    """The file to write."""


def export(embedder: Network, output: Path) -> float:
    """Writes the file after it was read again and gave the same embeddings at batch 1 and 3.

    Returns:
      The largest relative difference of the embeddings.

    Raises:
      UserError: the network is too large for the format, the embeddings differ, or the file cannot
        be written.
    """
    arrays = [np.asarray(a) for a in (*embedder.params.values(), *embedder.batch_stats.values())]
    if sum(array.nbytes for array in arrays) > _LARGEST_FILE:
        raise errors.UserError(
            f"{embedder.network} has more than 1.9 GB of weights, too many for a StableHLO file: "
            "use python -m convert.to_onnx, which puts them into a file of their own"
        )
    weights = jax.tree.map(np.asarray, (embedder.params, embedder.batch_stats))
    # Without a device of its own, or the program would be for that device alone.
    embed = partial(step.make_embed(embedder.backbone), *weights)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.uint8)
    require("flatbuffers")  # JAX's own need
    exported = jax.export.export(jax.jit(embed), platforms=PLATFORMS)(images)
    content = exported.serialize()
    error = _check(content, embedder)
    part = output.with_name(output.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(output)
    except OSError as reason:
        raise errors.UserError(f"cannot write {output}: {reason.strerror}") from reason
    return error


def _check(content: bytearray, embedder: Network) -> float:
    program = jax.export.deserialize(content)
    faces = parity.drawn_faces()
    reference = embedder(faces)
    return max(
        parity.require_equal(
            np.asarray(program.call(faces[:batch])),
            reference[:batch],
            what="StableHLO program",
            bound=parity.TOLERANCE,
        )
        for batch in (1, 3)
    )


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(
        Arguments, args=argv, prog="python -m convert.to_stablehlo", description=__doc__
    )
    with errors.reported():
        error = export(open_network(arguments.model), arguments.output)
    print(f"{arguments.output}: embeddings differ from those of JAX by {error:.1e} (relative)")
    print("RESULT " + json.dumps({"parity": error, "files": [str(arguments.output)]}))


if __name__ == "__main__":
    main(sys.argv[1:])
