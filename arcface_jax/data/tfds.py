"""TensorFlow Datasets stored as ArrayRecord, read without TensorFlow."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arcface_jax.data.images import encode
from arcface_jax.data.names import Names
from arcface_jax.data.source import Sample, Source, whole_label
from arcface_jax.errors import DataError, ImageError, UserError, install
from arcface_jax.runtime import sealed

PREFIX = "tfds:"


def import_tfds() -> Any:
    """The module `tensorflow_datasets`.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"data sets of TFDS need tensorflow-datasets ({error}): {install('tfds')}"
        ) from error
    return tfds


class TfdsSource(Source):
    """A data set with the features `image` and `label`.

    A ClassLabel with names gives the identities theirs.

    Args:
      path: `tfds:NAME@DATA_DIR#SPLIT` (data directory and split may be left out), or the folder
        with its `dataset_info.json`, `#SPLIT` after it where it is not `train`.

    Raises (the constructor): DataError where it is not there, or has no image and label.
    """

    unit = "examples"

    def __init__(self, path: str):
        self._path = path
        self._open()
        features = self._data.dataset_info.features
        if not {"image", "label"} <= set(features):
            raise DataError(
                f"{path} has the features {', '.join(sorted(features))}: it needs 'image' "
                "and 'label'"
            )
        known = getattr(features["label"], "num_classes", None)
        self.num_classes = int(known or self.labels().max() + 1)
        words: list[str] = getattr(features["label"], "names", None) or []
        numbers = all(word == str(label) for label, word in enumerate(words))
        self.names = None if numbers else Names(words)

    def _open(self) -> None:
        tfds = import_tfds()
        where, split = without_split(self._path)
        options = {
            "split": split or "train",
            "decoders": {"image": tfds.decode.SkipDecoding()},
        }
        try:
            if where.startswith(PREFIX):
                name, _, folder = where.removeprefix(PREFIX).partition("@")
                options |= {"data_dir": os.path.expanduser(folder) or None, "download": False}
                self._data = tfds.data_source(name, **options)
            else:
                self._data = tfds.builder_from_directory(where).as_data_source(**options)
        except Exception as error:  # of many types, over the versions of tfds
            message = re.sub(r"\s+", " ", str(error))[:300]
            raise DataError(
                f"{self._path} cannot be opened as an ArrayRecord data set of TFDS: {message} "
                "(the path is tfds:NAME@DATA_DIR#SPLIT, or the folder that has dataset_info.json)"
            ) from error

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_data"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> Sample:
        """The image's bytes and its label.

        Raises:
          ImageError: the example cannot be read, or its label is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        try:
            example = self._data[index]
        except Exception as error:  # array_record raises what its C++ does
            raise ImageError(self.where(index), f"cannot be read: {error}") from error
        label = whole_label(float(example["label"]), where=self.where(index))
        if label >= self.num_classes:
            raise ImageError(
                self.where(index),
                f"label {label} is outside the {self.num_classes} classes of "
                "features.json; recreate the data set",
            )
        image = example["image"]
        return Sample(image if isinstance(image, bytes) else encode(np.asarray(image)), label)

    def labels(self) -> np.ndarray:
        """(len,) int32; every example is read for it, which takes a while."""
        return np.array([self._data[i]["label"] for i in range(len(self))], np.int32)

    def where(self, index: int) -> str:
        """The data set and the example's number."""
        return f"{self._path}, example {index}"

    def facts(self) -> Mapping[str, int | str]:
        """The split, and a digest of the sizes of all splits and shards."""
        splits = {
            name: [split.num_bytes, list(split.shard_lengths)]
            for name, split in self._data.dataset_info.splits.items()
        }
        shards = sealed.digest(json.dumps(splits, sort_keys=True).encode())
        return {"form": "TFDS", "split": without_split(self._path)[1] or "train", "shards": shards}


def without_split(path: str) -> tuple[str, str]:
    """A path and the split that follows its last #; a folder that exists may have a # itself."""
    folder = path.removeprefix(PREFIX).partition("@")[2] if path.startswith(PREFIX) else path
    if "#" not in path or os.path.exists(os.path.expanduser(folder or ".")):
        return path, ""
    where, _, split = path.rpartition("#")
    return where, split


def is_builder(folder: Path) -> bool:
    """Whether a folder is a data set that TFDS wrote."""
    return (folder / "dataset_info.json").is_file()
