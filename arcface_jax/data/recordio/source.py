"""Training sets in a `train.rec` with its `train.idx`, the format of insightface's data sets."""

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from arcface_jax.data import formats, names
from arcface_jax.data.images import pixels
from arcface_jax.data.recordio.reader import Record, RecordReader
from arcface_jax.data.source import Sample, Source, whole_label
from arcface_jax.errors import DataError, ImageError

_INEXACT = 2**24  # from here on float32 does not represent all integers
_SHARDS_REMEMBERED = 64  # most recent shards requested from the system


class RecordSource(Source):
    """A record file with or without insightface's identity header.

    A header is a record 0 without an image. insightface's has the labels [first identity record,
    end]: images have the keys below the first number, and each identity has a record from there on.
    For a header without identity records, [n, n] for images 1 .. n - 1, and for files without a
    header, identities are counted by the labels.

    Args:
      rec: the `.rec` file.
      shard: if not 0, records are prefetched in runs of this length, for `data.order shards`.
      label_index: which of several labels is the identity.
    """

    unit = "records"

    def __init__(self, rec: Path, *, shard: int = 0, label_index: int = 0):
        self._reader = RecordReader(rec)
        self._shard, self._which = shard, label_index
        self._asked: list[int] = []
        self._lock = threading.Lock()
        header = self._header()
        # Images are the records at positions first .. first + count - 1 of the ascending keys.
        self._first = 0 if header is None else 1
        self._count = len(self._reader.keys) - self._first
        if isinstance(header, np.ndarray):
            first, end = (float(label) for label in header)
            self._check_header(first, end)
            self._count = self._count_images(int(first))
            self.num_classes = self._count_identities(first, end)
        else:
            self.num_classes = self._count_by_labels()
        self.names = names.read(rec.parent, count=self.num_classes)
        self.notes = self._notes()

    def _header(self) -> float | np.ndarray | None:
        """Returns the labels of record 0 if it is not an image; one number if they are not a
        range.
        """
        if self._reader.keys[0] != 0:
            return None
        record = self._reader.read_at(0)
        if formats.sniff(record.data[: formats.HEAD]) is not None:
            return None
        labels = record.label
        if isinstance(labels, np.ndarray) and len(labels) == 2:
            return labels
        if record.data or len(self._reader.keys) == 1:
            return None
        return 0.0 if formats.sniff(self._reader.read_at(1).data[: formats.HEAD]) else None

    def _check_header(self, first: float, end: float) -> None:
        """Refuses a header that announces no images, or images that do not exist."""
        whole = first.is_integer() and end.is_integer()
        count = self._count_images(int(first)) if whole and first > 0 else 0
        # Without identity records it has to be the end of the images, few of which may be missing.
        images_only = first == end and count == len(self._reader.keys) - 1 >= (first - 1) / 2
        if not (whole and count > 0 and (first < end or images_only)):
            raise DataError(
                f"{self._reader.path}, record 0: the header [{first}, {end}] is not [first "
                "identity record, end], whole numbers with images below the first; recreate the "
                "file"
            )

    def _count_identities(self, first: float, end: float) -> int:
        """Counts identities by the header, confirmed by the identity records, or by the labels."""
        records = len(self._reader.keys) - 1 - self._count
        announced = int(end - first)
        if end >= _INEXACT and records:  # from 2^24 on, float32 has steps of 2 or more
            return records
        if records == announced > 0:
            return announced
        found = self._count_by_labels()
        if announced == 0:
            return found
        where = f"{self._reader.path}, record 0: the header [{first}, {end}]"
        names.check_count(announced, self._count, where=where)
        return announced

    def _count_by_labels(self) -> int:
        labels = self._image_labels()
        place = int(np.argmax(labels))
        largest = int(labels[place])
        if largest < 0:  # no record has a label: the first one's error explains why
            whole_label(self._label(self._reader.read_at(self._first)), where=self.where(0))
        where = f"{self.where(place)} has the label {largest}"
        names.check_count(largest + 1, self._count, where=where)
        return 1 + largest

    def _notes(self) -> list[str]:
        try:
            labels = self._reader.read_at(self._first).label
        except ImageError:
            return []
        if not isinstance(labels, np.ndarray) or len(labels) == 1:
            return []
        return [
            f"records have {len(labels)} labels; number {self._which} is the identity "
            "(--data.label-index names another, from 0)"
        ]

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Sample:
        """Returns the image's bytes and its label.

        Raises:
          ImageError: the record is damaged, or its label out of range.
        """
        if self._shard:
            self._fetch_ahead(index // self._shard)
        record = self._reader.read_at(self._position(index))
        label = whole_label(self._label(record), where=self.where(index))
        if label >= self.num_classes:
            raise ImageError(
                self.where(index),
                f"label {label} is outside the {self.num_classes} identities "
                f"(0 .. {self.num_classes - 1}) that the file's header announces: the header or "
                "the labels are wrong; recreate the file",
            )
        return Sample(record.data, label)

    def load(
        self, numbers: np.ndarray, rows: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> list[tuple[int, ImageError]]:
        """Reads and decodes many images; unusual records go through `read`.

        Raises:
          DataError: the file was truncated in the meantime.
        """
        if self._shard:
            for shard in np.unique(numbers // self._shard).tolist():
                self._fetch_ahead(shard)
        encoded, given = self._reader.images(self._first + numbers, which=self._which)
        usual = (given >= 0) & (given < self.num_classes) & (given == np.floor(given))
        labels[rows] = np.where(usual, given, 0)
        # As little work as possible between two images, because other threads need the GIL.
        for place, (row, data) in enumerate(zip(rows.tolist(), encoded, strict=True)):
            image = pixels(data)
            if image is not None and image.shape == images.shape[1:]:
                images[row] = image
            else:
                usual[place] = False
        return super().load(numbers[~usual], rows[~usual], images, labels)

    def labels(self) -> np.ndarray:
        """Returns (len,) int32; -1 if a record is damaged, or its label out of range."""
        labels = self._image_labels()
        return labels if labels.max() < self.num_classes else _inside(labels, self.num_classes)

    def where(self, index: int) -> str:
        """Returns the file and the record's key."""
        return f"{self._reader.path}, record {self._key(index)}"

    def facts(self) -> Mapping[str, int | str]:
        """Returns the size of the record file, and digests of its index."""
        which = {"label index": self._which} if self._which else {}
        return {"form": "record file", **which, **self._reader.facts()}

    def _image_labels(self) -> np.ndarray:
        labels = self._reader.labels(which=self._which)
        return labels[self._first : self._first + self._count]

    def _position(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        return self._first + index

    def _key(self, index: int) -> int:
        return int(self._reader.keys[self._position(index)])

    def _count_images(self, first: int) -> int:
        """Returns the number of keys before the first identity record."""
        keys = self._reader.keys
        position = self._reader.below(first)
        if first >= _INEXACT:
            spacing = int(np.spacing(np.float32(first)))
            position = max(1, position - spacing)
            while position < len(keys) and self._reader.read(int(keys[position])).data:
                position += 1
        return position - 1

    def _label(self, record: Record) -> float:
        """Returns the identity's label; insightface stores one label, or several with it in front.

        Raises:
          ImageError: the record has no label number `label_index`.
        """
        if not isinstance(record.label, np.ndarray) and self._which == 0:
            return record.label  # the usual case; an array costs 4 us
        labels = np.atleast_1d(record.label)
        if self._which >= len(labels):
            raise ImageError(
                f"{self._reader.path}, record {record.id}",
                f"has {len(labels)} labels, and data.label_index asks for number {self._which}, "
                "counted from 0",
                kind="no label",
            )
        return float(labels[self._which])

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
