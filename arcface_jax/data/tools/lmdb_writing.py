"""`data pack --format lmdb`: write any training set as an LMDB, in the format of HSFace and VFace.

Entries 0, 1, ... are (image, label) as MessagePack, next to `__keys__`, `__len__` and
`__classnum__`. An interrupted job starts over.
"""

import itertools
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from arcface_jax.config.choices import Bad
from arcface_jax.data import fingerprint, names
from arcface_jax.data.lmdb import import_lmdb
from arcface_jax.data.source import Sample, Source
from arcface_jax.data.tools import packing
from arcface_jax.data.tools.packing import Journal, Packed, Selection
from arcface_jax.errors import UserError
from arcface_jax.runtime.files import atomic_files

_FILE = "train.lmdb"
_TOGETHER = 1000  # images per transaction


def write(
    source: Source, selection: Selection, folder: Path, *, bad: Bad = "stop", threads: int = 0
) -> Packed:
    """Writes train.lmdb and the identities' names.

    Args:
      source: the training set.
      selection: the images to write, their order and their labels.
      folder: output folder.
      bad: what to do with an image that cannot be read or is not 112 x 112.
      threads: threads that read and check images; 0 for one per processor.

    Raises:
      UserError: the folder already has an LMDB, or lmdb is not installed.
      ImageError: an image is bad, and `bad` is "stop".
    """
    path = folder / _FILE
    packing.require_new(folder, selection)
    folder.mkdir(parents=True, exist_ok=True)
    job = packing.fingerprint(source, selection, bad, "lmdb")
    journal = Journal(folder / packing.JOURNAL, job, fingerprint.of_source(source))
    places = range(len(selection.numbers))
    reading = packing.images(source, selection, journal, places=places, bad=bad, threads=threads)
    with reading as found, atomic_files(path) as part:
        images = _write_database(part, found, selection.num_classes)
    table = names.write(folder, packing.names_of(source, selection))
    journal.path.unlink()
    return Packed([path, table], images, selection.num_classes, list(journal.skipped.values()))


def _write_database(path: Path, found: Iterable[tuple[int, Sample]], classes: int) -> int:
    """Writes the entries; returns the number of images."""
    lmdb = import_lmdb()
    # Without a lock file: no other process knows the database's name yet.
    environment = lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 30)
    count = 0
    try:
        while batch := list(itertools.islice(found, _TOGETHER)):
            entries = [
                (b"%d" % number, _pair(sample))
                for number, (_, sample) in enumerate(batch, start=count)
            ]
            _put(lmdb, environment, entries)
            count += len(batch)
        keys = [_bytes(b"%d" % number) for number in range(count)]
        facts = {
            b"__keys__": b"\xdd" + struct.pack(">I", count) + b"".join(keys),
            b"__len__": _number(count),
            b"__classnum__": _number(classes),
        }
        _put(lmdb, environment, list(facts.items()))
    except lmdb.Error as error:  # of a full disk, too
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        environment.close()
    return count


def _put(lmdb: Any, environment: Any, entries: Sequence[tuple[bytes, bytes]]) -> None:
    """Stores entries in one transaction, in a larger map if they do not fit."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in entries:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


# MessagePack: https://github.com/msgpack/msgpack/blob/master/spec.md


def _pair(sample: Sample) -> bytes:
    return b"\x92" + _bytes(sample.data) + _number(sample.label)


def _bytes(data: bytes) -> bytes:
    short = len(data) < 256
    return (b"\xc4%c" % len(data) if short else b"\xc6" + struct.pack(">I", len(data))) + data


def _number(value: int) -> bytes:
    return bytes([value]) if value < 128 else b"\xce" + struct.pack(">I", value)
