"""Parquet files with image bytes and labels, as Hugging Face stores them."""

import contextlib
import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from arcface_jax.data import columnar, splits
from arcface_jax.data.splits import Chosen
from arcface_jax.errors import DataError, ImageError
from arcface_jax.runtime import foreign
from arcface_jax.runtime.sealed import array_digest

_GROUPS_KEPT = 8  # row groups kept in memory


def parquet_files(folder: Path, *, split: str = "") -> Chosen:
    """Returns the Parquet files of one split.

    They are in the folder, in its `data`, or in CONFIG/SPLIT as on the hub's Parquet branch.

    Args:
      folder: the folder.
      split: the split; "" for `train`, or for all files if they belong to one split.

    Raises:
      DataError: there are several configurations and no default one, or several splits and no
        `train`, or the files have other splits.
    """
    flat = _visible(folder, "*.parquet") or _visible(folder, "data/*.parquet")
    if flat:
        return splits.by_name(folder, flat, split)
    own = glob.escape(split or splits.DEFAULT)
    files = _visible(folder, f"{own}/*.parquet") or _visible(folder, f"*/{own}/*.parquet")
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:  # several configurations
        files = [file for file in files if file.parent.parent.name == "default"]
        if not files:
            several = ", ".join(map(str, folders))
            raise DataError(f"{folder} holds several sets: name one of {several}")
    if not files:
        return splits.NOTHING
    others = _visible(files[0].parent.parent, "*/*.parquet")
    return splits.counted(files, others=len(others) - len(files))


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


class ParquetSource(columnar.TableSource):
    """A column of images (bytes, or a struct with bytes and path) and a column of labels.

    Labels are whole numbers, names as text or as a dictionary, or the hub's ClassLabel, whose names
    are in the file's metadata. Columns are found by type and name.

    Row groups are read as a whole, and the last few stay in memory: in random order, nearly every
    image costs reading a group. `data.order shards` reads each group once; so does packing.

    Args:
      files: files of one set, in their order.
      columns: as `data.columns`; path is the column of images.
      ignored: files of the folder that are not used, by kind.

    Raises (the constructor): DataError where a file is damaged, or has other columns.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        columns: str = "",
        ignored: Mapping[str, int] = MappingProxyType({}),
    ):
        super().__init__()
        self._files, self.ignored = list(files), dict(ignored)
        groups, labels, found = [], [], None
        self._sizes = np.zeros(len(files), np.int64)
        for number, path in enumerate(self._files):
            with _reporting(path), _opened(path) as file:
                schema, meta = file.schema_arrow, file.metadata
                self._sizes[number] = path.stat().st_size
                found = columnar.find_columns(path, schema, columns=columns)
                groups += [
                    (number, i, meta.row_group(i).num_rows) for i in range(meta.num_row_groups)
                ]
                rows = sum(size for at, _, size in groups if at == number)
                columnar.check_rows(rows, path.stat().st_size, where=str(path))
                for group in range(meta.num_row_groups):
                    _check_group(path, meta, group, found.label)
                column = file.read(columns=[found.label])[found.label]
                labels.append(columnar.Labels(path, column, found.class_names))
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if found is None or not sum(len(part.column) for part in labels):
            raise DataError(f"{self._files[0].parent}: no row in the Parquet files")
        self._column, self._leaf = found.image, found.leaf
        numbered = columnar.number(labels, where=self.where)
        self._labels, self.num_classes, self.names = numbered

    def where(self, index: int) -> str:
        """Returns the file, the row group and the row in it."""
        chunk, row = self._place(index)
        file, group, _ = self._groups[chunk].tolist()
        return f"{self._files[file]}, group {group}, row {row}"

    def facts(self) -> Mapping[str, int | str]:
        """Returns sizes of the files, and digests of their labels and row groups."""
        return {
            "form": "Parquet",
            "bytes": int(self._sizes.sum()),
            "file sizes": array_digest(self._sizes),
            "row groups": array_digest(self._groups.reshape(-1)),
            "labels": array_digest(self._labels),
        }

    def _file(self, chunk: int) -> Path:
        return self._files[int(self._groups[chunk, 0])]

    def _images(self, chunk: int) -> Any:
        with self._lock:
            if chunk in self._kept:
                self._kept.move_to_end(chunk)
                return self._kept[chunk]
        file, number, _ = self._groups[chunk].tolist()
        path = self._files[file]
        try:
            # Opened for each group: nothing stays open, and threads do not share a reader.
            with _opened(path, repeated=self._leaf) as opened:
                _check_group(path, opened.metadata, number, self._column)
                images = opened.read_row_group(number, columns=[self._column])[self._column]
        except (OSError, ValueError, DataError) as error:
            problem = _first_line(error).removeprefix(f"{path}, group {number} ")
            raise ImageError(f"{path}, group {number}", f"cannot be read: {problem}") from error
        with self._lock:
            self._kept[chunk] = images
            while len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
        return images


def _opened(path: Path, *, repeated: str = "") -> Any:
    """Opens a reader of a file.

    Args:
      path: path of the file.
      repeated: leaf column of bytes whose values repeat; each is kept in memory once.

    Raises:
      OSError: it is not a regular file.
      ValueError: it is not a Parquet file.
    """
    foreign.require_regular(path)
    kept = [repeated] if repeated else None
    return columnar.import_pyarrow().parquet.ParquetFile(path, read_dictionary=kept)


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turns pyarrow's errors about unreadable files into one line.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        NotImplementedError,
    ) as error:  # these include pyarrow's errors
        raise DataError(
            f"{path} is not a Parquet file that can be read: {_first_line(error)}"
        ) from error


def _check_group(path: Path, meta: Any, number: int, column: str) -> None:
    """Refuses a row group whose column expands more than images or labels can.

    Raises:
      DataError: the column does.
    """
    group = meta.row_group(number)
    of_column = [group.column(i) for i in range(group.num_columns)]
    expanded = sum(
        part.total_uncompressed_size
        for part in of_column
        if f"{part.path_in_schema}.".startswith(f"{column}.")
    )
    where = f"{path}, group {number}"
    columnar.check_expansion(expanded, path.stat().st_size, where=where)


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).partition("\n")[0][:300]
