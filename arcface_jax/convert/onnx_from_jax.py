"""Export a network without a torch twin to ONNX, with the package jax2onnx."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arcface_jax.convert.packages import require
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import UserError
from arcface_jax.models import preprocess
from arcface_jax.training.network import Network

EXTRA = "jax2onnx"
# jax2onnx is written for this version and uses its operators whatever version is requested.
OPSET = 23


def write(path: Path, model: Network, *, inside: bool, names: tuple[str, str, str]) -> None:
    """Writes the float32 graph of a network.

    Args:
      path: the file to write.
      model: the network.
      inside: whether the graph normalizes pixels of 0 .. 255; otherwise it takes [-1, 1].
      names: names of the input (batch, 3, 112, 112), the output (batch, D), and the batch
          dimension.

    Raises:
      UserError: jax2onnx is not installed, or cannot translate an operation of the network.
    """
    given, out, batch = names
    weights = jax.tree.map(np.asarray, (model.params, model.batch_stats))

    def embed(x: jax.Array) -> jax.Array:
        if inside:  # clients detect normalization by this subtraction and product
            x = (x - preprocess.MEAN) * (1 / preprocess.SCALE)
        x = jnp.transpose(x, (0, 2, 3, 1))
        return model.backbone.apply(*weights, x, train=False)[0]

    with _lenient():
        convert: Any = require("jax2onnx", extra=EXTRA).to_onnx
        try:
            convert(
                embed,
                [(batch, 3, IMAGE_SIZE, IMAGE_SIZE)],
                model_name=model.network,
                opset=OPSET,
                input_names=[given],
                output_names=[out],
                return_mode="file",
                output_path=str(path),
            )
        except Exception as error:  # the package raises many types of exceptions
            raise UserError(
                f"jax2onnx cannot translate {model.network}: {error}. Write that part of the "
                "network with other operations, give it a torch twin (docs/extending.md), or "
                "export StableHLO"
            ) from error


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """Adapts JAX to jax2onnx's expectations.

    It adds arrays of different ranks, drops an operation whose import gives a warning, and logs
    a traceback for each optional package that this JAX is too new for.
    """
    logger = logging.getLogger("jax2onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
