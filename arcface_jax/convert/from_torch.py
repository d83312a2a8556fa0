"""Convert a released backbone to a workdir, to evaluate, export or fine-tune."""

from pathlib import Path
from typing import NamedTuple, cast

from arcface_jax import config, errors
from arcface_jax.convert import centers as center_files
from arcface_jax.convert import parity, state_dicts, weight_files, weights
from arcface_jax.convert.state_dicts import Where
from arcface_jax.training import checkpoint
from arcface_jax.training.network import Network


class Converted(NamedTuple):
    """Result of an import."""

    network: str
    error: float
    """Largest relative difference of the embeddings."""
    notes: tuple[str, ...]
    """How the weights were found, and what was ignored."""


def convert(weight: Path, where: Where, output: Path, *, centers: Path | None = None) -> Converted:
    """Writes a workdir after checking its embeddings against the torch network's.

    Args:
      weight: a file of torch or safetensors.
      where: known properties of the file; the others are detected.
      output: the workdir, a new or empty folder.
      centers: class centers to keep with it.

    Raises:
      UserError: the file has another network, the embeddings differ, or the workdir is not empty.
    """
    checkpoint.require_empty(output)  # fail before the slow check
    found = state_dicts.find(weight_files.contents(weight), where, source=str(weight))
    network = found.network
    params, batch_stats = weights.arrays_of(found)
    backbone = Network(network, params, batch_stats, batch_size=16, devices=1)
    size = backbone.embedding_size
    rows = None if centers is None else center_files.read(centers).rows
    if rows is not None and rows.shape[1] != size:
        raise errors.UserError(
            f"{centers} has centers of length {rows.shape[1]}, and {weight} has embeddings of "
            f"length {size}: they are from different training runs"
        )
    # The file's own tensors, plus the batch counters that files of old torch lack.
    whole = weights.to_state_dict(params, batch_stats) | found.state
    error = parity.check(backbone, whole, network=network)
    model = config.ModelConfig(
        network=cast(config.Network, network), embedding_size=size, dtype="float32"
    )
    made = config.Config(workdir=str(output), model=model)
    checkpoint.save_weights(made, params, batch_stats, centers=rows)
    return Converted(network, error, found.notes)
