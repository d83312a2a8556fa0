"""Whether two networks give the same embeddings."""

import numpy as np
import torch

from arcface_jax import models, preprocess
from arcface_jax.data import synthetic
from arcface_jax.errors import UserError
from arcface_jax.network import Network
from convert import twins
from convert.weights import StateDict

TOLERANCE = 1e-4
_FACES = 16


def torch_embeddings(module: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """(n, 112, 112, 3) uint8 RGB to (n, D) float32, by a torch network in evaluation mode."""
    x = torch.from_numpy(np.array(images, np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return module.eval()((x - preprocess.MEAN) / preprocess.SCALE).numpy()


def largest_error(embeddings: np.ndarray, reference: np.ndarray) -> float:
    """The largest ||a - b|| / ||b|| over the rows; infinite where anything is not finite."""
    if not (np.isfinite(embeddings).all() and np.isfinite(reference).all()):
        return float("inf")
    error = np.linalg.norm(embeddings - reference, axis=1) / np.linalg.norm(reference, axis=1)
    return float(error.max())


def check(embedder: Network, state: StateDict, *, network: str) -> float:
    """Loads a state_dict strictly into the torch twin and compares the embeddings of drawn faces.

    Returns:
      The largest relative error.

    Raises:
      UserError: it exceeds 1e-4.
    """
    module = twins.build(network, embedding_size=models.embedding_size(state) or 0)
    module.load_state_dict(state, strict=True)
    images = np.stack([synthetic.draw_face(seed=1, identity=i, index=0) for i in range(_FACES)])
    error = largest_error(torch_embeddings(module, images), embedder(images))
    if not error <= TOLERANCE:
        raise UserError(
            f"the torch network's embeddings differ by {error:.1e} (relative) from the JAX "
            "network's, more than "
            f"{TOLERANCE:.0e}: nothing was written. Fresh BatchNorm statistics overflow deep "
            "networks: export "
            f"weights that were trained"
        )
    return error
