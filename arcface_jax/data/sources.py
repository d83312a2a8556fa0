"""Training sets, all with one interface: how many identities, and labelled images by number."""

from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from arcface_jax.config import DataConfig
from arcface_jax.data import synthetic
from arcface_jax.data.recordio import RecordReader
from arcface_jax.errors import DataError
from arcface_jax.models import IMAGE_SIZE

SYNTHETIC = "synthetic"


class Source(Protocol):
    """Random access to labelled face images; safe to read from many threads."""

    num_classes: int
    """Identities; labels are 0 .. num_classes - 1."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(112, 112, 3) uint8 RGB and its label.

        Raises:
          DataError: the image cannot be read, or its label is out of range.
        """
        ...


def open_source(data: DataConfig, *, seed: int) -> Source:
    """Finds out what lies at `data.path` and opens it.

    Raises:
      DataError: nothing is there, or nothing that is known.
    """
    if data.path == SYNTHETIC:
        return SyntheticSource(
            seed=seed,
            identities=data.synthetic.identities,
            images_per_identity=data.synthetic.images_per_identity,
        )
    folder = Path(data.path)
    if not folder.exists():
        raise DataError(
            f"data.path {folder} does not exist: set --data.path to a folder with train.rec"
        )
    if not folder.is_dir():
        raise DataError(
            f"data.path {folder} is a file: set --data.path to the folder that holds it"
        )
    if not any((folder / name).is_file() for name in ("train.rec", "train.idx")):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise DataError(
            f"data.path {folder} has neither train.rec nor train.idx (it holds: {found}): point "
            "--data.path "
            f"to a folder with both, as insightface's data sets come"
        )
    return RecordSource(folder / "train.rec")


class RecordSource:
    """A `train.rec` with its `train.idx`, with insightface's identity header or without.

    With the header, record 0 has the labels [first identity record, end]: images are the keys
    below the first, and there are as many identities as records behind it. Without it every record
    is an image.
    """

    def __init__(self, rec: Path):
        self._reader = RecordReader(rec)
        keys = self._reader.keys
        labels = self._reader.read(int(keys[0])).label
        if isinstance(labels, np.ndarray) and keys[0] == 0 and len(labels) == 2:
            first, end = (float(label) for label in labels)
            self._keys = keys[(keys > 0) & (keys < first)]
            whole = first.is_integer() and end.is_integer()
            if not (whole and first < end and self._keys.size):
                raise DataError(
                    f"{rec}, record 0: the header [{first}, {end}] is not [first identity record, "
                    "end], whole numbers with images below the first; make the file anew"
                )
            self.num_classes = int(end - first)
        else:
            self._keys = keys
            labels = (self._label(self._reader.read_label(int(key)), int(key)) for key in keys)
            self.num_classes = 1 + max(labels)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        key = int(self._keys[index])
        record = self._reader.read(key)
        label = self._label(record.label, key)
        if label >= self.num_classes:
            raise DataError(
                f"{self._reader.path}, record {key}: label {label} is outside the "
                f"{self.num_classes} identities "
                f"(0 .. {self.num_classes - 1}) that the file's header announces: the header or "
                "the labels are "
                f"wrong; make the file anew"
            )
        return decode(record.data, where=f"{self._reader.path}, record {key}"), label

    def _label(self, label: float | np.ndarray, key: int) -> int:
        """insightface stores one label, or several of which the first is the identity."""
        number = float(label[0] if isinstance(label, np.ndarray) else label)
        if number < 0 or not number.is_integer():
            raise DataError(
                f"{self._reader.path}, record {key}: label {number} is not an identity: labels "
                "are whole "
                f"numbers from 0; make the file anew with labels counted from 0"
            )
        return int(number)


class SyntheticSource:
    """Drawn faces: `images_per_identity` of each of the identities 0 .. identities - 1."""

    def __init__(self, *, seed: int, identities: int, images_per_identity: int):
        self.num_classes = identities
        self._seed = seed
        self._each = images_per_identity

    def __len__(self) -> int:
        return self.num_classes * self._each

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        identity, image = divmod(index, self._each)
        return synthetic.draw_face(seed=self._seed, identity=identity, index=image), identity


def decode(data: bytes, *, where: str) -> np.ndarray:
    """An encoded image as (112, 112, 3) uint8 RGB.

    Args:
      data: JPEG, PNG, or what else OpenCV reads.
      where: what the image is, for the error message.

    Raises:
      DataError: it cannot be decoded, or has another size.
    """
    image = decode_any_size(data, where=where)
    if image.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        raise DataError(
            f"{where}: the image is {image.shape[1]} x {image.shape[0]} pixels, training takes "
            "faces aligned "
            f"to {IMAGE_SIZE} x {IMAGE_SIZE}: align and crop the images first"
        )
    return image


def decode_any_size(data: bytes, *, where: str) -> np.ndarray:
    """An encoded image as (H, W, 3) uint8 RGB.

    Raises:
      DataError: it cannot be decoded.
    """
    buffer = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB) if buffer.size else None
    except cv2.error:  # for instance a damaged header that announces a billion pixels
        image = None
    if image is None:
        raise DataError(f"{where}: {len(data)} bytes that are not an image; remove or replace it")
    return image
