"""Makes a workdir of a released backbone, to evaluate, export or begin a training from.

python -m convert.from_torch --weight backbone.pth --network r50 --output WORKDIR
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import tyro

from arcface_jax import config, errors
from arcface_jax.convert import centers as center_files
from arcface_jax.convert import parity, weight_files, weights
from arcface_jax.models import registry
from arcface_jax.training import checkpoint
from arcface_jax.training.network import Network


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    weight: Path
    """A .pth, .pt or .safetensors file of insightface's names, or a checkpoint that holds one."""
    network: config.Network
    """The network that the weights are of."""
    output: Path
    """The WORKDIR to make: a new or an empty folder."""
    centers: Path | None = None
    """Class centers to keep beside them: a folder of arcface_torch's head files, or a .npy."""


def convert(weight: Path, network: str, output: Path, *, centers: Path | None = None) -> float:
    """Writes a workdir after its embeddings have been found equal to the torch network's.

    Returns:
      The largest relative difference of the embeddings.

    Raises:
      UserError: the file does not hold that network, the embeddings differ, or the workdir is not
        empty.
    """
    checkpoint.require_empty(output)  # better now than after the check
    state = weights.without_prefixes(weight_files.read(weight))
    params, batch_stats = weights.from_state_dict(state, network, source=str(weight))
    size = registry.embedding_size(params) or 0
    rows = None if centers is None else center_files.read(centers).rows
    if rows is not None and rows.shape[1] != size:
        raise errors.UserError(
            f"{centers} has centers of length {rows.shape[1]}, and {weight} gives embeddings of "
            f"length {size}: they are not of one training"
        )
    embedder = Network(network, params, batch_stats, batch_size=16, devices=1)
    # The file's own tensors, but for the batch counters that those of old torch lack.
    whole = weights.to_state_dict(params, batch_stats) | state
    error = parity.check(embedder, whole, network=network)
    model = config.ModelConfig(
        network=cast(config.Network, network), embedding_size=size, dtype="float32"
    )
    made = config.Config(workdir=str(output), model=model)
    checkpoint.save_weights(made, params, batch_stats, centers=rows)
    return error


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(
        Arguments, args=argv, prog="python -m convert.from_torch", description=__doc__
    )
    with errors.reported():
        error = convert(
            arguments.weight, arguments.network, arguments.output, centers=arguments.centers
        )
    print(f"{arguments.output}: embeddings equal those of torch to {error:.1e} (relative)")
    print("RESULT " + json.dumps({"parity": error, "files": [str(arguments.output)]}))


if __name__ == "__main__":
    main(sys.argv[1:])
