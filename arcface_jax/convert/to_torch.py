"""Writes the backbone of a training run for PyTorch.

python -m convert.to_torch --checkpoint WORKDIR --output backbone.pth
python -m convert.to_torch --checkpoint WORKDIR --output backbone.safetensors
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from arcface_jax import errors
from arcface_jax.convert import parity, twins, weight_files, weights
from arcface_jax.training.network import Network


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    checkpoint: Path
    """WORKDIR of a training run; its newest checkpoint is exported."""
    output: Path
    """The file to write: .pth, or .safetensors."""


def export(workdir: Path, output: Path) -> float:
    """Writes the newest backbone of a run as a state_dict with insightface's names.

    The file is written only after its embeddings have been found equal to the JAX network's.

    Returns:
      The largest relative difference of the embeddings.

    Raises:
      UserError: the workdir cannot be read, the network has no torch twin, the embeddings differ,
        or the file cannot be written.
    """
    embedder = Network.from_workdir(workdir, devices="own")  # another process may be gone
    twins.require(embedder.network)
    state = weights.to_state_dict(embedder.params, embedder.batch_stats)
    error = parity.check(embedder, state, network=embedder.network)
    weight_files.write(output, state)
    return error


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(
        Arguments, args=argv, prog="python -m convert.to_torch", description=__doc__
    )
    with errors.reported():
        error = export(arguments.checkpoint, arguments.output)
    print(f"{arguments.output}: embeddings equal those of JAX to {error:.1e} (relative)")
    print("RESULT " + json.dumps({"parity": error, "files": [str(arguments.output)]}))


if __name__ == "__main__":
    main(sys.argv[1:])
