"""Synthetic faces that cannot be read while a file exists, as on a network drive that is gone."""

import dataclasses
import time
from pathlib import Path

import numpy as np

from arcface_jax.config import DataConfig
from arcface_jax.data import opening
from arcface_jax.data.source import Sample, Source


class StallingFaces(Source):
    """Waits before it reads an image, as long as the file exists."""

    def __init__(self, stalled: Path, faces: Source):
        self._stalled, self._faces = stalled, faces
        self.num_classes = faces.num_classes

    def __len__(self) -> int:
        return len(self._faces)

    def read(self, index: int) -> Sample:
        while self._stalled.exists():
            time.sleep(0.1)
        return self._faces.read(index)

    def labels(self) -> np.ndarray:
        return self._faces.labels()

    def where(self, index: int) -> str:
        return self._faces.where(index)


def make(stalled: str, data: DataConfig, *, seed: int) -> StallingFaces:
    """Opens `--data.path tests.support.stalling_faces:make:FILE`."""
    faces = opening.open_source(dataclasses.replace(data, path="synthetic"), seed=seed)
    return StallingFaces(Path(stalled), faces)
