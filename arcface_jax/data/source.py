"""The `Source` protocol of training sets: random access to labeled images."""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

from arcface_jax.data.images import decode
from arcface_jax.data.names import Names
from arcface_jax.errors import ImageError


class Sample(NamedTuple):
    """A stored image and its label."""

    data: bytes
    """Encoded image: JPEG, PNG, or another format that OpenCV reads."""
    label: int


class Source(Protocol):
    """Random access to labeled face images.

    Safe to read from many threads, and to send to another process, which reopens the files.
    """

    num_classes: int
    """Number of identities; labels are 0 .. num_classes - 1."""

    generated: bool = False
    """Whether images are computed from the parameters in `facts` instead of being stored."""

    names: Names | None = None
    """Names of the identities; None if they are numbers."""

    unit: str = "images"
    """What the set consists of, in the plural."""

    ignored: Mapping[str, int] = MappingProxyType({})
    """Number of unused files in the set's folder, by kind: suffixes, hidden, loose images."""

    notes: Sequence[str] = ()
    """How ambiguous parts of the set were interpreted, a line each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Returns an image, (112, 112, 3) uint8 RGB, and its label.

        Raises:
          ImageError: the image cannot be read, or its label is out of range.
        """
        data, label = self.read(index)
        return decode(data, where=partial(self.where, index)), label

    def read(self, index: int) -> Sample:
        """Returns the image's bytes, not decoded, and its label.

        Raises:
          ImageError: the image cannot be read, or its label is out of range.
        """
        ...

    def load(
        self, numbers: np.ndarray, rows: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> list[tuple[int, ImageError]]:
        """Reads and decodes many images.

        Args:
          numbers: (n,) int64 image numbers.
          rows: (n,) int64 destination row of each image.
          images: (b, 112, 112, 3) uint8 RGB, written to.
          labels: (b,) int32, written to.

        Returns:
          The rows whose image cannot be read, with the error; their contents are undefined.
        """
        failed: list[tuple[int, ImageError]] = []
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True):
            try:
                images[row], labels[row] = self[number]
            except ImageError as error:
                failed.append((row, error))
        return failed

    def labels(self) -> np.ndarray:
        """Returns (len,) int32: the label of every image; -1 where it cannot be read."""
        ...

    def where(self, index: int) -> str:
        """Returns the file and the place in it, for messages."""
        ...

    def facts(self) -> Mapping[str, int | str]:
        """Facts by name that distinguish this set from others, without reading an image.

        Numbers (sizes in bytes, counts, parameters), and digests as text; `form` is the kind of
        files. Paths and times are excluded. Without facts, a fingerprint has counts and sampled
        images.
        """
        return {}


def account(source: Source, *, unreadable: Mapping[str, int] | None = None) -> str:
    """Summarizes in a line how everything in a training set is used.

    Args:
      source: the training set.
      unreadable: images that cannot be read, by kind; None if not all were read.
    """
    return account_of(
        source.unit,
        images=len(source),
        identities=source.num_classes,
        ignored=source.ignored,
        unreadable=unreadable,
    )


def account_of(
    unit: str,
    *,
    images: int,
    identities: int,
    ignored: Mapping[str, int],
    unreadable: Mapping[str, int] | None = None,
) -> str:
    """Summarizes in a line how everything in a place of images is used.

    Args:
      unit: what there is, in the plural.
      images: number found, including unreadable ones.
      identities: their number of identities.
      ignored: entries that are not used, by kind.
      unreadable: images that cannot be read, by kind; None if not all were read.
    """
    count, bad = sum(ignored.values()), sum((unreadable or {}).values())
    parts = [
        f"{images - bad:,} images used of {identities:,} identities",
        f"{count:,} ignored{by_kind(ignored)}",
    ]
    if unreadable is not None:
        parts.append(f"{bad:,} unreadable{by_kind(unreadable)}")
    return f"{images + count:,} {unit}: {', '.join(parts)}"


def by_kind(counts: Mapping[str, int]) -> str:
    """Formats counts in parentheses after a blank, the largest first; returns "" without any."""
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f" ({', '.join(f'{kind} {count:,}' for kind, count in ordered)})"


def whole_label(label: float, *, where: str) -> int:
    """Returns a label read from a file as the number of an identity.

    Raises:
      ImageError: it is not a whole number from 0, or too large for int32.
    """
    if not (0 <= label < 2**31 and float(label).is_integer()):
        raise ImageError(
            where,
            f"label {label} is not an identity: labels are whole numbers from 0; make "
            "the file again with labels counted from 0",
            kind="no label",
        )
    return int(label)
