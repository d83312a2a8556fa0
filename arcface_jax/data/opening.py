"""Detect which kind of training set is at a path, and open it."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from arcface_jax import plugins
from arcface_jax.config import DataConfig
from arcface_jax.data import arrow, lists, names, parquet, splits, tfds, webdataset
from arcface_jax.data.arrow import ArrowSource
from arcface_jax.data.files import FilesSource, open_unlabeled, try_folder
from arcface_jax.data.lmdb import LmdbSource, find_lmdb
from arcface_jax.data.parquet import ParquetSource
from arcface_jax.data.recordio.source import RecordSource
from arcface_jax.data.source import Sample, Source
from arcface_jax.data.synthetic.source import NoiseSource, SyntheticSource
from arcface_jax.data.tfds import TfdsSource
from arcface_jax.data.webdataset import WebDatasetSource
from arcface_jax.errors import DataError, ImageError

SYNTHETIC = "synthetic"
NOISE = "noise"


def open_source(data: DataConfig, *, seed: int) -> Source:
    """Detects the kind of training set at `data.path` and opens it.

    Args:
      data: the section whose path names one training set, or several separated by commas.
      seed: random seed of synthetic faces and noise.

    Raises:
      DataError: the path does not exist, or is not a supported training set.
    """
    paths = split_paths(data.path)
    if not all(paths):
        raise DataError(
            f"data.path {data.path!r} has an empty path: set --data.path to a training set, or to "
            f"several with a comma between two ({_KNOWN})"
        )
    opened = [_open_one(path, data, seed=seed) for path in paths]
    return opened[0] if len(opened) == 1 else JoinedSource(opened)


def split_paths(path: str) -> list[str]:
    """Splits `data.path` into its training sets; an existing path may contain commas."""
    # os.path.exists is False for a path that is longer than the system's.
    return [path] if os.path.exists(path) else [part.strip() for part in path.split(",")]


def folder_with(path: str, name: str) -> Path:
    """Returns a training set's folder; of several sets, the first that has the file."""
    places = [_folder(part) for part in split_paths(path)]
    folders = [place if os.path.isdir(place) else place.parent for place in places]
    return next((folder for folder in folders if (folder / name).is_file()), folders[0])


def image_folders(path: str, source: Source) -> list[Path]:
    """Returns the image folders among the training sets of a path.

    Args:
      path: the path, as in `data.path`.
      source: what `open_source` made of it.
    """
    parts = source.parts if isinstance(source, JoinedSource) else [source]
    found = [
        Path(place)
        for place, part in zip(split_paths(path), parts, strict=True)
        if isinstance(part, FilesSource)
    ]
    return [folder for folder in found if folder.is_dir()]


class OpenSource(Protocol):
    """Opens a training set; named in `data.path` as `package.module:name[:ARGUMENT]`."""

    def __call__(self, argument: str, data: DataConfig, *, seed: int) -> Source:
        """Opens the training set.

        Args:
          argument: what follows the second colon of `data.path`; "" without one.
          data: the section of the recipe.
          seed: random seed of the run.
        """
        ...


def _open_one(path: str, data: DataConfig, *, seed: int) -> Source:
    for open_if_known in OPENERS:
        source = open_if_known(path, data, seed=seed)
        if source is not None:
            return source
    folder, (_, split) = _folder(path), tfds.without_split(path)
    if not folder.exists():
        raise DataError(
            f"data.path {path} does not exist: set --data.path to a training set ({_KNOWN})"
        )
    if split:
        raise DataError(
            f"data.path {path}: {folder} has no split {split}: leave out #{split}, or name a split "
            "that it has"
        )
    if not (folder.is_file() or folder.is_dir()):
        raise DataError(f"data.path {folder} is neither a file nor a folder ({_KNOWN})")
    if folder.is_file():
        raise DataError(f"data.path {path} is not a supported training set ({_KNOWN})")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise DataError(
        f"data.path {folder} holds no training set (it holds: {found}): set --data.path to {_KNOWN}"
    )


_KNOWN = (
    "a folder with train.rec and train.idx, a folder of identities' folders, a list of 'path,label'"
    " lines, Parquet files, a folder of Hugging Face's save_to_disk, WebDataset tars, an LMDB, a "
    "TFDS data set, the words synthetic and noise, or package.module:name of your own: docs/data.md"
)


def _synthetic(path: str, data: DataConfig, *, seed: int) -> Source | None:
    if path != SYNTHETIC:
        return None
    drawn = data.synthetic
    return SyntheticSource(
        seed=seed, identities=drawn.identities, images_per_identity=drawn.images_per_identity
    )


def _noise(path: str, data: DataConfig, *, seed: int) -> Source | None:
    if path != NOISE:
        return None
    return NoiseSource(seed=seed, classes=data.noise.classes, images=data.noise.images)


def _tfds(path: str, data: DataConfig, *, seed: int) -> Source | None:
    place = _folder(path)
    known = path.startswith(tfds.PREFIX) or (tfds.is_builder(place) and not arrow.is_saved(place))
    return TfdsSource(path) if known else None


def _plugin(path: str, data: DataConfig, *, seed: int) -> Source | None:
    reference = plugins.parse(path)
    if reference is None:
        return None
    open_own = plugins.load(reference.name, field="data.path")
    return open_own(reference.argument, data, seed=seed)


def _recordio(path: str, data: DataConfig, *, seed: int) -> Source | None:
    place = Path(path)
    shard = data.shard_images if data.order == "shards" else 0
    if any((place / name).is_file() for name in ("train.rec", "train.idx")):
        return RecordSource(place / "train.rec", shard=shard, label_index=data.label_index)
    if place.is_file() and place.suffix in (".rec", ".idx"):
        rec = place.with_suffix(".rec")
        return RecordSource(rec, shard=shard, label_index=data.label_index)
    return None


def _parquet(path: str, data: DataConfig, *, seed: int) -> Source | None:
    place, split = _folder(path), tfds.without_split(path)[1]
    if place.is_file() and place.suffix == ".parquet" and not split:
        return ParquetSource([place], columns=data.columns)
    found = parquet.parquet_files(place, split=split) if place.is_dir() else splits.NOTHING
    if not found.files:
        return None
    return ParquetSource(found.files, columns=data.columns, ignored=found.ignored)


def _arrow(path: str, data: DataConfig, *, seed: int) -> Source | None:
    place, split = _folder(path), tfds.without_split(path)[1]
    found = arrow.arrow_files(place, split=split)
    if not found.files:
        return None
    return ArrowSource(found.files, columns=data.columns, ignored=found.ignored)


def _lmdb(path: str, data: DataConfig, *, seed: int) -> Source | None:
    place = find_lmdb(Path(path))
    if place is None:
        return None
    return LmdbSource(place, columns=data.columns, level=data.identity_level)


def _webdataset(path: str, data: DataConfig, *, seed: int) -> Source | None:
    place, split = _folder(path), tfds.without_split(path)[1]
    found = webdataset.find_shards(place, split=split)
    if not found.files:
        return None
    return WebDatasetSource(
        found.files, columns=data.columns, level=data.identity_level, ignored=found.ignored
    )


def _list(path: str, data: DataConfig, *, seed: int) -> Source | None:
    place = Path(path)
    if not (place.is_file() and place.suffix.lower() in lists.SUFFIXES):
        return None
    return lists.open_list(place, columns=data.columns)


def _identity_folders(path: str, data: DataConfig, *, seed: int) -> Source | None:
    place = Path(path)
    if not place.is_dir():
        return None
    if data.unlabeled:
        return open_unlabeled(place)
    return try_folder(place, level=data.identity_level)


# In this order; each returns None for other kinds. To add a kind of training set, write a function
# with this signature and add one line here.
OPENERS: tuple[Callable[..., Source | None], ...] = (
    _synthetic,
    _noise,
    _tfds,
    _plugin,
    _recordio,
    _arrow,
    _lmdb,
    _webdataset,
    _parquet,
    _list,
    _identity_folders,
)


def _folder(path: str) -> Path:
    """Returns the folder of a path that may end in #SPLIT; an existing path may contain a #."""
    return Path(tfds.without_split(path)[0])


class JoinedSource(Source):
    """Several training sets, concatenated; each set's labels follow those before it."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts]).tolist()
        self._offsets = np.cumsum([0, *(part.num_classes for part in parts)]).tolist()
        self.num_classes = self._offsets[-1]
        self.generated = all(part.generated for part in parts)
        self.names = names.joined([(part.names, part.num_classes) for part in parts])
        units = {part.unit for part in parts}
        self.unit = units.pop() if len(units) == 1 else "images"
        self.ignored = sum((Counter(part.ignored) for part in parts), Counter())
        self.notes = tuple(
            f"set {number}: {note}"
            for number, part in enumerate(parts, start=1)
            for note in part.notes
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Returns an image, (112, 112, 3) uint8 RGB, and its label."""
        part, inside = self._locate(index)
        image, label = self.parts[part][inside]
        return image, label + self._offsets[part]

    def read(self, index: int) -> Sample:
        """Returns the image's bytes and its label."""
        part, inside = self._locate(index)
        data, label = self.parts[part].read(inside)
        return Sample(data, label + self._offsets[part])

    def load(
        self, numbers: np.ndarray, rows: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> list[tuple[int, ImageError]]:
        """Loads images, each from its own part."""
        of = np.searchsorted(self._ends, numbers, side="right")
        failed: list[tuple[int, ImageError]] = []
        for number in np.unique(of).tolist():
            part, here = self.parts[number], of == number
            begin = self._ends[number] - len(part)
            failed += part.load(numbers[here] - begin, rows[here], images, labels)
            labels[rows[here]] += self._offsets[number]
        return failed

    def labels(self) -> np.ndarray:
        """Returns (len,) int32; -1 where it cannot be read."""
        each = [part.labels() for part in self.parts]
        moved = [
            np.where(x < 0, x, x + np.int32(offset))
            for x, offset in zip(each, self._offsets, strict=False)  # the last offset is the total
        ]
        return np.concatenate(moved).astype(np.int32)

    def where(self, index: int) -> str:
        """Describes an image's place as its part does."""
        part, inside = self._locate(index)
        return self.parts[part].where(inside)

    def facts(self) -> Mapping[str, int | str]:
        """Returns the facts of each part, and its numbers of images and identities."""
        facts: dict[str, int | str] = {"form": f"{len(self.parts)} sets joined"}
        for number, part in enumerate(self.parts, start=1):
            own = {"images": len(part), "classes": part.num_classes, **part.facts()}
            facts |= {f"set {number} {name}": value for name, value in own.items()}
        return facts

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (self._ends[part - 1] if part else 0)
