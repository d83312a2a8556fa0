"""Parquet files with image bytes and labels, as Hugging Face stores them."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcface_jax.data.source import Sample, Source
from arcface_jax.errors import DataError, ImageError, UserError, install
from arcface_jax.runtime.sealed import array_digest

_GROUPS_KEPT = 8  # row groups that stay in memory


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder, or of its folder `data`; of the training split if named so."""
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    return [file for file in files if file.name.startswith("train")] or files


def _import_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"Parquet files need pyarrow ({error}): {install('parquet')}") from error
    return parquet


class ParquetSource(Source):
    """Columns `image` (bytes, or a struct with bytes and path) and `label` (whole numbers).

    Rows lie in groups that are read whole, and the last few stay in memory: in a random order a
    group is read for nearly every image. `data.order shards` reads each once; so does packing.

    Raises (the constructor): DataError where a file is damaged, or has other columns.
    """

    def __init__(self, files: Sequence[Path]):
        self._files = list(files)
        groups, labels = [], []
        self._sizes = np.zeros(len(files), np.int64)
        for number, path in enumerate(self._files):
            try:
                with _import_parquet().ParquetFile(path) as file:
                    schema, meta = file.schema_arrow, file.metadata
                    self._sizes[number] = path.stat().st_size
                    _check_columns(path, schema)
                    groups += [
                        (number, i, meta.row_group(i).num_rows) for i in range(meta.num_row_groups)
                    ]
                    labels.append(file.read(columns=["label"])["label"].to_numpy())
            except (OSError, ValueError) as error:  # pyarrow's errors are among these
                raise DataError(
                    f"{path} is not a Parquet file that can be read: {error}"
                ) from error
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        numbers = np.concatenate(labels) if labels else np.zeros(0)
        if not len(numbers):
            raise DataError(f"{self._files}: no row in the Parquet files")
        fits = (numbers >= 0) & (numbers < 2**31) & (numbers % 1 == 0)  # a null is NaN
        self._labels = np.where(fits, numbers, -1).astype(np.int32)
        self.num_classes = int(self._labels.max()) + 1
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
            raise ImageError(self.where(index), f"has no {what}: write the file with them")
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
                images = opened.read_row_group(number, columns=["image"])["image"]
        except (OSError, ValueError) as error:
            raise ImageError(
                f"{self._files[file]}, group {number}", f"cannot be read: {error}"
            ) from error
        with self._lock:
            self._kept[group] = images
            while len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
        return images


def _check_columns(path: Path, schema: Any) -> None:
    from pyarrow import types

    if not {"image", "label"} <= set(schema.names):
        raise DataError(
            f"{path} has the columns {', '.join(schema.names)}: it needs 'image' and 'label'; "
            "rename them"
        )
    image, label = (schema.field(name).type for name in ("image", "label"))
    if types.is_struct(image):
        fields = {image.field(i).name: image.field(i).type for i in range(image.num_fields)}
        image = fields.get("bytes")
    binary = image is not None and (types.is_binary(image) or types.is_large_binary(image))
    if not binary or not (types.is_integer(label) or types.is_floating(label)):
        raise DataError(
            f"{path}: image is {schema.field('image').type} and label {label}: image should be "
            "bytes or a struct with bytes, label a number"
        )
