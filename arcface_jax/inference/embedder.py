"""Embed, compare and search faces with a trained network."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from arcface_jax.config.choices import FaceChoice, Which
from arcface_jax.data import colors
from arcface_jax.data import faces as face_inputs
from arcface_jax.data.aligner import Aligner
from arcface_jax.data.detectors import Detector
from arcface_jax.data.faces import Face, Faces, OtherSize
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation import calibration, embed
from arcface_jax.evaluation.calibration import Calibration
from arcface_jax.evaluation.embed import Model
from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.inference import bulk, gallery, open_model
from arcface_jax.inference.gallery import Gallery, Matches

Points = np.ndarray | Iterable[np.ndarray | None]
"""(5, 2) for one face, (n, 5, 2), or an iterable with None for faces that are aligned."""


class Verdict(NamedTuple):
    """Result of verifying n pairs of faces."""

    same: np.ndarray
    """(n,) bool: score >= threshold."""
    score: np.ndarray
    """(n,) float32 cosines."""
    threshold: float
    verdict: np.ndarray
    """(n,) strings: same, other, or check if the score is between the thresholds."""
    threshold_check: float | None = None
    """The lower threshold; None if there is only one."""


class Embedder:
    """A trained network that embeds faces in any form; all its embeddings are comparable.

    `Embedder("runs/demo")(["a.jpg", "b.jpg"])` returns (2, D) float32 embeddings of length 1.

    Args:
      model: the workdir of a training run, a hub folder, a file of weights (`.pth`,
        `.safetensors`), an ONNX file, or an open network.
      network: the network of a file of weights; by default detected from the arrays.
      step: which checkpoint of a workdir.
      flip: add the embedding of the mirrored face, as verification does; doubles the time.
      other_size: what to do with images that are not 112 x 112 and have no points.
      detector: finds the points of images that are not 112 x 112 and have none: an SCRFD or YuNet
        ONNX file, `module:function`, or a function of `arcface_jax.data.detectors`. 112 x 112
        images still count as aligned.
      choose: which face to take if an image has several; auto is the largest, and in `embed_folder`
        the one nearest to the center for images in sub-folders.
      detector_size: longer side in pixels at which the detector sees an image; 0 for 1280 (YuNet)
        or 640 (SCRFD).
      batch_size: images per forward pass.
      devices: how many devices of this machine share a batch; by default all.

    Raises:
      UserError: the model or detector does not exist or cannot be opened, an option does not apply
        to this kind of model, or the batch size is below 1.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        network: str | None = None,
        step: Which = "latest",
        flip: bool = False,
        other_size: OtherSize = "refuse",
        detector: str | Path | Detector | None = None,
        choose: FaceChoice = "auto",
        detector_size: int = 0,
        batch_size: int = 64,
        devices: int | None = None,
    ):
        if isinstance(model, str | Path):
            model = open_model.open_path(
                model, network=network, step=step, batch_size=batch_size, devices=devices
            )
        embed.check_batch_size(batch_size)
        self.model: Model = model
        self.flip = flip
        self.batch_size = batch_size
        self._aligner = Aligner(
            detector, choose=choose, detector_size=detector_size, other_size=other_size
        )
        self._warned_of_colors = False

    def __call__(
        self, faces: Faces, *, points: Points | None = None, normalized: bool = True
    ) -> np.ndarray:
        """Embeds any number of faces.

        Args:
          faces: one image (H, W, 3), several (n, H, W, 3), uint8 RGB; a file; a PIL image; or an
            iterable of these, such as a generator, which is consumed batch by batch.
          points: five points per face, to align it by.
          normalized: whether to scale the embeddings to length 1.

        Returns:
          (n, D) float32.

        Raises:
          DataError: a face is not such an image, or an embedding is not finite.

        Warns:
          UserWarning: once, if red and blue seem to be exchanged.
        """
        parts = list(self.stream(faces, points=points, normalized=normalized))
        if not parts:
            raise DataError("no faces given: pass at least one")
        return np.concatenate(parts)

    def stream(
        self, faces: Faces, *, points: Points | None = None, normalized: bool = True
    ) -> Iterator[np.ndarray]:
        """Embeds faces batch by batch, with at most `batch_size` of them in memory.

        Args:
          faces: as in `__call__`.
          points: as in `__call__`.
          normalized: as in `__call__`.

        Yields:
          (b, D) float32, b at most `batch_size`.
        """
        pairs = face_inputs.with_points(faces, points)
        while batch := list(islice(pairs, self.batch_size)):
            images = np.stack([self.prepare(face, five) for face, five in batch])
            yield self.embed_aligned(images, normalized=normalized)

    def prepare(
        self, face: Face, points: np.ndarray | None = None, *, in_identity_folder: bool = False
    ) -> np.ndarray:
        """Reads and aligns one face: (112, 112, 3) uint8 RGB. Safe to call from threads.

        Args:
          face: the image.
          points: (5, 2), if known.
          in_identity_folder: as `Aligner.__call__`.

        Raises:
          DataError: it is not an image, shows no face, or is not aligned and there are neither
            points nor a detector.
        """
        return self._aligner(face, points, in_identity_folder=in_identity_folder)

    def alignment(self) -> dict[str, str]:
        """The settings that `prepare` depends on: `other_size`, or the detector and choice of
        face.
        """
        return self._aligner.settings()

    def embed_aligned(self, images: np.ndarray, *, normalized: bool = True) -> np.ndarray:
        """Embeds aligned faces, without `prepare`.

        Args:
          images: (n, 112, 112, 3) uint8 RGB, n at least 1.
          normalized: whether to scale the embeddings to length 1.

        Returns:
          (n, D) float32.

        Raises:
          DataError: an embedding is not finite.
        """
        if not self._warned_of_colors and colors.looks_bgr(images):
            self._warned_of_colors = True
            warnings.warn(
                f"input looks like BGR (nearly all of {len(images)} faces are bluer than red), and "
                "RGB is expected: OpenCV's cv2.imread gives BGR, convert it with "
                "cv2.cvtColor(image, cv2.COLOR_BGR2RGB) or image[..., ::-1]",
                stacklevel=4,
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
        """Returns cosines of faces; higher is more similar.

        Args:
          a: n faces as in `__call__`, or embeddings (n, D) float.
          b: m faces or embeddings.
          between: `all` compares each of a with each of b, `pairs` the i-th with the i-th.

        Returns:
          (n, m) float32, or (n,) for pairs.

        Raises:
          DataError: as `__call__`, or pairs with different numbers of faces.
        """
        first, second = self._embeddings(a), self._embeddings(b)
        if between == "all":
            return first @ second.T
        if len(first) != len(second):
            raise DataError(f"pairs need equal lengths, got {len(first)} and {len(second)} faces")
        return np.einsum("nd,nd->n", first, second)

    def verify(self, a: Faces, b: Faces, *, threshold: float | str | Path | Calibration) -> Verdict:
        """Decides whether the i-th face of a and the i-th of b show one person.

        Args:
          a: n faces or embeddings, as in `similarity`.
          b: n faces or embeddings.
          threshold: lowest cosine of the same person; or a calibration, or its JSON file.

        Raises:
          UserError: the calibration is for another model, or for faces embedded in another way; or
            the threshold is no cosine.
          DataError: as `similarity`.
        """
        if isinstance(threshold, str | Path):
            threshold = calibration.read(Path(threshold))
        check = None
        if isinstance(threshold, Calibration):
            self._check(threshold, has_embeddings=_are_embeddings(a) or _are_embeddings(b))
            check, threshold = threshold.threshold_check, threshold.threshold_cosine
        elif not -1 <= threshold <= 1:
            raise UserError(
                f"threshold {threshold:g} is no cosine, which is -1 to 1: of a squared distance d "
                "it is 1 - d / 2"
            )
        score = self.similarity(a, b, between="pairs")
        same = score >= threshold
        below = np.where(score >= (threshold if check is None else check), "check", "other")
        return Verdict(same, score, float(threshold), np.where(same, "same", below), check)

    def build_gallery(
        self,
        folder: str | Path,
        faces: Faces,
        names: Sequence[str],
        *,
        points: Points | None = None,
        form: gallery.Form = "float32",
    ) -> Gallery:
        """Embeds faces and saves them for `search`.

        Args:
          folder: the folder to make; new or empty.
          faces: n faces as in `__call__`, or embeddings (n, D) float.
          names: n names; several faces may share one.
          points: as in `__call__`.
          form: as `gallery.build`.

        Raises:
          DataError: as `__call__`, or the numbers of faces and names differ.
          UserError: the folder is not empty, or cannot be written.
        """
        if isinstance(faces, np.ndarray) and _are_embeddings(faces):
            embeddings = faces
        else:
            embeddings = self.stream(faces, points=points)
        return gallery.build(
            folder, embeddings, names, model=self.model.input.digest, flip=self.flip, form=form
        )

    def search(self, saved: str | Path | Gallery, faces: Faces, *, k: int = 5) -> Matches:
        """Finds the k most similar faces of a gallery for each face; the search is exact.

        Args:
          saved: a gallery, or its folder.
          faces: m faces as in `__call__`, or embeddings (m, D) float.
          k: number of matches per face.

        Returns:
          Names, cosines and rows, each (m, k), the most similar first.

        Raises:
          UserError: the gallery is for another model, or for faces embedded in another way.
          DataError: as `__call__`, or the gallery is damaged.
        """
        found = saved if isinstance(saved, Gallery) else Gallery(saved)
        self._require(
            found.model,
            found.flip,
            what="gallery",
            made="`arcface-jax gallery build`",
            also=self.model.input.compatible_with,
        )
        return found.search(self._embeddings(faces), k)

    def embed_folder(
        self,
        folder: str | Path,
        output: str | Path,
        *,
        shard_size: int = 10_000,
        points: Mapping[str, np.ndarray] | None = None,
        normalized: bool = True,
    ) -> bulk.Summary:
        """Embeds every image below a folder into shards of files; rerun to resume.

        Args:
          folder: folder of images.
          output: folder for the shards, which `bulk.read` joins.
          shard_size: images per shard.
          points: (5, 2) by the image's path below the folder, for images that are not aligned.
          normalized: whether to scale the embeddings to length 1.

        Returns:
          Numbers of embedded images and of shards, and the reason for each skipped image.

        Raises:
          DataError: the folder does not exist, or has no image.
          UserError: the output was made with other settings, or cannot be written.
        """
        return bulk.embed_folder(
            self,
            Path(folder),
            Path(output),
            shard_size=shard_size,
            points=points,
            normalized=normalized,
        )

    def _embeddings(self, faces: Faces) -> np.ndarray:
        if isinstance(faces, np.ndarray) and _are_embeddings(faces):
            return normalize(faces)
        return self(faces)

    def _check(self, threshold: Calibration, *, has_embeddings: bool) -> None:
        if threshold.against and not has_embeddings:
            raise UserError(
                "the calibration is for a face against an embedding of another model (SHA-256 "
                f"{threshold.against[:12]}...): give that embedding, or calibrate without --against"
            )
        self._require(
            threshold.model, threshold.flip, what="calibration", made="`arcface-jax calibrate`"
        )

    def _require(self, model: str, flip: bool, *, what: str, made: str, also: str = "") -> None:
        """Refuses data of other weights (except `also`) or with other settings."""
        digests = (self.model.digest(), self.model.input.digest, *([also] if also else []))
        if model not in digests:
            raise UserError(
                f"the {what} is of another model (SHA-256 {model[:12]}..., this one is "
                f"{digests[0][:12]}...): thresholds and embeddings do not transfer between models; "
                f"make one with {made}"
            )
        if flip != self.flip:
            raise UserError(
                f"the {what} was made with flip={flip}, these embeddings with flip={self.flip}: "
                "use one for both"
            )


def _are_embeddings(faces: Faces) -> bool:
    """Returns whether these are (n, D) embeddings; integers are images, such as a gray one."""
    return (
        isinstance(faces, np.ndarray)
        and faces.ndim == 2
        and np.issubdtype(faces.dtype, np.floating)
    )
