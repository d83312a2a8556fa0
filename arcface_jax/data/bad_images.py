"""Damaged images of a training set: counted, listed in a file, and too many of them an error."""

import json
from pathlib import Path

from arcface_jax import metrics
from arcface_jax.data.pipeline import BadImage
from arcface_jax.errors import CheckpointError, DataError


class BadImages:
    """Those that a run has met, one line each in WORKDIR/bad_images.jsonl; a resumed run goes on.

    Args:
      path: of the file; it is made when there is a first line for it.
      num_images: in the training set.
      max_share: of them that may be damaged.
    """

    def __init__(self, path: Path, *, num_images: int, max_share: float):
        self._path = path
        self._num_images = num_images
        self._max_share = max_share
        try:
            lines = metrics.read(path) if path.exists() else []
            self._known = {int(line["index"]) for line in lines}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot read {path}: {error!r}; remove it") from error

    def __len__(self) -> int:
        return len(self._known)

    def add(self, bad: tuple[BadImage, ...], *, step: int) -> list[BadImage]:
        """Notes those of a step; returns the ones that were not known.

        Raises:
          DataError: more than the allowed share of the training set is damaged.
        """
        unknown = {image.index: image for image in bad if image.index not in self._known}
        new = list(unknown.values())
        if not new:
            return new
        with self._path.open("a") as file:
            for image in new:
                file.write(json.dumps({"step": step, **image._asdict()}) + "\n")
        self._known.update(unknown)
        if len(self._known) > self._max_share * self._num_images:
            last = new[-1]
            raise DataError(
                f"{len(self._known)} of {self._num_images} training images cannot be read, more "
                f"than data.max_bad_share {self._max_share} allows; the last: {last.where}: "
                f"{last.problem}. {self._path} lists them: mend or remove them, or allow more with "
                "--data.max-bad-share"
            )
        return new
