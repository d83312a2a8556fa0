"""TensorFlow Datasets stored as ArrayRecord, read without TensorFlow."""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arcface_jax.data import names
from arcface_jax.data.images import encode
from arcface_jax.data.names import Names
from arcface_jax.data.source import Sample, Source, whole_label
from arcface_jax.errors import DataError, ImageError, UserError, install
from arcface_jax.runtime import foreign, sealed

PREFIX = "tfds:"


def import_tfds() -> Any:
    """Returns the module `tensorflow_datasets`.

    Raises:
      UserError: tensorflow_datasets is not installed.
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

    Identities are named if `label` is a ClassLabel with names.

    Args:
      path: `tfds:NAME@DATA_DIR#SPLIT` (data directory and split are optional), or the folder with
        its `dataset_info.json`, followed by `#SPLIT` if it is not `train`.

    Raises (the constructor): DataError if it does not exist, or has no image and label.
    """

    unit = "examples"
    num_classes = 0  # not known yet

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
        self.num_classes = int(known or self.labels().max(initial=-1) + 1)
        if self.num_classes < 1:
            raise DataError(f"{path} has no example with a label: write the data set again")
        names.check_count(self.num_classes, len(self), where=path)
        words: list[str] = getattr(features["label"], "names", None) or []
        numbers = all(word == str(label) for label, word in enumerate(words))
        self.names = None if numbers else Names(words)

    def _open(self) -> None:
        tfds = import_tfds()
        where, split = without_split(self._path)
        for folder in _folders(where):
            _check_folder(folder)
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
        except Exception as error:  # the type varies with the version of tfds
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
        """Returns the image's bytes and its label.

        Raises:
          ImageError: the example cannot be read, or its label is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        try:
            example = self._data[index]
        except Exception as error:  # array_record raises its C++ exceptions
            problem = (str(error) or repr(error)).partition("\n")[0][:200]
            raise ImageError(self.where(index), f"cannot be read: {problem}") from error
        label = whole_label(self._label(example, index), where=self.where(index))
        if 0 < self.num_classes <= label:
            raise ImageError(
                self.where(index),
                f"label {label} is outside the {self.num_classes} classes of "
                "features.json; recreate the data set",
            )
        image = example["image"]
        if isinstance(image, bytes):
            return Sample(image, label)
        values = np.asarray(image)
        if values.ndim != 3 or values.dtype != np.uint8:
            raise ImageError(self.where(index), f"its image is {values.shape} {values.dtype}")
        return Sample(encode(values), label)

    def _label(self, example: Mapping[str, Any], index: int) -> float:
        try:
            return float(example["label"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ImageError(self.where(index), "has no label", kind="no label") from error

    def labels(self) -> np.ndarray:
        """Returns (len,) int32, -1 for none; slow, because it reads every example."""
        found = np.full(len(self), -1, np.int32)
        for index in range(len(self)):
            with contextlib.suppress(ImageError):
                found[index] = self.read(index).label
        return found

    def where(self, index: int) -> str:
        """Returns the data set and the example's number."""
        return f"{self._path}, example {index}"

    def facts(self) -> Mapping[str, int | str]:
        """Returns the split, and a digest of the sizes of all splits and shards."""
        splits = {
            name: [split.num_bytes, list(split.shard_lengths)]
            for name, split in self._data.dataset_info.splits.items()
        }
        shards = sealed.digest(json.dumps(splits, sort_keys=True).encode())
        return {"form": "TFDS", "split": without_split(self._path)[1] or "train", "shards": shards}


# TFDS's own features; it would import the module of any other one that a data set names.
_FEATURES = re.compile(
    r"tensorflow_datasets\.core\.features\."
    r"(audio_feature|bounding_boxes|class_label_feature|dataset_feature|features_dict|"
    r"image_feature|labeled_image|scalar|sequence_feature|tensor_feature|text_feature|"
    r"translation_feature|video_feature)\.[A-Z][A-Za-z]*"
)
_CLASS_NAMES = ("pythonClassName", "python_class_name", "type")  # the last one until 2022
_MOST_JSON = 1 << 28  # bytes


def _folders(where: str) -> list[Path]:
    """Returns a data set's folders with a `features.json`: one, or one per version if it is
    named.
    """
    if not where.startswith(PREFIX):
        return [Path(where)]
    name, _, folder = where.removeprefix(PREFIX).partition("@")
    top = Path(os.path.expanduser(folder or "~/tensorflow_datasets")) / re.split("[/:]", name)[0]
    return [file.parent for file in top.rglob("features.json")] if folder or top.is_dir() else []


def _check_folder(folder: Path) -> None:
    """Checks that opening a data set is safe: TFDS imports what its files name, and waits for
    pipes.

    Raises:
      DataError: a file is not a regular file, or names code.
    """
    path = folder
    try:
        for path in sorted(folder.iterdir()):
            if not path.is_dir():
                foreign.require_regular(path)
            if path.suffix == ".json":
                content = foreign.parse_json(foreign.read(path, most=_MOST_JSON))
                if path.name == "features.json":
                    _check_features(path, content)
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}): copy the data set again"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): copy the data set again") from error


def _check_features(path: Path, content: Any) -> None:
    waiting = [content]
    while waiting:
        value = waiting.pop()
        waiting += value if isinstance(value, list) else []
        for name, item in value.items() if isinstance(value, dict) else ():
            waiting.append(item)
            named = isinstance(item, str) and (name != "type" or "." in item)
            if name in _CLASS_NAMES and named and not _FEATURES.fullmatch(item):
                raise DataError(
                    f"{path} names the class {item[:80]!r}, which is not one of TFDS's features "
                    f"and is not imported; write the data set with features of TFDS"
                )


def without_split(path: str) -> tuple[str, str]:
    """Splits off the split after a path's last #; the name of an existing folder may contain a
    #.
    """
    folder = path.removeprefix(PREFIX).partition("@")[2] if path.startswith(PREFIX) else path
    if "#" not in path or (folder and os.path.exists(os.path.expanduser(folder))):
        return path, ""
    where, _, split = path.rpartition("#")
    return where, split


def is_builder(folder: Path) -> bool:
    """Returns whether TFDS wrote the folder."""
    return (folder / "dataset_info.json").is_file()
