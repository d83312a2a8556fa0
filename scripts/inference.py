"""Prints the embedding of one aligned face.

python scripts/inference.py --weight backbone.pth --network r50 --img face.jpg
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tyro

from arcface_jax import errors
from arcface_jax.data import sources
from arcface_jax.models import IMAGE_SIZE
from arcface_jax.network import Network
from convert import weights


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    weight: Path
    """A backbone.pth, of this project or of insightface."""
    network: str = "r50"
    """The network that the weights are of."""
    img: Path | None = None
    """An aligned face, any format that OpenCV reads; seeded noise when not given."""


def read_image(path: Path | None) -> np.ndarray:
    """(112, 112, 3) uint8 RGB."""
    if path is None:
        print("no --img was given: embedding a seeded noise image", file=sys.stderr)
        return np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    if not path.is_file():
        raise errors.UserError(f"no image at {path}: name an existing file with --img")
    image = sources.decode_any_size(path.read_bytes(), where=str(path))
    if image.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        size = f"{image.shape[1]} x {image.shape[0]}"
        print(
            f"{path} is {size}, resized to 112 x 112; the network expects aligned faces",
            file=sys.stderr,
        )
    return cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE))


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="inference.py", description=__doc__)
    with errors.reported():
        params, batch_stats = weights.load(arguments.weight, arguments.network)
        image = read_image(arguments.img)
        embedder = Network(arguments.network, params, batch_stats, batch_size=1, devices=1)
        embedding = embedder(image[None])
    np.set_printoptions(threshold=sys.maxsize, linewidth=100, precision=6, suppress=True)
    print(embedding)
    norm = float(np.linalg.norm(embedding))
    print("RESULT " + json.dumps({"shape": list(embedding.shape), "norm": norm, "files": []}))


if __name__ == "__main__":
    main(sys.argv[1:])
