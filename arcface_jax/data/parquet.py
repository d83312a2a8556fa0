"""Parquet files with image bytes and labels, as Hugging Face stores them."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcface_jax.data import lists, names
from arcface_jax.data.names import Names
from arcface_jax.data.source import Sample, Source
from arcface_jax.errors import DataError, ImageError, UserError, install
from arcface_jax.runtime.sealed import array_digest

_GROUPS_KEPT = 8  # row groups that stay in memory


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder, of the training split where that is named.

    They lie in the folder, in its `data`, or, as on the hub's Parquet branch, in CONFIG/train.

    Raises:
      DataError: there are several configurations, and none is the default.
    """
    places = ("*.parquet", "data/*.parquet", "train/*.parquet", "*/train/*.parquet")
    found = (sorted(folder.glob(place)) for place in places)
    visible = ([file for file in files if not file.name.startswith(".")] for files in found)
    files = next(filter(None, visible), [])
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:  # of several configurations
        files = [file for file in files if file.parent.parent.name == "default"]
        if not files:
            several = ", ".join(map(str, folders))
            raise DataError(f"{folder} holds several sets: name one of {several}")
    return [file for file in files if file.name.startswith("train")] or files


def _import_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"Parquet files need pyarrow ({error}): {install('parquet')}") from error
    return parquet


class ParquetSource(Source):
    """A column of images (bytes, or a struct with bytes and path) and a column of labels.

    Labels are whole numbers, names as text or as a dictionary, or the hub's ClassLabel, whose names
    the file's metadata has. Columns are found by type and name.

    Rows lie in groups that are read whole, and the last few stay in memory: in a random order a
    group is read for nearly every image. `data.order shards` reads each once; so does packing.

    Args:
      files: of one set, in their order.
      columns: as `data.columns`; path is the column of images.

    Raises (the constructor): DataError where a file is damaged, or has other columns.
    """

    unit = "rows"

    def __init__(self, files: Sequence[Path], *, columns: str = ""):
        self._files = list(files)
        chosen = lists.parse_columns(columns)
        groups, labels, table = [], [], None
        self._sizes = np.zeros(len(files), np.int64)
        self._column = ""
        for number, path in enumerate(self._files):
            try:
                with _import_parquet().ParquetFile(path) as file:
                    schema, meta = file.schema_arrow, file.metadata
                    self._sizes[number] = path.stat().st_size
                    self._column, label = _columns(path, schema, chosen)
                    table = _class_names(schema, label)
                    groups += [
                        (number, i, meta.row_group(i).num_rows) for i in range(meta.num_row_groups)
                    ]
                    labels.append(file.read(columns=[label])[label])
            except (OSError, ValueError) as error:  # pyarrow's errors are among these
                raise DataError(
                    f"{path} is not a Parquet file that can be read: {error}"
                ) from error
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if not sum(map(len, labels)):
            raise DataError(f"{self._files}: no row in the Parquet files")
        found = _numbered(labels, self.where)
        self._labels, self.num_classes, self.names = found
        if table is not None and self.num_classes <= len(table) and self.names is None:
            self.num_classes, self.names = len(table), Names(table)
        self._prepare()

    def _prepare(self) -> None:
        self._kept: OrderedDict[int, Any] = OrderedDict()
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
        """The image's bytes and its label.

        Raises:
          ImageError: they cannot be read, or are missing.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[group] - self._groups[group, 2])
        value = self._images(group)[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        label = int(self._labels[index])
        if data is None or label < 0:
            what = "label that is a whole number from 0" if data else "bytes in its image"
            raise ImageError(
                self.where(index), f"has no {what}: write the file with them", kind="no label"
            )
        return Sample(data, label)

    def labels(self) -> np.ndarray:
        """(len,) int32; -1 where it is no whole number from 0."""
        return self._labels

    def where(self, index: int) -> str:
        """The file, the row group and the row in it."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        file, number, rows = self._groups[group].tolist()
        return f"{self._files[file]}, group {number}, row {index - int(self._ends[group]) + rows}"

    def facts(self) -> Mapping[str, int | str]:
        """Sizes of the files, and digests of their labels and row groups."""
        return {
            "form": "Parquet",
            "bytes": int(self._sizes.sum()),
            "file sizes": array_digest(self._sizes),
            "row groups": array_digest(self._groups.reshape(-1)),
            "labels": array_digest(self._labels),
        }

    def _images(self, group: int) -> Any:
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
        file, number, _ = self._groups[group].tolist()
        try:
            # Opened for each group: nothing stays open, and threads do not share a reader.
            with _import_parquet().ParquetFile(self._files[file]) as opened:
                images = opened.read_row_group(number, columns=[self._column])[self._column]
        except (OSError, ValueError) as error:
            raise ImageError(
                f"{self._files[file]}, group {number}", f"cannot be read: {error}"
            ) from error
        with self._lock:
            self._kept[group] = images
            while len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
        return images


def _numbered(labels: Sequence[Any], where: Callable[[int], str]) -> names.Numbered:
    """Identities of the labels of all files, numbers or names."""
    from pyarrow import types

    kinds = [column.type for column in labels]
    words = [types.is_dictionary(kind) or _is_text(kind) for kind in kinds]
    if any(words):
        text = [
            "" if value is None else str(value) for column in labels for value in column.to_pylist()
        ]
        return names.number(text, where=where)
    values = np.concatenate([column.to_numpy() for column in labels])
    fits = (values >= 0) & (values < 2**62) & (values % 1 == 0)  # a null is NaN
    return names.number_integers(np.where(fits, values, -1).astype(np.int64), where=where)


def _class_names(schema: Any, label: str) -> list[str] | None:
    """The names of a ClassLabel, which the library `datasets` leaves in the schema's metadata."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        table = info["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    numbers = all(name == str(i) for i, name in enumerate(table))
    return None if numbers or not all(isinstance(name, str) for name in table) else table


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


def _columns(path: Path, schema: Any, chosen: Mapping[str, str]) -> tuple[str, str]:
    """The columns of images and labels: those asked for, else by their type and then their name."""
    kinds = {field.name: field.type for field in schema}
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
