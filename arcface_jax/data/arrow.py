"""Arrow files with image bytes and labels, as Hugging Face's `save_to_disk` writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from arcface_jax.data import arrow_messages, columnar, splits
from arcface_jax.data.indexed import files_of
from arcface_jax.data.splits import Chosen
from arcface_jax.errors import DataError, ImageError
from arcface_jax.runtime import foreign
from arcface_jax.runtime.sealed import array_digest

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_FILE_FORMAT = b"ARROW1"  # the file format, with a footer; datasets writes streams


def is_saved(folder: Path) -> bool:
    """Returns whether a folder has Arrow files, from `save_to_disk` or the hub's cache."""
    if (folder / _STATE).is_file():
        return True
    return folder.is_dir() and bool(files_of(folder, (".arrow",)))


def arrow_files(place: Path, *, split: str = "") -> Chosen:
    """Returns the Arrow files of one split, in their order.

    Args:
      place: the folder of `save_to_disk`, of one split or of several, a folder of the hub's cache,
        or an Arrow file.
      split: the split to read if there are several; "train" by default.

    Returns:
      The files; none if the place is something else.

    Raises:
      DataError: the split does not exist, or separate index files select the rows.
    """
    if place.is_file():
        return Chosen([place], {}) if place.suffix == ".arrow" and not split else splits.NOTHING
    if (place / _SPLITS).is_file():
        return arrow_files(place / _chosen(place, split))
    if not is_saved(place):
        return splits.NOTHING
    if not (place / _STATE).is_file():
        files = files_of(place, (".arrow",))
        files = [file for file in files if not file.name.startswith(("cache-", "tmp"))]
        return splits.by_name(place, files, split)
    return Chosen(_saved(place, split), {})


def _saved(place: Path, split: str) -> list[Path]:
    """Returns the files of a folder of `save_to_disk` with one split."""
    state = _read(place / _STATE)
    if split and split != state.get("_split"):
        raise DataError(
            f"{place} is a single split (its name: {state.get('_split') or 'none'}), not {split}: "
            f"name it without #{split}"
        )
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{place} selects rows by indices: save it again with "
            "dataset.flatten_indices().save_to_disk(FOLDER)"
        )
    files = state.get("_data_files", [])
    names = [str(file.get("filename", "")) for file in files] if _are(dict, files) else [""]
    if not all(names):
        raise DataError(f"{place / _STATE} does not name the set's files: copy it again")
    return [place / name for name in names]


def _chosen(place: Path, split: str) -> str:
    splits = _read(place / _SPLITS).get("splits", [])
    if not _are(str, splits):
        raise DataError(f"{place / _SPLITS} does not name the splits: copy the data set again")
    if (split or "train") in splits:
        return split or "train"
    if len(splits) == 1 and not split:
        return splits[0]
    raise DataError(
        f"{place} has the splits {', '.join(splits) or '(none)'}, not {split or 'train'}: name one "
        f"as {place}#SPLIT"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = foreign.parse_json(foreign.read(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): copy the data set again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not what save_to_disk writes: copy the data set again")
    return content


def _are(kind: type, values: object) -> bool:
    """Returns whether it is a list of values of a type."""
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


class ArrowSource(columnar.TableSource):
    """A column of images (bytes, or a struct with bytes and path) and a column of labels.

    Files are mapped, and a row is read without its neighbors. Labels are as in `ParquetSource`.

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
        self._files, self.ignored = [file.absolute() for file in files], dict(ignored)
        tables = [_mapped(file) for file in self._files]
        found = None
        labels, lengths = [], []
        for path, table in zip(self._files, tables, strict=True):
            found = columnar.find_columns(path, table.schema, columns=columns)
            _validate(path, table, found)
            labels.append(columnar.Labels(path, table[found.label], found.class_names))
            lengths.append(len(table))
        self._ends = np.cumsum(lengths, dtype=np.int64)
        if found is None or not sum(lengths):
            raise DataError(f"{self._files[0].parent}: no row in the Arrow files")
        self._column = found.image
        numbered = columnar.number(labels, where=self.where)
        self._labels, self.num_classes, self.names = numbered

    def where(self, index: int) -> str:
        """Returns the file and the row in it."""
        file, row = self._place(index)
        return f"{self._files[file]}, row {row}"

    def facts(self) -> Mapping[str, int | str]:
        """Returns sizes of the files, and digests of their labels and row counts."""
        return {
            "form": "Arrow",
            "bytes": sum(file.stat().st_size for file in self._files),
            "rows": array_digest(self._ends),
            "labels": array_digest(self._labels),
        }

    def _file(self, chunk: int) -> Path:
        return self._files[chunk]

    def _images(self, chunk: int) -> Any:
        with self._lock:
            if chunk not in self._kept:
                try:
                    self._kept[chunk] = _mapped(self._files[chunk])[self._column]
                except (DataError, KeyError) as error:
                    raise ImageError(str(self._files[chunk]), f"cannot be read: {error}") from error
            return self._kept[chunk]


def _mapped(path: Path) -> Any:
    """Maps the table of a file into memory, without copying it.

    Raises:
      DataError: it is not an Arrow file, or is damaged.
    """
    pyarrow = columnar.import_pyarrow()
    try:
        foreign.require_regular(path)
        with pyarrow.memory_map(str(path)) as file:
            whole = file.read(len(_FILE_FORMAT)) == _FILE_FORMAT
            file.seek(0)
            expanded = arrow_messages.expanded(file, whole=whole)
            columnar.check_expansion(expanded, path.stat().st_size, where=str(path))
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if whole else pyarrow.ipc.open_stream(file)
            table = reader.read_all()
            columnar.check_rows(len(table), path.stat().st_size, where=str(path))
            return table
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        # pyarrow's errors are among these.
        problem = (str(error) or repr(error)).partition("\n")[0][:300]
        raise DataError(f"{path} is not an Arrow file that can be read: {problem}") from error


def _validate(path: Path, table: Any, found: columnar.Columns) -> None:
    """Checks that the columns' offsets stay inside the file, which readers rely on.

    Raises:
      DataError: an offset is outside.
    """
    try:
        for name in (found.image, found.label):
            table[name].validate(full=True)
    except (ValueError, OSError) as error:
        problem = str(error).partition("\n")[0][:300]
        raise DataError(f"{path} is damaged ({problem}): copy the data set again") from error
