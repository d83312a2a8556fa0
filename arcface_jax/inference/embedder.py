"""Inference as a library: faces in, embeddings, similarities and decisions out."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from arcface_jax.data import faces as face_inputs
from arcface_jax.data.faces import Faces, OtherSize
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation import calibration
from arcface_jax.evaluation.calibration import Calibration
from arcface_jax.evaluation.embed import Model
from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.inference import bulk
from arcface_jax.models import preprocess
from arcface_jax.training.network import Network

Points = np.ndarray | Sequence[np.ndarray | None]
"""(5, 2) for one face, (n, 5, 2), or a list with None for faces that are aligned."""


class Verdict(NamedTuple):
    """Whether pairs of faces show one person each."""

    same: np.ndarray
    """(n,) bool: score >= threshold."""
    score: np.ndarray
    """(n,) float32 cosines."""
    threshold: float


class Embedder:
    """A trained network that takes faces in any form; all its embeddings can be compared.

    `Embedder("runs/demo")(["a.jpg", "b.jpg"])` gives (2, D) float32 embeddings of length 1.

    Args:
      model: the workdir of a training run, or a network that is open already, such as
        `arcface_jax.inference.open_model.open_model` makes of a `.pth` or `.onnx` file.
      flip: add the embedding of the mirrored face, as verification does; takes twice the time.
      other_size: what becomes of images that are not 112 x 112 and come without points.
      batch_size: images per forward pass.
      devices: how many devices of this machine share a batch, if `model` is a workdir; all when
        not given.

    Raises:
      CheckpointError: the workdir holds no checkpoint.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        flip: bool = False,
        other_size: OtherSize = "refuse",
        batch_size: int = 64,
        devices: int | None = None,
    ):
        if isinstance(model, str | Path):
            model = Network.from_workdir(model, batch_size=batch_size, devices=devices)
        self.model: Model = model
        self.flip = flip
        self.other_size: OtherSize = other_size
        self.batch_size = batch_size
        self._warned_of_colors = False

    def __call__(
        self, faces: Faces, *, points: Points | None = None, normalized: bool = True
    ) -> np.ndarray:
        """Embeds any number of faces.

        Args:
          faces: one image (H, W, 3), several (n, H, W, 3), uint8 RGB; a file; or a list of these.
          points: five points a face, by which it is aligned; without them faces are aligned ones.
          normalized: whether the embeddings are of length 1, or as the network gives them.

        Returns:
          (n, D) float32.

        Raises:
          DataError: a face is no such image, or an embedding is not finite.

        Warns:
          UserWarning: once, where red and blue seem to be exchanged.
        """
        listed = face_inputs.each(faces)
        chosen = face_inputs.each_points(points, len(listed))
        if not len(listed):
            raise DataError("there are no faces to embed: give one at least")
        parts = []
        for start in range(0, len(listed), self.batch_size):
            part = slice(start, start + self.batch_size)
            pairs = zip(listed[part], chosen[part], strict=True)
            ready = [face_inputs.prepare(f, p, other_size=self.other_size) for f, p in pairs]
            parts.append(self.embed_aligned(np.stack(ready), normalized=normalized))
        return np.concatenate(parts)

    def embed_aligned(self, images: np.ndarray, *, normalized: bool = True) -> np.ndarray:
        """The same for (n, 112, 112, 3) uint8 RGB alone, n at least 1."""
        if not self._warned_of_colors and preprocess.looks_bgr(images):
            self._warned_of_colors = True
            warnings.warn(
                f"of {len(images)} faces nearly all have more blue than red in the middle, as if "
                "they were BGR; RGB was expected: OpenCV's cv2.imread gives BGR, turn it with "
                "cv2.cvtColor(image, cv2.COLOR_BGR2RGB) or image[..., ::-1]",
                stacklevel=3,
            )
        embeddings = self.model(images)
        if self.flip:
            embeddings = embeddings + self.model(images[:, :, ::-1])
        if not np.isfinite(embeddings).all():
            raise DataError("the network's embeddings are not finite: its weights are damaged")
        return normalize(embeddings) if normalized else embeddings

    def similarity(
        self, a: Faces, b: Faces, *, between: Literal["all", "pairs"] = "all"
    ) -> np.ndarray:
        """Cosines of faces, the higher the more alike.

        Args:
          a: n faces as the call takes them, or embeddings (n, D) float.
          b: m faces or embeddings.
          between: `all` compares each of a with each of b, `pairs` the i-th with the i-th.

        Returns:
          (n, m) float32, or (n,) for pairs.

        Raises:
          DataError: as the call, or pairs of unlike numbers.
        """
        first, second = self._embeddings(a), self._embeddings(b)
        if between == "all":
            return first @ second.T
        if len(first) != len(second):
            raise DataError(f"{len(first)} faces and {len(second)} make no pairs: give as many")
        return np.einsum("nd,nd->n", first, second)

    def verify(self, a: Faces, b: Faces, *, threshold: float | str | Path | Calibration) -> Verdict:
        """Whether the i-th face of a and the i-th of b show one person.

        Args:
          a: n faces or embeddings, as `similarity` takes them.
          b: as many.
          threshold: the lowest cosine that counts as the same; or a calibration, or its JSON file.

        Raises:
          UserError: the calibration is of another model, or of faces embedded in another way.
          DataError: as `similarity`.
        """
        if isinstance(threshold, str | Path):
            threshold = calibration.read(Path(threshold))
        if isinstance(threshold, Calibration):
            self._check(threshold)
            threshold = threshold.threshold_cosine
        score = self.similarity(a, b, between="pairs")
        return Verdict(score >= threshold, score, float(threshold))

    def embed_folder(
        self,
        folder: str | Path,
        output: str | Path,
        *,
        shard_size: int = 10_000,
        points: Mapping[str, np.ndarray] | None = None,
        normalized: bool = True,
    ) -> bulk.Summary:
        """Embeds every image below a folder into shards of files, see `bulk.embed_folder`."""
        return bulk.embed_folder(
            self,
            Path(folder),
            Path(output),
            shard_size=shard_size,
            points=points,
            normalized=normalized,
        )

    def _embeddings(self, faces: Faces) -> np.ndarray:
        if isinstance(faces, np.ndarray) and faces.ndim == 2:
            return normalize(faces)
        return self(faces)

    def _check(self, threshold: Calibration) -> None:
        model = self.model.digest()
        if threshold.model != model:
            raise UserError(
                f"the calibration is of another model (SHA-256 {threshold.model[:12]}..., this one "
                f"is {model[:12]}...): thresholds do not transfer between models; make one with "
                "`arcface-jax calibrate`"
            )
        if threshold.flip != self.flip:
            raise UserError(
                f"the calibration was made with flip={threshold.flip}, these embeddings with "
                f"flip={self.flip}: use one for both"
            )
