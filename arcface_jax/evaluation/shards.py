"""Embeddings of many images, in shards on disk: a killed run goes on where it was.

FOLDER/settings.json says what the shards are of; FOLDER/00000.npy and so on are (rows, k, D)
float32: f(image), and with mirroring f(image) + f(mirrored image). A shard is there whole or not at
all, for it is renamed into its place.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from arcface_jax.data import faces
from arcface_jax.data.images import IMAGE_SIZE, decode_any_size
from arcface_jax.errors import DataError
from arcface_jax.evaluation.embed import Embed

SETTINGS = "settings.json"
ROWS = 2048
"""Images in a shard: two shards of images are in memory, 154 MB."""

Load = Callable[[int], np.ndarray]
"""An image's number to (112, 112, 3) uint8 RGB; called from threads."""
HostRows = Callable[[int], np.ndarray]
"""A number of images to (n,) bool: those of this host's devices, see `Network`."""


class Features(NamedTuple):
    """Embeddings of n images on disk."""

    folder: Path
    num_images: int

    def read(self, *, mirrored: bool) -> np.ndarray:
        """(n, D) float32: f(image), or f(image) + f(mirrored image)."""
        out: np.ndarray | None = None
        for number, start in enumerate(range(0, self.num_images, ROWS)):
            shard = np.load(_path(self.folder, number), mmap_mode="r")
            if out is None:
                out = np.empty((self.num_images, shard.shape[2]), np.float32)
            out[start : start + len(shard)] = shard[:, int(mirrored)]
        if out is None:
            raise DataError(f"{self.folder}: no images were embedded")
        return out


def aligned_image(path: Path, landmarks: np.ndarray) -> np.ndarray:
    """A loose crop, moved by its five points to (112, 112, 3) uint8 RGB.

    Raises:
      DataError: there is no such image, or it cannot be decoded.
    """
    return faces.align(decode_any_size(read_bytes(path), where=str(path)), landmarks)


def read_bytes(path: Path) -> bytes:
    """A file that a list of images names.

    Raises:
      DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): the list of images names it; unpack the "
            "images again"
        ) from None


def digest(names: Sequence[str], *arrays: np.ndarray) -> str:
    """SHA-256 of a list of names and of arrays: which images, and how they are cut."""
    total = hashlib.sha256("\n".join(names).encode())
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def extract(
    embed: Embed,
    load: Load,
    *,
    names: Sequence[str],
    folder: Path,
    settings: Mapping[str, Any],
    mirrored: bool,
    threads: int = 4,
    host_rows: HostRows | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Features:
    """Embeds all images whose shards are not there yet.

    While the devices embed one shard, threads read and align the next. With several hosts each
    reads what its devices take, and the first one writes; all need the same folder afterwards.

    Args:
      embed: (n, 112, 112, 3) uint8 to (n, D) float32.
      load: gives image i.
      names: of the n images, for errors.
      folder: of the shards; made where it is missing.
      settings: what the embeddings depend on: network and list of images; plain JSON.
      mirrored: whether f(mirrored image) is wanted too.
      threads: that read images.
      host_rows: with several hosts, the rows of a shard that this one reads.
      progress: told how many images are done, after each shard.

    Raises:
      DataError: the folder holds embeddings of another network, list or kind, an image cannot be
        read, or an embedding is not finite.
    """
    count = len(names)
    views = _agree(folder, dict(settings) | {"images": count}, mirrored=mirrored)
    first_host = jax.process_index() == 0
    starts = range(0, count, ROWS)
    missing = [number for number in range(len(starts)) if not _path(folder, number).is_file()]
    missing = _of_first_host(missing, len(starts))
    progress(count - sum(min(ROWS, count - starts[number]) for number in missing))
    with ThreadPoolExecutor(threads) as pool:

        def begin(number: int) -> tuple[np.ndarray, dict[int, Future]]:
            rows = min(ROWS, count - starts[number])
            mine = np.ones(rows, bool) if host_rows is None else host_rows(rows)
            futures = {
                int(row): pool.submit(load, starts[number] + int(row))
                for row in np.flatnonzero(mine)
            }
            return np.zeros((rows, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), futures

        ahead = begin(missing[0]) if missing else None
        for place, number in enumerate(missing):
            assert ahead is not None
            images, futures = ahead
            try:
                for row, future in futures.items():
                    images[row] = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            ahead = begin(missing[place + 1]) if place + 1 < len(missing) else None
            shard = _embed_views(embed, images, views=views)
            _check_finite(shard, names[starts[number] : starts[number] + len(shard)])
            if first_host:
                _write(_path(folder, number), shard)
            progress(count - sum(min(ROWS, count - starts[n]) for n in missing[place + 1 :]))
    return Features(folder, count)


def _embed_views(embed: Embed, images: np.ndarray, *, views: int) -> np.ndarray:
    """(n, views, D) float32."""
    plain = embed(images)
    if views == 1:
        return plain[:, None]
    return np.stack([plain, plain + embed(images[:, :, ::-1])], axis=1)


def _check_finite(shard: np.ndarray, names: Sequence[str]) -> None:
    wrong = np.flatnonzero(~np.isfinite(shard).all(axis=(1, 2)))
    if len(wrong):
        raise DataError(
            f"the embeddings of {len(wrong)} of {len(shard)} images are not finite, the first of "
            f"{names[wrong[0]]}: the weights are damaged, or training diverged"
        )


def _agree(folder: Path, settings: dict[str, Any], *, mirrored: bool) -> int:
    """Compares the settings with those of the folder, or writes them; returns the views stored."""
    path = folder / SETTINGS
    settings["shard"] = ROWS
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        settings["views"] = 1 + mirrored
        if jax.process_index() == 0:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
            temporary.replace(path)
        return settings["views"]
    stored = json.loads(path.read_text())
    different = [
        f"{name} was {stored.get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if stored.get(name) != value
    ]
    if stored["views"] < 1 + mirrored:
        different.append("mirrored images were left out and are wanted (option F)")
    if different:
        raise DataError(
            f"{folder} holds other embeddings: {'; '.join(different)}. Write to another folder, or "
            "delete this one"
        )
    return stored["views"]


def _of_first_host(missing: list[int], shards: int) -> list[int]:
    """The first host's view of what is missing: hosts that disagreed would wait for ever."""
    if jax.process_count() == 1:
        return missing
    flags = np.isin(np.arange(shards), missing)
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(flags)).tolist()


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def _write(path: Path, shard: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, shard)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
