"""LMDB training sets from converters of face sets, read without running any of their code.

An entry's value is an image with its label, as MessagePack (HSFace, VFace), a pickle, pyarrow's
`serialize` or Caffe's Datum, or the image only. The label of a bare image is in the entry
`label-NUMBER` next to `image-NUMBER`, in a list of keys and labels, or the folder of its key. Keys,
labels and the position of each image in its value are cached next to the database (`sidecar`).
"""

import contextlib
import importlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.data import lists, lmdb_values, names, sidecar
from arcface_jax.data.files import LOOSE
from arcface_jax.data.images import HIDDEN, is_hidden
from arcface_jax.data.indexed import IndexedSource, described, files_of, of_paths
from arcface_jax.data.source import Sample
from arcface_jax.errors import DataError, ImageError, UserError, install

_LAYOUT = 2  # version of the cached arrays
_MAGIC = b"\xde\xc0\xef\xbe"  # at byte 16 of the first page
_KEYS, _CLASSES = b"__keys__", b"__classnum__"
_OTHER_FACTS = (b"num-samples", b"num_samples", b"length", b"classnum", b"class_num")
_IMAGE, _LABEL = b"image-", b"label-"
_LONGEST_KEY = 511  # beyond which LMDB raises


def find_lmdb(place: Path) -> Path | None:
    """Finds the database at a path: a file, a folder with `data.mdb`, or one with one `.lmdb`.

    Raises:
      DataError: the folder has several.
    """
    if _is_lmdb(place):
        return place
    if not place.is_dir():
        return None
    found = [path for path in files_of(place, (".lmdb", ".mdb")) if _is_lmdb(path)]
    if len(found) > 1:
        several = ", ".join(path.name for path in found[:5])
        raise DataError(f"{place} holds {len(found)} LMDBs ({several}): name one of them")
    return found[0] if found else None


def _is_lmdb(place: Path) -> bool:
    if not _data_file(place).is_file():  # opening a pipe would block
        return False
    try:
        with _data_file(place).open("rb") as file:
            return file.read(20)[16:] == _MAGIC
    except OSError:
        return False


def _data_file(place: Path) -> Path:
    return place / "data.mdb" if place.is_dir() else place


class LmdbSource(IndexedSource):
    """The images of an LMDB.

    Ordered as in `__keys__` if the writer stored it; otherwise by number, or by folder and name.

    Args:
      path: the file, or the folder with `data.mdb`.
      columns: as `data.columns`, for a list of keys and labels.
      level: as `data.identity_level`, for labels from the keys' folders.

    Raises (the constructor): DataError where it is damaged, or has images without labels.
    """

    unit = "entries"

    def __init__(self, path: Path, *, columns: str = "", level: int = 0):
        self._path = path.absolute()
        self._columns, self._level = columns, level
        super().__init__(path if path.is_dir() else path.parent)

    def _open_arrays(self, *, check: bool) -> sidecar.Arrays:
        beside = _lists_beside(self._path)
        return sidecar.open_arrays(
            self._path,
            [_data_file(self._path), *beside],
            lambda: _index(
                self._path, beside, self._columns, level=self._level, declared=self._declared
            ),
            options=f"lmdb {_LAYOUT} {self._level} {self._declared} {self._columns}",
            check=check,
        )

    def _prepare(self) -> None:
        self._environment: _Environment | None = None  # opened at the first read

    def __getstate__(self) -> dict:
        return {name: x for name, x in super().__getstate__().items() if name != "_environment"}

    def read(self, index: int) -> Sample:
        """Returns the image's bytes and its label.

        Raises:
          ImageError: the entry cannot be read, or its label is invalid.
        """
        key, label = self._key(index), int(self._labels[index])
        if label < 0:
            raise ImageError(self.where(index), "has no label: write the identity", kind="no label")
        begin, size = int(self._arrays["begins"][index]), int(self._arrays["sizes"][index])
        if self._environment is None:
            self._environment = _open(self._path)
        with self._environment.read() as values:
            value = values.get(key)
            if value is None:
                raise ImageError(self.where(index), "is missing: restore the entry", kind="missing")
            if begin >= 0:
                return Sample(bytes(value[begin : begin + size]), label)
            # The image is not stored whole, as in pickles for Python 2.
            found = lmdb_values.parse(value, where=self.where(index))
        if found is None:
            raise ImageError(self.where(index), "is no longer an image: restore the entry")
        return Sample(found.image, label)

    def where(self, index: int) -> str:
        """Returns the database and the entry's key."""
        return f"{self._path}, key {_shown(self._key(index))}"

    def facts(self) -> Mapping[str, int | str]:
        """Returns digests of keys, sizes and labels; the file's own size depends on how it was
        written.
        """
        found = self._arrays
        return {
            "form": "LMDB",
            "keys": found.digest("keys") + found.digest("key_ends"),
            "image sizes": found.digest("sizes"),
            "labels": found.digest("labels"),
        }

    def _key(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        ends = self._arrays["key_ends"]
        return self._arrays["keys"][ends[index - 1] if index else 0 : ends[index]].tobytes()


def _shown(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace").replace("\n", "\\n")


# ---- Access -----------------------------------------------------------------------------------


def import_lmdb() -> Any:
    """Returns the package `lmdb`.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("lmdb")  # this module has the same name
    except ImportError as error:
        raise UserError(f"LMDB files need lmdb ({error}): {install('lmdb')}") from error


class _Environment:
    """An open database. A process may open each only once, so sources share it."""

    def __init__(self, path: Path):
        lmdb = import_lmdb()
        self._path, self._error = path, lmdb.Error
        try:
            self._lmdb = lmdb.open(
                os.fspath(path),
                subdir=path.is_dir(),
                readonly=True,
                lock=False,
                readahead=False,
                meminit=False,
            )
        except lmdb.Error as error:
            raise DataError(
                f"{path} cannot be opened as an LMDB ({error}): copy it again"
            ) from error
        pages, size = 1 + self._lmdb.info()["last_pgno"], self._lmdb.stat()["psize"]
        there = _data_file(path).stat().st_size
        if there < pages * size:  # reading a page that is missing would kill the process
            self.close()
            raise DataError(
                f"{path} is truncated ({there:,} of {pages * size:,} bytes): copy it again"
            )

    @contextlib.contextmanager
    def read(self) -> Iterator[Any]:
        """Opens a read transaction with `get` and `cursor`, whose values are views.

        Raises:
          ImageError: the part that is read is damaged.
        """
        try:
            with self._lmdb.begin(buffers=True) as transaction:
                yield transaction
        except self._error as error:
            raise ImageError(str(self._path), f"cannot be read ({error}): copy it again") from error

    def close(self) -> None:
        """Unmaps the file."""
        self._lmdb.close()

    def __del__(self):
        if hasattr(self, "_lmdb"):
            self.close()


_ENVIRONMENTS: weakref.WeakValueDictionary[Path, _Environment] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def _open(path: Path) -> _Environment:
    """Returns the open database of this process, or of the one that it was forked from.

    A map without a lock file may be read after a fork, and LMDB refuses to open it again.
    """
    key = path.resolve()
    with _LOCK:
        found = _ENVIRONMENTS.get(key)
        if found is None:
            found = _ENVIRONMENTS[key] = _Environment(path)
        return found


# ---- The index --------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """An image of the database."""

    key: bytes
    begin: int
    """Byte of the value at which the image starts; -1 if it is not stored contiguously."""
    size: int
    label: int | str | None


def _index(
    path: Path, beside: Sequence[Path], columns: str, *, level: int, declared: int
) -> dict[str, np.ndarray]:
    """Reads every entry once, and returns the index's arrays."""
    ignored: Counter[str] = Counter()
    environment = _open(path)
    with environment.read() as values:
        entries, notes = _entries(path, values, ignored)
        announced = _fact(path, values, _CLASSES)
        given = [entry.label for entry in entries]
        if any(label is None for label in given):
            given, note = _labels_elsewhere(path, values, entries, beside, columns, level)
            notes.append(note)
            entries, given = _labeled(entries, given, ignored)
    if isinstance(announced, int) and names.is_plausible(announced, len(entries)):
        declared = max(declared, announced)
    found = _numbered(given, lambda i: f"{path}, key {_shown(entries[i].key)}", declared)
    classes = found.num_classes
    if found.names is None and isinstance(announced, int) and announced > classes:
        names.check_count(announced, len(entries), where=f"{path}, key {_CLASSES.decode()}")
        classes = announced
    keys = [entry.key for entry in entries]
    return {
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "begins": np.array([entry.begin for entry in entries], np.int64),
        "sizes": np.array([entry.size for entry in entries], np.int64),
        **described(found._replace(num_classes=classes), ignored=ignored, notes=notes),
    }


def _numbered(labels: Sequence[int | str | None], where: Any, declared: int) -> names.Numbered:
    if all(isinstance(label, int) for label in labels):
        fit = [label if isinstance(label, int) and 0 <= label < 2**62 else -1 for label in labels]
        return names.number_integers(np.array(fit, np.int64), where=where, count=declared)
    text = ["" if label is None else str(label) for label in labels]
    return names.number(text, where=where, count=declared)


def _entries(path: Path, values: Any, ignored: Counter[str]) -> tuple[list[_Entry], list[str]]:
    """Returns the images in order, and notes about them."""
    entries, unknown = [], []
    for key, value in _content(values):
        found = lmdb_values.parse(value, where=f"{path}, key {_shown(key)}")
        if found is None:
            unknown.append((key, bytes(value[:24]), len(value)))
        else:
            entries.append(_Entry(key, found.begin, len(found.image), found.label))
    if not entries:
        raise DataError(_not_understood(path, unknown))
    if unknown:
        ignored["entries without an image"] += len(unknown)
    return _in_order(path, values, entries, ignored)


def _content(values: Any) -> Iterator[tuple[bytes, Any]]:
    """Yields the entries that may be images."""
    for view, value in values.cursor():
        key = bytes(view)
        fact = (key.startswith(b"__") and key.endswith(b"__")) or key in _OTHER_FACTS
        if not (fact or key.startswith(_LABEL)):
            yield key, value


def _not_understood(path: Path, unknown: Sequence[tuple[bytes, bytes, int]]) -> str:
    known = (
        "an image, or an image and its label as MessagePack, a pickle, pyarrow's serialize or "
        "Caffe's Datum with an encoded image"
    )
    if not unknown:
        return f"{path} holds no entry: each should be {known}"
    key, start, size = unknown[0]
    return (
        f"{path} holds {len(unknown):,} entries and no image that can be read: key {_shown(key)} "
        f"has {size:,} bytes that begin with {start[:12].hex(' ')}; expected {known}"
    )


def _in_order(
    path: Path, values: Any, entries: list[_Entry], ignored: Counter[str]
) -> tuple[list[_Entry], list[str]]:
    """Orders entries by the writer's list of keys; else by number, or by folder and name."""
    listed = _fact(path, values, _KEYS)
    if isinstance(listed, list | tuple):
        by_key = {entry.key: entry for entry in entries}
        keys = [key.encode() if isinstance(key, str) else key for key in listed]
        kept = [by_key[key] for key in keys if key in by_key]
        if missing := len(keys) - len(kept):
            ignored["keys without an image"] += missing
        if others := len(entries) - len(set(keys) & by_key.keys()):
            ignored["entries that __keys__ does not list"] += others
        if kept:
            return kept, []
    if all(entry.key.isdigit() for entry in entries):
        return sorted(entries, key=lambda entry: (int(entry.key), entry.key)), []
    return sorted(entries, key=lambda entry: os.path.split(entry.key)), []


def _fact(path: Path, values: Any, key: bytes) -> Any:
    """Returns an entry that the writer stored under a special key; None if missing or unknown."""
    value = values.get(key)
    if value is None:
        return None
    return lmdb_values.parse_fact(bytes(value), where=f"{path}, key {_shown(key)}")


# ---- Labels that are not beside their image -----------------------------------------------------


def _lists_beside(path: Path) -> list[Path]:
    """Returns lists that may map keys to labels: in the database's folder, or with its name."""
    found = sorted(path.iterdir()) if path.is_dir() else []
    stems = (path.with_suffix(""), path)
    found += [stem.with_name(stem.name + suffix) for stem in stems for suffix in lists.SUFFIXES]
    usual = {
        x for x in found if x.suffix.lower() in lists.SUFFIXES and not x.name.endswith(names.FILE)
    }
    return sorted(file for file in usual if file.is_file())


def _labels_elsewhere(
    path: Path,
    values: Any,
    entries: Sequence[_Entry],
    beside: Sequence[Path],
    columns: str,
    level: int,
) -> tuple[list[int | str | None], str]:
    """Returns the label of each bare image, or None if it is not used, and a note about the source.

    Raises:
      DataError: no labels are found.
    """
    if all(entry.key.startswith(_IMAGE) for entry in entries):
        found = [values.get(_LABEL + entry.key.removeprefix(_IMAGE)) for entry in entries]
        if all(value is not None for value in found):
            pairs = zip(entries, map(bytes, found), strict=True)
            labels = [_label(path, entry.key, value) for entry, value in pairs]
            return [*labels], "labels: the entries label-NUMBER"
    refused: DataError | None = None
    for file in beside:
        try:
            by_key = _listed(file, values, columns)
        except DataError as error:  # another text file, or a damaged list, which is then reported
            refused = error
            continue
        missing = [entry.key for entry in entries if entry.key not in by_key]
        if len(missing) == len(entries):
            continue
        if missing:
            raise DataError(
                f"{file} has no line for {len(missing):,} of {len(entries):,} keys of {path} "
                f"({_shown(missing[0])}): add them, or remove these entries"
            )
        return [by_key[entry.key] for entry in entries], f"labels: {file}"
    keys = [_shown(entry.key) for entry in entries]
    visible = [key for key in keys if not is_hidden(key)]
    if visible and all(map(os.path.dirname, visible)):
        identity = dict(zip(visible, of_paths(visible, level=level, where=str(path)), strict=True))
        return [identity.get(key) for key in keys], "labels: the folders of the keys"
    if refused:
        raise refused
    first = next(entry.key for entry in entries if entry.label is None)
    raise DataError(
        f"{path}, key {_shown(first)}: the image has no label with it: put a list of 'key label' "
        f"lines next to the database as {path.with_suffix('.txt').name}"
    )


def _labeled(
    entries: Sequence[_Entry], labels: Sequence[int | str | None], ignored: Counter[str]
) -> tuple[list[_Entry], list[int | str | None]]:
    """Drops the images that `_labels_elsewhere` gave no label, and counts them."""
    unused = [entry for entry, label in zip(entries, labels, strict=True) if label is None]
    ignored.update(HIDDEN if is_hidden(_shown(entry.key)) else LOOSE for entry in unused)
    kept = [(x, label) for x, label in zip(entries, labels, strict=True) if label is not None]
    return [entry for entry, _ in kept], [label for _, label in kept]


def _label(path: Path, image: bytes, value: bytes) -> int | str:
    """Returns the label in an entry of its own, next to the entry of its image.

    Raises:
      DataError: it is neither text nor a number in a known format.
    """
    key = _shown(_LABEL + image.removeprefix(_IMAGE))
    label = lmdb_values.parse_label(value, where=f"{path}, key {key}")
    if label is None:
        raise DataError(
            f"{path}, key {key}: {value[:12].hex(' ')} is not a label: write it as text, as in "
            "b'17', or as a pickled number"
        )
    return label


def _listed(file: Path, values: Any, columns: str) -> dict[bytes, str]:
    """Returns the labels of a list, by key."""
    listed = lists.read_list(file, columns=columns, exists=lambda cell: _has(values, cell.encode()))
    return dict(zip((name.encode() for name in listed.files), listed.labels, strict=True))


def _has(values: Any, key: bytes) -> bool:
    return 0 < len(key) <= _LONGEST_KEY and values.get(key) is not None
