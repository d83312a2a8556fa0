"""`data.py to-tfds`: write any training set as ArrayRecord files that TFDS opens by their folder.

Shards are completed one by one, so an interrupted job resumes with the next.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from arcface_jax.config.choices import Bad
from arcface_jax.data import fingerprint
from arcface_jax.data import names as identities
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.data.names import Names
from arcface_jax.data.source import Sample, Source
from arcface_jax.data.tfds import import_tfds
from arcface_jax.data.tools import packing
from arcface_jax.data.tools.packing import Journal, Packed, Selection
from arcface_jax.errors import DataError, UserError
from arcface_jax.runtime.files import atomic_files

_VERSION = "1.0.0"
_SPLIT = "train"
_OPTIONS = "group_size:1"  # each image can be read individually


def write(
    source: Source,
    selection: Selection,
    folder: Path,
    *,
    name: str,
    shard_images: int,
    bad: Bad = "stop",
    threads: int = 0,
) -> Packed:
    """Writes FOLDER/NAME/1.0.0 with shards, features.json and dataset_info.json.

    `tfds.data_source(NAME, split="train", data_dir=FOLDER)` opens it.

    Args:
      source: the training set.
      selection: the images to write, their order and their labels.
      folder: data directory of TFDS.
      name: name of the data set.
      shard_images: images per shard.
      bad: what to do with an image that cannot be read or is not 112 x 112.
      threads: threads that read and check images; 0 for one per processor.

    Raises:
      UserError: TFDS does not accept the name, it is taken, or a package is missing.
      ImageError: an image is bad, and `bad` is "stop".
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(f"--name {name}: TFDS takes lower-case letters, digits and underscores")
    if not len(selection.numbers):
        raise DataError("there is no image to write: nothing is left of the identities asked for")
    target = folder / name / _VERSION
    if (target / "dataset_info.json").exists():
        raise UserError(f"{target} is a data set already: choose another --name, or remove it")
    target.mkdir(parents=True, exist_ok=True)
    job = packing.fingerprint(source, selection, bad, shard_images)
    journal = Journal(target / packing.JOURNAL, job, fingerprint.of_source(source))
    count = -(-len(selection.numbers) // shard_images)
    features = _features(source, selection)
    lengths, sizes = [], []
    for shard in range(count):
        path = target / f"{name}-{_SPLIT}.array_record-{shard:05d}-of-{count:05d}"
        places = range(shard * shard_images, min((shard + 1) * shard_images, len(selection.labels)))
        if not journal.has(path):
            with packing.images(
                source, selection, journal, places=places, bad=bad, threads=threads
            ) as found:
                _write_shard(path, features, found)
            journal.finish(path)
        lengths.append(len(places) - sum(place in journal.skipped for place in places))
        sizes.append(path.stat().st_size)
    _write_metadata(target, features, name=name, lengths=lengths, size=sum(sizes))
    identities.write(target, packing.names_of(source, selection))
    journal.path.unlink()
    files = sorted(target.iterdir())
    return Packed(files, sum(lengths), selection.num_classes, list(journal.skipped.values()))


def _features(source: Source, selection: Selection) -> Any:
    """Returns the features of an example, in the first image's encoding."""
    tfds = import_tfds()
    jpeg = source.read(int(selection.numbers[0])).data[:2] == b"\xff\xd8"
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=shape, encoding_format="jpeg" if jpeg else "png"),
            "label": _class_label(tfds, packing.names_of(source, selection)),
        }
    )


def _class_label(tfds: Any, table: Names) -> Any:
    """Makes the label feature, with the identities' names if TFDS can store them: unique, one a
    line.
    """
    names = list(table)
    kept = len(set(names)) == len(names) and all(name == " ".join(name.split()) for name in names)
    if kept and any(name != str(label) for label, name in enumerate(names)):
        return tfds.features.ClassLabel(names=names)
    return tfds.features.ClassLabel(num_classes=len(names))


def _write_shard(path: Path, features: Any, found: Any) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    path.with_name(f"{path.name}.incomplete").unlink(missing_ok=True)  # from earlier versions
    with atomic_files(path) as part:
        writer = ArrayRecordWriter(str(part), _OPTIONS)
        try:
            for _, sample in found:
                writer.write(_serialized(features, sample))
        finally:
            writer.close()


def _serialized(features: Any, sample: Sample) -> bytes:
    example = {"image": sample.data, "label": np.int64(sample.label)}
    return features.serialize_example(features.encode_example(example))


def _write_metadata(
    target: Path, features: Any, *, name: str, lengths: list[int], size: int
) -> None:
    tfds = import_tfds()
    template = tfds.core.ShardedFileTemplate(
        data_dir=target, dataset_name=name, split=_SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=_SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=target, features=features, split_infos=[split], check_data=False
    )
