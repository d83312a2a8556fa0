"""Embeddings of many images in shards on disk, so that a killed job resumes where it stopped.

`Store` is the folder: settings.json states what the shards were made of, and each shard is moved
into place when it is complete. `extract` fills one with the features that the protocols read:
FOLDER/00000.npy and so on are (rows, k, D) float32: f(image), and with flip f(image) + f(flipped
image). `arcface_jax.inference.bulk` keeps its embeddings of whole folders in another.
"""

import hashlib
import json
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
from arcface_jax.runtime.files import PART, atomic, write_atomic

SETTINGS = "settings.json"
ROWS = 2048
"""Images in a shard: two shards of images are in memory, 154 MB."""

Load = Callable[[int], np.ndarray]
"""An image's number to (112, 112, 3) uint8 RGB; called from threads."""
HostRows = Callable[[int], np.ndarray]
"""A number of images to (n,) bool: those of this host's devices, see `Network`."""


class Store(NamedTuple):
    """A folder of shards, all made with the same settings."""

    folder: Path
    pattern: str = "{:05d}.npy"
    """File name of a shard, given its number."""

    def agree(
        self, settings: Mapping[str, Any], *, write: bool = True, **unchecked: Any
    ) -> dict[str, Any]:
        """Compares the settings with those of the folder; writes them into a new one.

        Args:
          settings: what the shards depend on; plain JSON.
          write: whether this host writes; with several, only the first does.
          unchecked: stored beside the settings of a new folder, but not compared.

        Returns:
          The settings that are stored.

        Raises:
          DataError: the folder holds shards with other settings, or without any.
          OSError: the folder cannot be written.
        """
        path = self.folder / SETTINGS
        if not path.is_file():
            if self.present():
                raise DataError(
                    f"{self.folder} holds embeddings but no {SETTINGS}: use another folder"
                )
            settings = {**settings, **unchecked}
            self.folder.mkdir(parents=True, exist_ok=True)
            if write:
                write_atomic(path, json.dumps(settings, indent=2) + "\n")
            return settings
        stored = json.loads(path.read_text())
        different = [
            f"{name} was {stored.get(name)!r} and is {value!r}"
            for name, value in settings.items()
            if stored.get(name) != value
        ]
        if different:
            raise DataError(
                f"{self.folder} holds embeddings with other settings: {'; '.join(different)}. "
                "Match them to resume, or use another folder"
            )
        return stored

    def path(self, number: int) -> Path:
        """Where a shard is, once it is complete."""
        return self.folder / self.pattern.format(number)

    def present(self) -> list[Path]:
        """The complete shards, in order."""
        before, _, after = self.pattern.partition("{:05d}")
        return sorted(self.folder.glob(f"{before}[0-9]*{after}"))

    def missing(self, count: int) -> list[int]:
        """Which of the first `count` shards have yet to be made."""
        return [number for number in range(count) if not self.path(number).is_file()]

    def write(self, number: int, shard: np.ndarray) -> None:
        """Writes a shard, which appears when all of it is on disk."""
        path = self.path(number)
        with atomic(path, "wb") as file:
            np.save(file, shard)
        for suffix in (PART, ".tmp"):  # left by a killed process of an earlier version
            path.with_suffix(suffix).unlink(missing_ok=True)


class Features(NamedTuple):
    """Embeddings of n images on disk."""

    store: Store
    num_images: int

    def read(self, *, flip: bool) -> np.ndarray:
        """(n, D) float32: f(image), or f(image) + f(flipped image)."""
        out: np.ndarray | None = None
        for number, start in enumerate(range(0, self.num_images, ROWS)):
            shard = np.load(self.store.path(number), mmap_mode="r")
            if out is None:
                out = np.empty((self.num_images, shard.shape[2]), np.float32)
            out[start : start + len(shard)] = shard[:, int(flip)]
        if out is None:
            raise DataError(f"{self.store.folder}: no images were embedded")
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
    flip: bool,
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
      flip: whether f(flipped image) is wanted too.
      threads: that read images.
      host_rows: with several hosts, the rows of a shard that this one reads.
      progress: told how many images are done, after each shard.

    Raises:
      DataError: the folder holds embeddings of another network, list or kind, an image cannot be
        read, or an embedding is not finite.
    """
    count = len(names)
    first_host = jax.process_index() == 0
    store = Store(folder)
    views = _agreed_views(store, {**settings, "images": count}, flip=flip, write=first_host)
    starts = range(0, count, ROWS)
    missing = _of_first_host(store.missing(len(starts)), len(starts))
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
                store.write(number, shard)
            progress(count - sum(min(ROWS, count - starts[n]) for n in missing[place + 1 :]))
    return Features(store, count)


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


def _agreed_views(store: Store, settings: dict[str, Any], *, flip: bool, write: bool) -> int:
    """Compares settings with the store's; returns how many views of each image it holds."""
    stored = store.agree(settings | {"shard": ROWS}, write=write, views=1 + flip)
    if stored["views"] < 1 + flip:
        raise DataError(
            f"{store.folder} was made without flipped images, and they are wanted (option F): use "
            "another folder, or delete this one"
        )
    return stored["views"]


def _of_first_host(missing: list[int], shards: int) -> list[int]:
    """The first host's view of what is missing: hosts that disagreed would wait for ever."""
    if jax.process_count() == 1:
        return missing
    flags = np.isin(np.arange(shards), missing)
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(flags)).tolist()
