"""Find the columns of images and identities in Arrow and Parquet files, and read their values.

Columns are found by type and name. Images are bytes, or Hugging Face's struct of bytes and path;
labels are whole numbers, text, a dictionary, or a ClassLabel, whose names are in the schema.
"""

import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.data import lists, names
from arcface_jax.data.images import read_file
from arcface_jax.data.names import Names
from arcface_jax.data.source import Sample, Source
from arcface_jax.errors import DataError, ImageError, UserError, install
from arcface_jax.runtime import foreign

_ROWS_A_BYTE = 4
_LARGE, _EXPANSION = 1 << 28, 100  # bytes that any file may expand to; factor on its size


class Columns(NamedTuple):
    """Columns found in a file's schema."""

    image: str
    label: str
    class_names: list[str] | None
    """Names of a ClassLabel; None for other labels."""
    leaf: str
    """Column with the images' bytes; `image.bytes` if they are in a struct."""


class Labels(NamedTuple):
    """The labels of a file."""

    file: Path
    column: Any
    """Column of pyarrow, numbers or names."""
    class_names: list[str] | None
    """As in `Columns`."""


class TableSource(Source):
    """Rows in chunks whose column of images is read as a whole: files, or groups of rows.

    A subclass finds the chunks and reads them; labels are read once, and numbered by `number`.
    """

    unit = "rows"
    _ends: np.ndarray
    """(chunks,) int64 row after the last one of each chunk."""
    _labels: np.ndarray
    """(rows,) int32 identities; -1 for an invalid label."""

    def __init__(self):
        self._prepare()

    def _prepare(self) -> None:
        self._kept: OrderedDict[int, Any] = OrderedDict()  # columns of images, by chunk
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        own = ("_kept", "_lock")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._prepare()

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Sample:
        """Returns the image's bytes and its label.

        Raises:
          ImageError: image or label cannot be read, or is missing.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        label = int(self._labels[index])
        if label < 0:
            problem = "has no label that is a whole number from 0: write the file with them"
            raise ImageError(self.where(index), problem, kind="no label")
        chunk, row = self._place(index)
        value, folder = self._images(chunk)[row].as_py(), self._file(chunk).parent
        return Sample(_image_bytes(value, folder, where=lambda: self.where(index)), label)

    def labels(self) -> np.ndarray:
        """Returns (len,) int32; -1 where the label is not a whole number >= 0."""
        return self._labels

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the chunk of a row, and the row's number in it."""
        chunk = int(np.searchsorted(self._ends, index, side="right"))
        return chunk, index - (int(self._ends[chunk - 1]) if chunk else 0)

    @abstractmethod
    def _file(self, chunk: int) -> Path:
        """Returns the file of a chunk."""

    @abstractmethod
    def _images(self, chunk: int) -> Any:
        """Returns the column of images of a chunk; raises ImageError if it cannot be read."""


def import_pyarrow() -> Any:
    """Returns the module `pyarrow`, with `pyarrow.parquet`.

    Raises:
      UserError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"Parquet and Arrow files need pyarrow ({error}): {install('parquet')}"
        ) from error
    return pyarrow


def find_columns(path: Path, schema: Any, *, columns: str) -> Columns:
    """Returns the columns of images and labels of a file.

    Args:
      path: path of the file, for messages.
      schema: the file's schema in pyarrow's form.
      columns: as `data.columns`.

    Raises:
      DataError: the columns are ambiguous or missing.
    """
    from pyarrow import types

    image, label = _find(path, schema, lists.parse_columns(columns))
    leaf = f"{image}.bytes" if types.is_struct(schema.field(image).type) else image
    return Columns(image, label, _class_names(schema, label), leaf)


def number(files: Sequence[Labels], *, where: Callable[[int], str]) -> names.Numbered:
    """Numbers the labels of all files as identities.

    All names of a ClassLabel count as identities, even without images. Files whose ClassLabels
    differ share an identity where they share a name.

    Args:
      files: the labels of each file, in their order.
      where: describes a row, given its number, for messages.

    Raises:
      DataError: a file has a ClassLabel, and another one has none.
      ImageError: naming an invalid label.
    """
    filled = [file for file in files if len(file.column)]
    columns, tables = [file.column for file in filled], [file.class_names for file in filled]
    if any(map(_is_words, columns)) or not any(tables):
        return _numbered(columns, where)
    if any(table != tables[0] for table in tables):
        values, table = _by_name(filled)
    else:
        values, table = _integers(columns), tables[0] or []
    found = names.number_integers(values, where=where, count=len(table))
    numbers = all(name == str(label) for label, name in enumerate(table))
    if numbers or found.names is not None or found.num_classes > len(table):
        return found
    return found._replace(names=Names(table))


def _by_name(files: Sequence[Labels]) -> tuple[np.ndarray, list[str]]:
    """Numbers labels of files with different ClassLabels by their names.

    Returns:
      (n,) int64, -1 for an invalid label; and the names of all files, in order of appearance.

    Raises:
      DataError: a file has no names, too few, or one of them twice.
    """
    place: dict[str, int] = {}
    parts = []
    for file, column, table in files:
        other = next(x.file for x in files if x.class_names != table)
        if not table:
            raise DataError(
                f"{file} has no ClassLabel with names, and {other} has: write all files with one"
            )
        values = _integers([column])
        if len(set(table)) < len(table) or values.max(initial=-1) >= len(table):
            raise DataError(
                f"{file} and {other} have different ClassLabels, and this one has names that occur "
                "twice, or labels without a name: write all files with one ClassLabel"
            )
        own = [place.setdefault(name, len(place)) for name in table]
        parts.append(np.append(own, -1)[values])
    return np.concatenate(parts), list(place)


def check_rows(rows: int, size: int, *, where: str) -> None:
    """Refuses more rows than a file of images can have.

    Args:
      rows: number of rows in the file's header.
      size: size of the file, in bytes.
      where: the file, for the message.

    Raises:
      DataError: there are more than four rows per byte.
    """
    if rows > _ROWS_A_BYTE * size + 10_000:
        raise DataError(
            f"{where} announces {rows:,} rows in {size:,} bytes, too many for images or their "
            f"paths: it is damaged or malicious; write it again"
        )


def check_expansion(expanded: int, size: int, *, where: str) -> None:
    """Refuses a file that expands beyond what compressed images and labels do.

    Args:
      expanded: bytes that the file takes in memory when decompressed.
      size: size of the file, in bytes.
      where: the file and the place in it, for the message.

    Raises:
      DataError: it expands more than a hundredfold, and to more than 256 MiB.
    """
    if expanded > max(_LARGE, _EXPANSION * size):
        raise DataError(
            f"{where} expands to {expanded:,} bytes from a file of {size:,}: encoded images "
            f"hardly compress, so this is not a training set; write it again with encoded images"
        )


def _image_bytes(value: Any, folder: Path, *, where: Callable[[], str]) -> bytes:
    """Returns the encoded image of a cell: its bytes, or the contents of the file that it names.

    Args:
      value: bytes, or a mapping with `bytes` and `path`.
      folder: base of relative paths.
      where: the cell, for the message.

    Raises:
      ImageError: it has neither, or the file cannot be read.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    path = value.get("path") if isinstance(value, dict) else None
    if data is None and path and isinstance(path, str):
        return read_file(folder / path)
    if data is None:
        raise ImageError(
            where(), "has no bytes in its image: write the file with them", kind="no image"
        )
    return data


def _numbered(labels: Sequence[Any], where: Callable[[int], str]) -> names.Numbered:
    """Numbers the labels of all files, numbers or names, as identities."""
    if any(map(_is_words, labels)):
        text = [
            "" if value is None else str(value) for column in labels for value in column.to_pylist()
        ]
        return names.number(text, where=where)
    return names.number_integers(_integers(labels), where=where)


def _is_words(column: Any) -> bool:
    from pyarrow import types

    return types.is_dictionary(column.type) or _is_text(column.type)


def _integers(columns: Sequence[Any]) -> np.ndarray:
    """Returns (n,) int64 labels of columns of numbers; -1 for an invalid label."""
    values = np.concatenate([column.to_numpy() for column in columns])
    fits = (values >= 0) & (values < 2**62) & (values % 1 == 0)  # a null is NaN
    return np.where(fits, values, -1).astype(np.int64)


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Returns the names of a ClassLabel, which `datasets` stores in the schema's metadata."""
    try:
        info = foreign.parse_json((schema.metadata or {})[b"huggingface"])
        table = info["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    known = isinstance(table, list) and all(isinstance(name, str) for name in table)
    return table if known and table else None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        kind = fields.get("bytes")
    return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind))


def _holds_labels(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_integer(kind) or types.is_floating(kind) or _is_text(kind)


def _find(path: Path, schema: Any, chosen: Mapping[str, str]) -> tuple[str, str]:
    """Finds the columns of images and labels: as requested, or by type and then by name."""
    kinds = {field.name: field.type for field in schema}
    if twice := sorted(name for name in kinds if len(schema.get_all_field_indices(name)) > 1):
        raise DataError(
            f"{path} has several columns of one name ({', '.join(twice)[:200]}): write it with a "
            "name for each"
        )
    found = []
    for what, fits, usual in (
        ("path", _holds_images, ("image", "img", "jpg", "face")),
        ("label", _holds_labels, lists.STRONG),
    ):
        fitting = [name for name, kind in kinds.items() if fits(kind)]
        named = [name for word in usual for name in fitting if name.lower() == word]
        if what in chosen:
            fitting = [name for name in fitting if name == chosen[what]]
        elif len(fitting) > 1:
            fitting = named[:1]
        if len(fitting) != 1:
            raise DataError(_unclear(path, kinds, what, fits))
        found.append(fitting[0])
    return found[0], found[1]


def _unclear(path: Path, kinds: Mapping[str, Any], what: str, fits: Callable[[Any], bool]) -> str:
    columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    several = " or ".join(name for name, kind in kinds.items() if fits(kind))
    expected = {
        "path": "image (bytes, or a struct with bytes)",
        "label": "label (a number or a name)",
    }[what]
    question = f": which is it, {several}?" if several else ""
    return (
        f"{path} has the columns {columns}: it needs 'image' and 'label', and has no clear "
        f"{expected}{question}; name them with --data.columns path=IMAGES,label=IDENTITIES"
    )
