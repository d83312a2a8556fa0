"""Make a workdir of a released backbone, to evaluate, export or fine-tune."""

from pathlib import Path
from typing import cast

from arcface_jax import config, errors
from arcface_jax.convert import centers as center_files
from arcface_jax.convert import parity, weight_files, weights
from arcface_jax.models import registry
from arcface_jax.training import checkpoint
from arcface_jax.training.network import Network


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
    backbone = Network(network, params, batch_stats, batch_size=16, devices=1)
    # The file's own tensors, but for the batch counters that those of old torch lack.
    whole = weights.to_state_dict(params, batch_stats) | state
    error = parity.check(backbone, whole, network=network)
    model = config.ModelConfig(
        network=cast(config.Network, network), embedding_size=size, dtype="float32"
    )
    made = config.Config(workdir=str(output), model=model)
    checkpoint.save_weights(made, params, batch_stats, centers=rows)
    return error
