"""`data pack --format webdataset`: write any training set as tar files of `KEY.jpg` and `KEY.cls`.

Shards are completed one by one, so an interrupted job resumes with the next.
"""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from arcface_jax.config.choices import Bad
from arcface_jax.data import fingerprint, formats, names
from arcface_jax.data.source import Sample, Source
from arcface_jax.data.tools import packing
from arcface_jax.data.tools.packing import Journal, Packed, Selection
from arcface_jax.runtime.files import atomic_files

SHARD_IMAGES = 10_000
"""Images per tar file, about 100 MB."""

_SUFFIXES = {"JPEG": "jpg", "WebP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


def write(
    source: Source, selection: Selection, folder: Path, *, bad: Bad = "stop", threads: int = 0
) -> Packed:
    """Writes train-000000.tar and so on, and the identities' names.

    Args:
      source: the training set.
      selection: the images to write, their order and their labels.
      folder: output folder; rerun to resume.
      bad: what to do with an image that cannot be read or is not 112 x 112.
      threads: threads that read and check images; 0 for one per processor.

    Raises:
      UserError: the folder has finished shards, or another unfinished job.
      ImageError: an image is bad, and `bad` is "stop".
    """
    packing.require_new(folder, selection, shards="*.tar")
    folder.mkdir(parents=True, exist_ok=True)
    job = packing.fingerprint(source, selection, bad, "webdataset", SHARD_IMAGES)
    journal = Journal(folder / packing.JOURNAL, job, fingerprint.of_source(source))
    total = len(selection.numbers)
    shards = []
    for begin in range(0, total, SHARD_IMAGES):
        path = folder / f"train-{len(shards):06d}.tar"
        places = range(begin, min(begin + SHARD_IMAGES, total))
        if not journal.has(path):
            with packing.images(
                source, selection, journal, places=places, bad=bad, threads=threads
            ) as found:
                _write_shard(path, found)
            journal.finish(path)
        shards.append(path)
    table = names.write(folder, packing.names_of(source, selection))
    journal.path.unlink()
    images = total - len(journal.skipped)
    return Packed([*shards, table], images, selection.num_classes, list(journal.skipped.values()))


def _write_shard(path: Path, found: Iterable[tuple[int, Sample]]) -> None:
    with (
        atomic_files(path) as part,
        tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for place, (data, label) in found:
            suffix = _SUFFIXES.get(formats.sniff(data[: formats.HEAD]) or "", "png")
            for name, content in ((suffix, data), ("cls", b"%d" % label)):
                member = tarfile.TarInfo(f"{place:09d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
