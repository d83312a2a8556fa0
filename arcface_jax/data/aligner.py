"""Turn any image into an aligned face: by given points, by a detector, or as it is.

Embedding, verification, calibration and evaluation share it, so embeddings of different commands
are comparable.
"""

from pathlib import Path

import numpy as np

from arcface_jax.config.choices import AlignOptions, FaceChoice
from arcface_jax.data import detectors, faces
from arcface_jax.data.detectors import Detector
from arcface_jax.data.faces import Face, OtherSize


class Aligner:
    """Aligns one image after another; safe to call from threads.

    Args:
      detector: finds the points of images that are not 112 x 112 and have no given points: an ONNX
        file of the SCRFD or YuNet kind, `module:function`, or a function of
        `arcface_jax.data.detectors`.
      choose: which face of an image the detector takes.
      detector_size: as `detectors.load`.
      other_size: what to do with such images without a detector.

    Raises:
      UserError: the detector does not exist or cannot be opened.
    """

    def __init__(
        self,
        detector: str | Path | Detector | None = None,
        *,
        choose: FaceChoice = "auto",
        detector_size: int = 0,
        other_size: OtherSize = "refuse",
    ):
        self._detector = detector
        self._choose: FaceChoice = choose
        self._size = detector_size
        self._other_size: OtherSize = other_size
        if isinstance(detector, str | Path):
            detector = detectors.load(str(detector), size=detector_size)
        self._detect: Detector | None = detector

    def __call__(
        self,
        face: Face,
        points: np.ndarray | None = None,
        *,
        where: str | None = None,
        in_identity_folder: bool = False,
    ) -> np.ndarray:
        """Reads and aligns one image.

        Args:
          face: the image; one of 112 x 112 without points counts as aligned.
          points: (5, 2), if known.
          where: the image's name for errors; by default its file.
          in_identity_folder: as `detectors.choose`.

        Returns:
          (112, 112, 3) uint8 RGB.

        Raises:
          DataError: it is not an image, shows no face, or is not aligned and there are neither
            points nor a detector.
        """

        def find(image: np.ndarray, name: str) -> np.ndarray:
            assert self._detect is not None  # only called with a detector
            found = self._detect(image)
            number = detectors.choose(
                found,
                image.shape,
                self._choose,
                where=name,
                in_identity_folder=in_identity_folder,
            )
            return found.points[number]

        return faces.prepare(
            face,
            points,
            other_size=self._other_size,
            find_points=None if self._detect is None else find,
            where=where,
        )

    @property
    def detects(self) -> bool:
        """Whether it has a detector."""
        return self._detect is not None

    def settings(self) -> dict[str, str]:
        """The settings that determine the aligned faces, to be stored with their embeddings."""
        if self._detector is None:
            return {"other_size": self._other_size}
        name = detectors.identity(self._detector)
        found = {"other_size": self._other_size, "detector": name, "choose": self._choose}
        return found | ({"detector_size": str(self._size)} if self._size else {})


def of_options(options: AlignOptions) -> Aligner:
    """Opens a command's aligner, which refuses images that it cannot align."""
    return Aligner(options.detector, choose=options.choose, detector_size=options.detector_size)


_CHOICES = {
    "auto": "nearest to the center in an identity's folder, otherwise the largest",
    "largest": "the largest",
    "center": "the one nearest to the center",
    "score": "the one with the highest score",
}


def in_words(choice: FaceChoice) -> str:
    """Describes the choice among several faces, for the terminal."""
    return f"faces chosen by --choose {choice}: {_CHOICES[choice]}"
