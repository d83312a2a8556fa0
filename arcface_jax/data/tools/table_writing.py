"""`data pack --format parquet` and `--format arrow`: write training sets for Hugging Face.

Both have a column `image`, a struct of bytes and path, and a column `label`, a ClassLabel with the
identities' names. An interrupted job starts over.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arcface_jax.config.choices import Bad
from arcface_jax.data import columnar, fingerprint
from arcface_jax.data.source import Sample, Source
from arcface_jax.data.tools import packing
from arcface_jax.data.tools.packing import Journal, Packed, Selection
from arcface_jax.runtime.files import atomic_files, write_atomic

PARQUET, ARROW = "train.parquet", "data-00000-of-00001.arrow"
_TOGETHER = 100
"""Images in a row group, which readers keep in memory as a whole."""


def write_parquet(
    source: Source, selection: Selection, folder: Path, *, bad: Bad = "stop", threads: int = 0
) -> Packed:
    """Writes train.parquet.

    Args:
      source: the training set.
      selection: the images to write, their order and their labels.
      folder: output folder.
      bad: what to do with an image that cannot be read or is not 112 x 112.
      threads: threads that read and check images; 0 for one per processor.

    Raises:
      UserError: the folder already has Parquet files, or pyarrow is not installed.
      ImageError: an image is bad, and `bad` is "stop".
    """
    open_writer = columnar.import_pyarrow().parquet.ParquetWriter
    return _write(
        source, selection, folder / PARQUET, open_writer=open_writer, bad=bad, threads=threads
    )


def write_arrow(
    source: Source, selection: Selection, folder: Path, *, bad: Bad = "stop", threads: int = 0
) -> Packed:
    """Writes a folder in the format of Hugging Face's `save_to_disk`; arguments as in
    `write_parquet`.
    """
    pyarrow = columnar.import_pyarrow()
    made = _write(
        source,
        selection,
        folder / ARROW,
        open_writer=lambda path, schema: pyarrow.ipc.new_stream(str(path), schema),
        bad=bad,
        threads=threads,
    )
    info = {"features": _features(source, selection)}
    state = {
        "_data_files": [{"filename": ARROW}],
        "_fingerprint": packing.fingerprint(source, selection)[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    beside = {"dataset_info.json": info, "state.json": state}
    for name, content in beside.items():
        write_atomic(folder / name, json.dumps(content, indent=2) + "\n")
    return made._replace(files=[*made.files, *(folder / name for name in beside)])


def _write(
    source: Source,
    selection: Selection,
    path: Path,
    *,
    open_writer: Callable[[Path, Any], Any],
    bad: Bad,
    threads: int,
) -> Packed:
    packing.require_new(path.parent, selection)
    path.parent.mkdir(parents=True, exist_ok=True)
    job = packing.fingerprint(source, selection, bad, path.name)
    journal = Journal(path.parent / packing.JOURNAL, job, fingerprint.of_source(source))
    places = range(len(selection.numbers))
    reading = packing.images(source, selection, journal, places=places, bad=bad, threads=threads)
    schema = _schema(_features(source, selection))
    images = 0
    with reading as found, atomic_files(path) as part, open_writer(part, schema) as writer:
        for batch in _batches(found, schema):
            writer.write_batch(batch)
            images += len(batch)
    journal.path.unlink()
    return Packed([path], images, selection.num_classes, list(journal.skipped.values()))


def _batches(found: Iterator[tuple[int, Sample]], schema: Any) -> Iterator[Any]:
    pyarrow = columnar.import_pyarrow()
    while samples := [sample for _, sample in itertools.islice(found, _TOGETHER)]:
        images = [{"bytes": sample.data, "path": None} for sample in samples]
        labels = [sample.label for sample in samples]
        yield pyarrow.RecordBatch.from_pydict({"image": images, "label": labels}, schema=schema)


def _features(source: Source, selection: Selection) -> dict[str, Any]:
    """Returns the columns' types as the library `datasets` describes them."""
    names = list(packing.names_of(source, selection))
    return {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}


def _schema(features: dict[str, Any]) -> Any:
    pyarrow = columnar.import_pyarrow()
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.schema([("image", image), ("label", pyarrow.int64())], metadata=metadata)
