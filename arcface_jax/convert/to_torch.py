"""Write a training run's backbone for PyTorch."""

from pathlib import Path

from arcface_jax.convert import parity, twins, weight_files, weights
from arcface_jax.evaluation import model_input
from arcface_jax.runtime.files import require_place
from arcface_jax.training.network import Network


def export(workdir: Path, output: Path) -> float:
    """Writes the newest backbone of a run as a state_dict with insightface's names.

    The file is written only after a check of its embeddings against the JAX network's.

    Returns:
      Largest relative difference of the embeddings.

    Raises:
      UserError: the workdir cannot be read, the network has no torch twin, weights are not finite,
        the embeddings differ, or the file cannot be written.
    """
    require_place(output)
    model = Network.from_workdir(workdir, devices="own")  # other processes may have ended
    twins.require(model.network)
    parity.require_finite(model)
    state = weights.to_state_dict(model.params, model.batch_stats)
    error = parity.check(model, state, network=model.network)
    metadata = {"network": model.network, model_input.METADATA_KEY: model.input.to_json()}
    weight_files.write(output, state, metadata=metadata)
    return error
