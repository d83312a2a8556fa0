"""Training sets in a `train.rec` with its `train.idx`, as insightface's data sets come."""

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from arcface_jax.data.images import pixels
from arcface_jax.data.recordio.reader import RecordReader
from arcface_jax.data.source import Sample, Source, whole_label
from arcface_jax.errors import DataError, ImageError

_INEXACT = 2**24  # from which float32 cannot tell all whole numbers apart
_SHARDS_REMEMBERED = 64  # that were asked of the system already


class RecordSource(Source):
    """A record file with insightface's identity header or without.

    With the header, record 0 has the labels [first identity record, end]: images are the keys
    below the first, and there are as many identities as records behind it. Without it every record
    is an image.

    Args:
      rec: the `.rec` file.
      shard: where not 0, records are fetched ahead in runs of this many, for `data.order shards`.
    """

    def __init__(self, rec: Path, *, shard: int = 0):
        self._reader = RecordReader(rec)
        self._shard = shard
        self._asked: list[int] = []
        self._lock = threading.Lock()
        keys = self._reader.keys
        labels = self._reader.read(int(keys[0])).label
        # Images are the records at positions first .. first + count - 1 of the ascending keys.
        if isinstance(labels, np.ndarray) and keys[0] == 0 and len(labels) == 2:
            first, end = (float(label) for label in labels)
            self._first = 1
            whole = first.is_integer() and end.is_integer()
            self._count = self._count_images(int(first)) if whole and first > 0 else 0
            if not (whole and first < end and self._count > 0):
                raise DataError(
                    f"{rec}, record 0: the header [{first}, {end}] is not [first identity record, "
                    "end], whole numbers with images below the first; make the file anew"
                )
            # float32 counts in steps of 2 and more from 2^24 on.
            exact = end < _INEXACT
            self.num_classes = int(end - first) if exact else len(keys) - 1 - self._count
        else:
            self._first, self._count = 0, len(keys)
            largest = int(self._reader.labels().max())
            if largest < 0:  # no record has a label: the first one says why
                whole_label(self._label(self._reader.read(int(keys[0])).label), where=self.where(0))
            self.num_classes = 1 + largest

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Sample:
        """The image's bytes and its label.

        Raises:
          ImageError: the record is damaged, or its label out of range.
        """
        if self._shard:
            self._fetch_ahead(index // self._shard)
        record = self._reader.read_at(self._position(index))
        label = whole_label(self._label(record.label), where=self.where(index))
        if label >= self.num_classes:
            raise ImageError(
                self.where(index),
                f"label {label} is outside the {self.num_classes} identities "
                f"(0 .. {self.num_classes - 1}) that the file's header announces: the header or "
                "the labels are wrong; make the file anew",
            )
        return Sample(record.data, label)

    def load(
        self, numbers: np.ndarray, rows: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> list[tuple[int, ImageError]]:
        """Reads and decodes many images; of what is unusual `read` is asked.

        Raises:
          DataError: the file has become shorter.
        """
        if self._shard:
            for shard in np.unique(numbers // self._shard).tolist():
                self._fetch_ahead(shard)
        encoded, given = self._reader.images(self._first + numbers)
        usual = (given >= 0) & (given < self.num_classes) & (given == np.floor(given))
        labels[rows] = np.where(usual, given, 0)
        # As little as can be between two images: other threads want Python's lock.
        for place, (row, data) in enumerate(zip(rows.tolist(), encoded, strict=True)):
            image = pixels(data)
            if image is not None and image.shape == images.shape[1:]:
                images[row] = image
            else:
                usual[place] = False
        return super().load(numbers[~usual], rows[~usual], images, labels)

    def labels(self) -> np.ndarray:
        """(len,) int32; -1 where a record is damaged, or its label out of range."""
        labels = self._reader.labels()[self._first : self._first + self._count]
        return labels if labels.max() < self.num_classes else _inside(labels, self.num_classes)

    def where(self, index: int) -> str:
        """The file and the record's key."""
        return f"{self._reader.path}, record {self._key(index)}"

    def facts(self) -> Mapping[str, int | str]:
        """The size of the record file, and digests of its index."""
        return {"form": "record file", **self._reader.facts()}

    def _position(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        return self._first + index

    def _key(self, index: int) -> int:
        return int(self._reader.keys[self._position(index)])

    def _count_images(self, first: int) -> int:
        """How many keys are in front of the first identity record."""
        keys = self._reader.keys
        position = self._reader.below(first)
        if first >= _INEXACT:
            spacing = int(np.spacing(np.float32(first)))
            position = max(1, position - spacing)
            while position < len(keys) and self._reader.read(int(keys[position])).data:
                position += 1
        return position - 1

    def _label(self, label: float | np.ndarray) -> float:
        """insightface stores one label, or several of which the first is the identity."""
        return float(label[0] if isinstance(label, np.ndarray) else label)

    def _fetch_ahead(self, shard: int) -> None:
        with self._lock:
            if shard in self._asked:
                return
            self._asked = [*self._asked[1 - _SHARDS_REMEMBERED :], shard]
        begin = self._first + shard * self._shard
        end = min(begin + self._shard, self._first + self._count)
        self._reader.will_need(np.array([begin]), np.array([end]))


def _inside(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.where(labels < num_classes, labels, np.int32(-1))
