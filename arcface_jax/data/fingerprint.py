"""Fingerprints: identify the images something was made from, independently of their location.

The fingerprint of a training set is plain JSON: counts, facts that its source has without reading
an image (sizes, digests of the index), and a keyed sample of the stored images. It depends on
neither path nor modification time, so data may be moved or copied; the same images in another form
(a record file, Parquet) count as another set, because their order may differ. Comparing two
fingerprints names every difference.

A changed image is noticed if it is in the sample or changes a size or the index: with a share p of
the images replaced, the sample misses all of them with probability (1 - p)^128.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from arcface_jax.data.order import Order
from arcface_jax.data.source import Source
from arcface_jax.errors import DataError, ImageError, UserError
from arcface_jax.runtime import launch

Fingerprint = dict[str, Any]
"""Plain JSON; `differences` compares two."""

SAMPLE = 128
"""Number of images whose bytes are read."""

_VERSION = 1
_KEY = 20260101  # key of the sample; any fixed number
_THREADS = 16  # threads, which mostly wait for a disk
_UNREADABLE = "unreadable"


def of_source(source: Source) -> Fingerprint:
    """Computes the fingerprint of a training set; reads at most `SAMPLE` images.

    Raises:
      DataError: the set cannot be read.
    """
    sample = [] if source.generated else _of_images(source, sample_of(len(source)))
    return {
        "version": _VERSION,
        "images": len(source),
        "classes": source.num_classes,
        "facts": dict(source.facts()),
        "sample": sample,
    }


def agreed(source: Source, *, name: str) -> Fingerprint:
    """Returns the fingerprint of the training set that all processes of this run read.

    A collective operation.

    Args:
      source: as this process opened it.
      name: `data.path`, for the message.

    Raises:
      DataError: processes read different data, or one cannot read its own; the message names
        their hosts.
    """
    found: Fingerprint = {}
    failure: Exception | None = None
    try:
        found = of_source(source)
    except (UserError, OSError) as error:  # reported in all processes, which wait for this one
        failure = error
    own = {"host": launch.host_name(), "data": found, "problem": str(failure or "")}
    first, *others = everyone = [json.loads(text) for text in launch.gather_text(json.dumps(own))]
    if failure is not None and not others:
        raise failure
    if unread := [f"{x['host']}: {x['problem']}" for x in everyone if x.get("problem")]:
        raise DataError(
            f"data.path {name} cannot be read in {len(unread)} of {len(everyone)} processes "
            f"({'; '.join(unread)}): restore the data on these hosts"
        )
    wrong = []
    for number, other in enumerate(others, start=1):
        then, now = f"in process 0 ({first['host']})", f"in process {number} ({other['host']})"
        if different := differences(first["data"], other["data"], then=then, now=now):
            wrong.append(f"process {number} ({other['host']}): {', '.join(different)}")
    if wrong:
        raise DataError(
            f"data.path {name} is not the same data in all processes; compared with process 0 "
            f"({first['host']}), {'; '.join(wrong)}. Copy the data of one host to the others"
        )
    return found


def digest(found: Fingerprint) -> str:
    """Hashes a fingerprint to 64 characters, for caches that only need to detect a change."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def of_names(names: Sequence[str], *arrays: np.ndarray) -> str:
    """Returns the SHA-256 of a list of names and of arrays: the images of a list, and their
    crops.
    """
    total = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape"))
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def of_arrays(*arrays: np.ndarray) -> str:
    """Returns the SHA-256 of the bytes of arrays in memory."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def of_folder(folder: Path, names: Sequence[str], points: Mapping[str, np.ndarray] | None) -> str:
    """Returns the SHA-256 of files' names and sizes, and of their alignment points, if any.

    Args:
      folder: folder of the files.
      names: names of the files, from there.
      points: (5, 2) by name.
    """
    total = hashlib.sha256()
    for name in names:
        line = f"{name}\0{(folder / name).stat().st_size}\0"
        total.update(line.encode("utf-8", "surrogateescape"))
        if points is not None and name in points:
            total.update(np.asarray(points[name], np.float64).tobytes())
    return total.hexdigest()


def of_files(paths: Sequence[Path], *, read: Callable[[Path], bytes]) -> str:
    """Returns the SHA-256 of the bytes of a keyed sample of files.

    Args:
      paths: paths of the files.
      read: returns a file's bytes; called from threads, and its exceptions propagate.
    """
    numbers = sample_of(len(paths)).tolist()
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(lambda number: _short(read(paths[number])), numbers)
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def sample_of(count: int) -> np.ndarray:
    """Returns (n,) int64 ascending: the numbers of the images that represent a set of `count`."""
    if count <= SAMPLE:
        return np.arange(count)
    return np.sort(Order(count, 1, count, _KEY).images(0, np.arange(SAMPLE)))


def differences(
    stored: Fingerprint, found: Fingerprint, *, then: str = "then", now: str = "now"
) -> list[str]:
    """Lists the differences between two fingerprints, one phrase for each kind.

    Args:
      stored: fingerprint of the data that something was made from.
      found: fingerprint of the present data.
      then: word for the stored side in the phrases.
      now: word for the present side in the phrases.
    """
    different = [
        f"{stored[name]} {name} {then} and {found[name]} {now}"
        for name in ("images", "classes")
        if stored[name] != found[name]
    ]
    old, new = stored["facts"], found["facts"]
    for name in dict.fromkeys((*old, *new)):
        a, b = old.get(name), new.get(name)
        if a != b and isinstance(a, str) and isinstance(b, str) and name != "form":
            different.append(f"{name} differ")
        elif a != b and old.get("form") == new.get("form"):
            different.append(f"{name}: {a} {then} and {b} {now}")
        elif a != b and name == "form":
            different.append(f"form: {a} {then} and {b} {now}")
    if stored["images"] == found["images"]:
        different += _different_images(stored["sample"], found["sample"], stored["images"])
    return different


def comparable(stored: object) -> TypeGuard[Fingerprint]:
    """Returns whether a run's stored record is a fingerprint that this version can compare."""
    return isinstance(stored, dict) and stored.get("version") == _VERSION


def _different_images(stored: list[str], found: list[str], count: int) -> list[str]:
    if len(stored) != len(found) or not stored:
        return []  # one side or both are computed images
    pairs = [
        (number, a.split(":"), b.split(":"))
        for number, a, b in zip(sample_of(count).tolist(), stored, found, strict=True)
        if _UNREADABLE not in (a, b)  # the run has a limit of its own for unreadable images
    ]
    different = []
    for what, place in (("labels of {} sampled images differ", 0), ("{} sampled images differ", 1)):
        wrong = [number for number, a, b in pairs if a[place] != b[place]]
        if wrong:
            phrase = what.format(f"{len(wrong)} of {len(stored)}")
            different.append(f"{phrase} (first: image {wrong[0]})")
    return different


def _of_images(source: Source, numbers: np.ndarray) -> list[str]:
    """Returns LABEL:DIGEST of each image."""

    def look(number: int) -> str:
        try:
            data, label = source.read(number)
        except ImageError:
            return _UNREADABLE
        return f"{label}:{_short(data)}"

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(look, numbers.tolist()))


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
