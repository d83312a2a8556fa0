"""A small network as its users have it, and pairs of faces to verify."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_jax import config as configs
from arcface_jax.convert import parity
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.training import checkpoint


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir of r_tiny whose statistics are those of drawn faces."""
    params, batch_stats = parity.settled("r_tiny", parity.drawn_faces())
    path = tmp_path_factory.mktemp("exports") / "W"
    config = configs.replace(configs.Config(), workdir=str(path), model__network="r_tiny")
    checkpoint.save_weights(config, params, batch_stats)
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verification set of ten same and ten different pairs of drawn people."""
    path = tmp_path_factory.mktemp("pairs") / "few.bin"
    same = [True, False] * 10
    faces = [
        draw_face(seed=3, identity=pair + (side and not alike), index=side)
        for pair, alike in enumerate(same)
        for side in range(2)
    ]
    images = [cv2.imencode(".png", face[:, :, ::-1])[1].tobytes() for face in faces]
    path.write_bytes(pickle.dumps((images, same)))
    return path


@pytest.fixture(scope="session")
def faces() -> np.ndarray:
    """(16, 112, 112, 3) uint8 RGB."""
    return parity.drawn_faces()
