"""`data.py split` and writing a folder: identities for training and others for evaluation."""

from pathlib import Path

import numpy as np

from arcface_jax.config.choices import Bad
from arcface_jax.data import fingerprint, names
from arcface_jax.data.source import Source
from arcface_jax.data.tools import packing, reading
from arcface_jax.data.tools.packing import Journal, Packed, Selection
from arcface_jax.errors import DataError, ImageError, UserError
from arcface_jax.runtime.files import PART, below, write_atomic


def divide(
    labels: np.ndarray,
    *,
    fraction: float,
    seed: int,
    min_images: int = 1,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Divides the identities that have images at random.

    Args:
      labels: (n,) identity of each image.
      fraction: fraction of the identities that go to evaluation, in (0, 1).
      seed: random seed of the choice.
      min_images: identities with fewer images are left out of both.
      groups: (C,) int; identities of one group stay on one side. By default each is its own.

    Returns:
      The identities to train on, and those to evaluate on, ascending.

    Raises:
      UserError: one side would be empty.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--fraction {fraction} must be between 0 and 1: the share to evaluate on")
    identities, counts = np.unique(labels[labels >= 0], return_counts=True)
    present = len(identities)
    identities = identities[counts >= min_images]
    held_out = round(fraction * len(identities))
    if len(identities) < 2:
        fix = "use a smaller --min-images" if present > 1 else "name a set with more identities"
        raise UserError(
            f"--min-images {min_images} leaves {len(identities)} of {present} identities, and a "
            f"split needs two: {fix}"
        )
    if not 0 < held_out < len(identities):
        raise UserError(
            f"--fraction {fraction} of {len(identities)} identities with {min_images} images or "
            f"more leaves {held_out} to evaluate on: choose another --fraction"
        )
    order = np.random.default_rng(seed).permutation(identities)
    if groups is None:
        return np.sort(order[held_out:]), np.sort(order[:held_out])
    evaluated = np.isin(groups[identities], groups[order[:held_out]])
    if evaluated.all():
        raise UserError(
            f"--fraction {fraction} leaves no identity to train on, because groups stay "
            "on one side: choose a smaller fraction"
        )
    return identities[~evaluated], identities[evaluated]


def write_folder(
    source: Source, selection: Selection, folder: Path, *, bad: Bad = "stop", threads: int = 0
) -> Packed:
    """Writes a folder per identity, with the images as stored.

    Folder names are numbers with leading zeros, so that names and labels sort alike; identities.txt
    has the identities' names. An interrupted call resumes.

    Args:
      source: the training set.
      selection: the images to write, their order and their labels.
      folder: output folder; new, empty, or that of the interrupted call.
      bad: what to do with an image that cannot be read or is not 112 x 112.
      threads: threads that read, check and write; 0 for one per processor.

    Raises:
      UserError: the folder has other files, or another unfinished job.
      ImageError: an image is bad, and `bad` is "stop".
    """
    if not len(selection.numbers):
        raise DataError("there is no image to pack: nothing is left of the identities asked for")
    journal = _journal(folder, source, selection, bad)
    places = {number: place for place, number in enumerate(selection.numbers.tolist())}
    for label in np.unique(selection.labels).tolist():
        below(folder, f"{label:07d}/image")

    def copy(number: int) -> None:
        place = places[number]
        stem = folder / f"{int(selection.labels[place]):07d}" / f"{place:09d}"
        if any(stem.with_suffix(suffix).exists() for suffix in (".jpg", ".png")):
            return
        data = packing.checked(source, number).data
        target = stem.with_suffix(".jpg" if data[:2] == b"\xff\xd8" else ".png")
        write_atomic(target, data, durable=False)  # syncing millions of files takes hours

    numbers = selection.numbers[packing.remaining(range(len(selection.numbers)), journal)]
    with reading.in_order(numbers, copy, what="writing", threads=threads) as results:
        for number, found in results:
            if isinstance(found, ImageError):
                if bad == "stop":
                    raise found
                journal.skip(places[number], str(found))
    packing.require_good(selection, journal)
    table = names.write(folder, packing.names_of(source, selection))
    journal.path.unlink()
    skipped = list(journal.skipped.values())
    images = len(selection.numbers) - len(skipped)
    return Packed([folder, table], images, selection.num_classes, skipped)


def _journal(folder: Path, source: Source, selection: Selection, bad: Bad) -> Journal:
    """Opens the folder's unfinished job, or starts one in an empty folder.

    Raises:
      UserError: the folder has files of no unfinished job, or of another one.
    """
    path = folder / packing.JOURNAL
    if folder.exists() and not path.exists():
        others = (entry.name for entry in folder.iterdir() if not _is_leftover(entry.name))
        if other := next(others, None):
            raise UserError(
                f"{folder} is not empty (it has {other}): name another folder, or remove it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    job = packing.fingerprint(source, selection, bad, "folder")
    journal = Journal(path, job, fingerprint.of_source(source))
    if journal.resumed:
        for part in folder.glob(f"*/*{PART}"):  # of a killed call; they have the image's content
            part.unlink()
    return journal


def _is_leftover(name: str) -> bool:
    return name.startswith(".") or name.endswith(PART)
