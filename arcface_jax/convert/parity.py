"""Check that two networks compute the same embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from arcface_jax.convert import twins
from arcface_jax.convert.weights import StateDict
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.errors import UserError
from arcface_jax.models import layers, preprocess, registry
from arcface_jax.models.registry import Arrays
from arcface_jax.training.network import Network

TOLERANCE = 1e-4
_FACES = 16
_FACTORS = ("gamma", "gamma_xca", "temperature")


def torch_embeddings(module: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Embeds (n, 112, 112, 3) uint8 RGB as (n, D) float32 by a torch network in evaluation mode."""
    x = torch.from_numpy(np.array(images, np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return module.eval()((x - preprocess.MEAN) / preprocess.SCALE).numpy()


def largest_error(embeddings: np.ndarray, reference: np.ndarray) -> float:
    """Returns the largest ||a - b|| / ||b|| over the rows; infinite if anything is not finite."""
    if not (np.isfinite(embeddings).all() and np.isfinite(reference).all()):
        return float("inf")
    error = np.linalg.norm(embeddings - reference, axis=1) / np.linalg.norm(reference, axis=1)
    return float(error.max())


def settled(network: str, faces: np.ndarray, *, seed: int = 0) -> tuple[Arrays, Arrays]:
    """Makes fresh weights of a network, with BatchNorm statistics of one training pass over faces.

    With initial statistics, or running ones after a single step, networks of a hundred layers
    overflow. Layer-scale factors, which start so close to 0 that embeddings would not depend on the
    branches, are drawn from [0.5, 1.5).

    Args:
      network: a name in `arcface_jax.models.registry.NETWORKS`.
      faces: (n, 112, 112, 3) uint8 RGB.
      seed: random seed of the weights.

    Returns:
      params, batch_stats.
    """
    backbone = registry.build(network)
    params, batch_stats = backbone.init(seed)
    drawn = np.random.default_rng(seed)
    for name, array in params.items():
        if name.rpartition(".")[2] in _FACTORS:
            params[name] = drawn.uniform(0.5, 1.5, array.shape).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), len(faces))

    @jax.jit
    def train(params, batch_stats, images):
        x = preprocess.normalize(images)
        return backbone.apply(params, batch_stats, x, train=True, keys=keys)[1]

    moved = train(params, batch_stats, jnp.asarray(faces))
    return params, {
        name: before + (np.asarray(moved[name]) - before) / layers.BatchNorm.momentum
        for name, before in batch_stats.items()
    }


def drawn_faces(count: int = _FACES) -> np.ndarray:
    """Returns (count, 112, 112, 3) uint8 RGB, one synthetic face per person."""
    return np.stack([draw_face(seed=1, identity=i, index=0) for i in range(count)])


def check(model: Network, state: StateDict, *, network: str) -> float:
    """Loads a state_dict strictly into the torch twin and compares embeddings of synthetic faces.

    Returns:
      Largest relative error.

    Raises:
      UserError: the error exceeds 1e-4.
    """
    module = twins.load(network, state, embedding_size=model.embedding_size)
    images = drawn_faces()
    return require_equal(
        torch_embeddings(module, images), model(images), what="torch network", bound=TOLERANCE
    )


def require_finite(model: Network) -> None:
    """Checks that a network's weights are finite before an export.

    Raises:
      UserError: with the number of arrays that are not finite, and the first of them.
    """
    arrays = {**model.params, **model.batch_stats}
    broken = [name for name, array in arrays.items() if not np.isfinite(np.asarray(array)).all()]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(arrays)} weight arrays have values that are not finite, for "
            f"instance {broken[0]}: nothing was written. Training diverged or the file is corrupt: "
            "export an earlier checkpoint, or train with a lower --optimizer.learning-rate"
        )


def require_equal(
    embeddings: np.ndarray, reference: np.ndarray, *, what: str, bound: float
) -> float:
    """Returns the largest relative error of embeddings against the JAX network's.

    Raises:
      UserError: the error exceeds the bound.
    """
    error = largest_error(embeddings, reference)
    if not error <= bound:
        raise UserError(
            f"the {what}'s embeddings differ by {error:.1e} (relative) from the JAX network's, "
            f"more than {bound:.0e}: nothing was written. Fresh BatchNorm statistics overflow deep "
            "networks: export weights that were trained"
        )
    return error
