"""`data.py pack`, `split` and `merge`: write training sets as record files for insightface.

The images' bytes are unchanged. They are ordered by identity, as the format's identity records
require. An interrupted pack resumes where it stopped.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.config.choices import Bad
from arcface_jax.data import fingerprint as fingerprints
from arcface_jax.data import names
from arcface_jax.data.fingerprint import Fingerprint
from arcface_jax.data.images import IMAGE_SIZE, decode
from arcface_jax.data.names import Names
from arcface_jax.data.recordio.reader import RecordWriter
from arcface_jax.data.source import Sample, Source
from arcface_jax.data.tools import reading
from arcface_jax.errors import DataError, ImageError, UserError
from arcface_jax.runtime import sealed
from arcface_jax.runtime.files import write_atomic
from arcface_jax.runtime.sealed import DamagedError

JOURNAL = "packing.json"
"""State of an unfinished job, in its folder."""
# Files by which a folder is read as a training set.
_SETS = (
    "train.rec",
    "train.idx",
    "*.parquet",
    "*.arrow",
    "*.tar",
    "*.lmdb",
    "data.mdb",
    "dataset_info.json",
)


class Selection(NamedTuple):
    """Images in the order in which they are written, and their new labels."""

    numbers: np.ndarray
    """(n,) int64 image numbers of the source."""
    labels: np.ndarray
    """(n,) int32, ascending."""
    num_classes: int
    identities: np.ndarray | None = None
    """(num_classes,) labels of these identities in the source; None if they keep them."""


class Packed(NamedTuple):
    """Summary of what was written."""

    files: list[Path]
    images: int
    identities: int
    skipped: list[str]
    """Error of each image that was left out."""


def select(
    source: Source, *, identities: np.ndarray | None = None, renumber: bool = False
) -> Selection:
    """Orders images by identity.

    Args:
      source: the training set.
      identities: labels to take and renumber; by default all, with their labels.
      renumber: number the identities that have images from 0, without gaps.

    Raises:
      DataError: an image's label cannot be read.
    """
    labels = np.asarray(source.labels())
    if len(labels) and labels.min() < 0:
        number = int(np.argmin(labels))
        source.read(number)  # raises the actual error
        raise DataError(f"{source.where(number)}: no label; recreate that file")
    order = np.argsort(labels, kind="stable")
    if identities is not None:
        order = order[np.isin(labels[order], identities)]
    chosen, count, present = labels[order], source.num_classes, None
    if renumber or identities is not None:
        present, chosen = np.unique(chosen, return_inverse=True)
        count = len(present)
    return Selection(order, chosen.astype(np.int32), count, present)


def names_of(source: Source, selection: Selection) -> Names:
    """Returns the names of a selection's identities: the source's names, or its labels."""
    old = range(selection.num_classes) if selection.identities is None else selection.identities
    return Names(names.name_of(source.names, int(label)) for label in old)


def pack(
    source: Source, selection: Selection, folder: Path, *, bad: Bad = "stop", threads: int = 0
) -> Packed:
    """Writes train.rec, train.idx, property and the identities' names.

    Args:
      source: the training set.
      selection: the images to write, their order and their labels.
      folder: where to; continues what an interrupted call left there.
      bad: what to do with an image that cannot be read or is not 112 x 112.
      threads: threads that read and check images; 0 for one per processor.

    Raises:
      UserError: the folder has a finished record file, or another unfinished one.
      ImageError: an image is bad, and `bad` is "stop".
    """
    require_new(folder, selection)
    folder.mkdir(parents=True, exist_ok=True)
    data = fingerprints.of_source(source)
    journal = Journal(folder / JOURNAL, fingerprint(source, selection, bad), data)
    partial = folder / "packing.rec"
    if partial.exists() and not journal.resumed:
        print(f"note: {journal.path} is missing, so packing starts over", file=sys.stderr)
    most = 1 + len(selection.numbers) - len(journal.skipped)  # without the identity records
    with RecordWriter(partial, resume=most if journal.resumed else 0) as writer:
        written = _write_images(writer, source, selection, journal, bad=bad, threads=threads)
        _write_identities(writer, written, selection.num_classes)
    partial.replace(folder / "train.rec")
    partial.with_suffix(".idx").replace(folder / "train.idx")
    shape = f"{IMAGE_SIZE},{IMAGE_SIZE}"
    write_atomic(folder / "property", f"{selection.num_classes},{shape}\n")
    table = names.write(folder, names_of(source, selection))
    journal.path.unlink()
    files = [*(folder / name for name in ("train.rec", "train.idx", "property")), table]
    return Packed(files, len(written), selection.num_classes, list(journal.skipped.values()))


def require_new(folder: Path, selection: Selection, *, shards: str = "") -> None:
    """Checks that a selection has images, and that its folder holds no training set.

    Args:
      folder: output folder.
      selection: the images to write.
      shards: pattern of the files that an interrupted call leaves finished.

    Raises:
      DataError: the selection is empty.
      UserError: the folder has files of a training set.
    """
    if not len(selection.numbers):
        raise DataError("there is no image to pack: nothing is left of the identities asked for")
    own = shards if (folder / JOURNAL).exists() else ""
    patterns = [pattern for pattern in _SETS if pattern != own]
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)))
    if path := next(found, None):
        raise UserError(f"{folder} has a {path.name} already: name another folder, or remove it")


def checked(source: Source, number: int) -> Sample:
    """Returns a stored image after checking that it decodes and has the right size.

    Raises:
      ImageError: the check fails.
    """
    sample = source.read(number)
    decode(sample.data, where=partial(source.where, number))
    return sample


class Journal:
    """State of an unfinished job: what it writes, and the images that it left out.

    Args:
      path: path of the file.
      job: a digest of the selection and the options.
      data: the source's fingerprint.

    Raises (the constructor): UserError where the folder has another unfinished job, or the file is
    damaged.
    """

    def __init__(self, path: Path, job: str, data: Fingerprint | None = None):
        self.path = path
        self._job, self._data = job, data
        self.skipped: dict[int, str] = {}
        """Errors by position in the selection."""
        self.finished: dict[str, str] = {}
        """Digests of the complete files, by name."""
        try:
            kept = sealed.read(path)
        except FileNotFoundError:
            kept = None
        except DamagedError as error:
            raise UserError(f"{error}: remove it to start over, or name another folder") from None
        self.resumed = kept is not None
        if kept is None:
            self._save()
            return
        different = [] if kept["job"] == job else ["another selection"]
        stored = kept["data"]
        if data is not None and fingerprints.comparable(stored):
            different += fingerprints.differences(stored, data)
        if different:
            raise UserError(
                f"{path.parent} holds an unfinished job of other images or options "
                f"({'; '.join(different)}): remove {path} to start over, or name another folder"
            )
        self.skipped = {int(place): text for place, text in kept["skipped"].items()}
        self.finished = kept["finished"]

    def skip(self, place: int, text: str) -> None:
        """Records an image that was left out."""
        self.skipped[place] = text
        self._save()

    def finish(self, path: Path) -> None:
        """Records that a file is complete."""
        self.finished[path.name] = sealed.file_digest(path)
        self._save()

    def has(self, path: Path) -> bool:
        """Returns whether a file is complete and unchanged."""
        try:
            return self.finished.get(path.name) == sealed.file_digest(path)
        except OSError:
            return False

    def _save(self) -> None:
        skipped = {str(place): text for place, text in self.skipped.items()}
        content = {"job": self._job, "data": self._data, "skipped": skipped}
        write_atomic(self.path, sealed.seal({**content, "finished": self.finished}))


def fingerprint(source: Source, selection: Selection, *options: object) -> str:
    """Returns a digest of which images of a source are to be written, and how."""
    counts = (len(source), source.num_classes, selection.num_classes)
    digest = hashlib.sha256(repr((*counts, *options)).encode())
    for values in (selection.numbers, selection.labels):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def images(
    source: Source, selection: Selection, journal: Journal, *, places: range, bad: Bad, threads: int
) -> Iterator[Iterator[tuple[int, Sample]]]:
    """Reads the good images of a part of the selection, with their new labels.

    Yields:
      An iterator over the place and the image of each.
    """
    left = remaining(places, journal)

    def good(results: Iterable[tuple[int, Sample | ImageError]]) -> Iterator[tuple[int, Sample]]:
        for place, (_, found) in zip(left.tolist(), results, strict=True):
            if isinstance(found, ImageError):
                if bad == "stop":
                    raise found
                journal.skip(place, str(found))
            else:
                yield place, Sample(found.data, int(selection.labels[place]))
        require_good(selection, journal)

    with reading.in_order(
        selection.numbers[left],
        lambda number: checked(source, number),
        what="packing",
        threads=threads,
        done=places.start,
        total=len(selection.numbers),
    ) as results:
        yield good(results)


def require_good(selection: Selection, journal: Journal) -> None:
    """Checks that not all images were left out, because no reader opens a set without images.

    Raises:
      DataError: all were.
    """
    if len(journal.skipped) == len(selection.numbers):
        raise DataError(
            f"all {len(selection.numbers):,} images were left out, the first because of "
            f"{next(iter(journal.skipped.values()))}"
        )


def remaining(places: range, journal: Journal) -> np.ndarray:
    """Returns a part of a selection without the images that the journal left out."""
    return np.setdiff1d(
        np.arange(places.start, places.stop), np.array([*journal.skipped], np.int64)
    )


def _write_images(
    writer: RecordWriter,
    source: Source,
    selection: Selection,
    journal: Journal,
    *,
    bad: Bad,
    threads: int,
) -> np.ndarray:
    """Writes the missing images; returns the labels of all images in the file, (n,) ascending."""
    total = len(selection.numbers)
    if writer.written == 0:
        # Its labels are only known at the end, because images may be left out.
        writer.write(0, b"", label=[0.0, 0.0])
    # Image k is record k + 1. The journal has those left out so far.
    done = max(writer.written - 1, 0)
    good = remaining(range(total), journal)
    start = int(good[done]) if done < len(good) else total
    key = done + 1
    places = range(start, total)
    with images(source, selection, journal, places=places, bad=bad, threads=threads) as found:
        for _, sample in found:
            writer.write(key, sample.data, label=float(sample.label))
            key += 1
    good = remaining(range(total), journal)
    return selection.labels[good]


def _write_identities(writer: RecordWriter, labels: np.ndarray, num_classes: int) -> None:
    """Writes the record of each identity, with its key range, and record 0."""
    first = len(labels) + 1
    begins = np.searchsorted(labels, np.arange(num_classes + 1)) + 1
    for identity in range(num_classes):
        ranges = begins[identity : identity + 2].tolist()
        writer.write(first + identity, b"", label=ranges)
    writer.overwrite_first([float(first), float(first + num_classes)])
