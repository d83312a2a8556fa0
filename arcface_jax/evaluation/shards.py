"""Embeddings of many images in shards on disk, so that a killed job resumes where it stopped.

`Store` is the folder: settings.json has the shards' settings and digests, and each shard is moved
into place when it is complete. A shard that does not match its digest is recomputed. `extract`
fills one with the features that the protocols read: FOLDER/00000.npy and so on are (rows, k, D)
float32: f(image), and with flip f(image) + f(flipped image). `arcface_jax.inference.bulk` keeps its
embeddings of whole folders in another.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from arcface_jax.data import faces
from arcface_jax.data.images import IMAGE_SIZE, decode_any_size
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation.embed import Embed
from arcface_jax.runtime import foreign, sealed
from arcface_jax.runtime.files import PART, write_atomic
from arcface_jax.runtime.sealed import DamagedError

SETTINGS = "settings.json"
_DIGESTS = "digests"
_ADDED = ("sample",)  # settings that earlier versions did not store
ROWS = 2048
"""Images in a shard; two shards of images in memory take 154 MB."""

Load = Callable[[int], np.ndarray]
"""Maps an image's number to (112, 112, 3) uint8 RGB; called from threads."""
HostRows = Callable[[int], np.ndarray]
"""Maps a number of images to (n,) bool: the ones that this host's devices embed; see `Network`."""


class Store(NamedTuple):
    """A folder of shards, all made with the same settings."""

    folder: Path
    pattern: str = "{:05d}.npy"
    """File name of a shard, formatted with its number."""
    beside: str = ""
    """File name of the JSON that belongs to a shard, if there is one."""

    def agree(
        self, settings: Mapping[str, Any], *, write: bool = True, **unchecked: Any
    ) -> dict[str, Any]:
        """Compares the settings with the folder's, or writes them into a new folder.

        Args:
          settings: what the shards depend on; plain JSON.
          write: whether this host writes; with several hosts, only the first one does.
          unchecked: stored with the settings of a new folder, but not compared.

        Returns:
          The stored settings.

        Raises:
          DataError: the folder has shards with other settings, or with unreadable ones.
          OSError: the folder cannot be written.
        """
        try:
            stored = self._read()
        except FileNotFoundError:
            if self.present():
                raise DataError(
                    f"{self.folder} holds embeddings but no {SETTINGS}: use another folder"
                ) from None
            settings = {**settings, **unchecked}
            self.folder.mkdir(parents=True, exist_ok=True)
            if write:
                self._save({**settings, _DIGESTS: {}})
            return settings
        earlier = _DIGESTS not in stored
        different = [
            f"{name} was {stored.get(name)!r} and is {value!r}"
            for name, value in settings.items()
            if stored.get(name) != value and not (earlier and name in _ADDED)
        ]
        if different:
            raise DataError(
                f"{self.folder} holds embeddings with other settings: {'; '.join(different)}. "
                "Match them to resume, or use another folder"
            )
        if earlier and write:
            self._save({**stored, **settings, _DIGESTS: self._adopted()})
        return stored

    def settings(self) -> dict[str, Any]:
        """The settings that the shards were made with.

        Raises:
          DataError: the file is damaged or missing.
        """
        try:
            return {name: value for name, value in self._read().items() if name != _DIGESTS}
        except FileNotFoundError:
            raise DataError(f"{self.folder} holds no {SETTINGS}: use another folder") from None

    def path(self, number: int) -> Path:
        """Returns the path of a shard."""
        return self.folder / self.pattern.format(number)

    def path_beside(self, number: int) -> Path:
        """Returns the path of a shard's JSON."""
        return self.folder / self.beside.format(number)

    def present(self) -> list[Path]:
        """Returns the existing shards, in order."""
        return [self.path(number) for number in self._numbers()]

    def missing(self, count: int, *, report: bool = True) -> list[int]:
        """Returns which of the first `count` shards are missing or damaged.

        Args:
          count: count of the shards.
          report: whether to print the damaged ones.

        Raises:
          DataError: there is a folder in place of a shard.
        """
        digests = self._read()[_DIGESTS] if self._is_current() else {}
        with ThreadPoolExecutor() as pool:
            wrong = list(pool.map(lambda number: self._wrong(number, digests), range(count)))
        missing = [number for number, names in enumerate(wrong) if names is not None]
        for names in filter(None, wrong if report else []):
            print(
                f"warning: {self.folder}: {', '.join(names)} missing or damaged; its embeddings "
                "are computed again",
                file=sys.stderr,
            )
        return missing

    def require_whole(self) -> None:
        """Verifies all shards before they are read.

        Raises:
          DataError: one is damaged.
        """
        if not self._is_current():
            return
        digests = self._read()[_DIGESTS]
        for number in sorted({*self._numbers(), *self._numbers(digests)}):
            if self._wrong(number, digests) is not None:
                raise DataError(
                    f"{self.path(number)} is missing, damaged or not of this output: run the same "
                    "command that embedded the images again"
                )

    def write(self, number: int, shard: np.ndarray, *, beside: Any = None) -> None:
        """Writes a shard atomically.

        Args:
          number: number of the shard.
          shard: the embeddings.
          beside: plain JSON that belongs to it.
        """
        content = io.BytesIO()
        np.save(content, shard)
        files = {self.path(number): content.getvalue()}
        if self.beside:
            files = {self.path_beside(number): json.dumps(beside, indent=0).encode()} | files
        # The digests come first, because a shard without one is ignored.
        try:
            settings = self._read()
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} was removed while embeddings were made") from None
        settings[_DIGESTS] |= {path.name: sealed.digest(data) for path, data in files.items()}
        self._save(settings)
        for path, data in files.items():
            write_atomic(path, data)
        for suffix in (PART, ".tmp"):  # left by a killed process of an earlier version
            self.path(number).with_suffix(suffix).unlink(missing_ok=True)

    def _files(self, number: int) -> list[Path]:
        return [self.path(number), *([self.path_beside(number)] if self.beside else [])]

    def _numbers(self, names: Iterable[str] | None = None) -> list[int]:
        """Returns the numbers of the shards among file names, by default the folder's, in order."""
        before, _, after = self.pattern.partition("{:05d}")
        if names is None:
            names = [path.name for path in self.folder.glob(f"{before}*{after}")]
        digits = [
            name.removeprefix(before).removesuffix(after)
            for name in names
            if name.startswith(before) and name.endswith(after)
        ]
        return sorted(int(number) for number in digits if number.isascii() and number.isdecimal())

    def _read(self) -> dict[str, Any]:
        """Reads the settings, of this version or an earlier one.

        Raises:
          FileNotFoundError: there are none.
          DataError: they are damaged.
        """
        path = self.folder / SETTINGS
        try:
            stored = sealed.read(path, unsealed=True)
            if _DIGESTS in stored:  # otherwise the file has lost its digest
                stored = sealed.read(path)
                if not isinstance(stored[_DIGESTS], dict):
                    raise DamagedError(f"{path} has no digests")
        except DamagedError as error:
            raise DataError(
                f"{error}, so the settings of the embeddings in {self.folder} are unknown: remove "
                "that folder or use another one"
            ) from None
        return stored

    def _is_current(self) -> bool:
        try:
            return _DIGESTS in self._read()
        except FileNotFoundError:
            return False

    def _save(self, content: Mapping[str, Any]) -> None:
        write_atomic(self.folder / SETTINGS, sealed.seal(content, indent=2))

    def _wrong(self, number: int, digests: Mapping[str, str]) -> list[str] | None:
        """Lists the corrupt files of a shard; empty if it was never written.

        Returns None if the shard is intact.
        """
        files, wrong = self._files(number), []
        for path in files:
            if path.is_dir():
                raise DataError(f"{path} is a folder where embeddings belong: remove it")
            try:
                same = sealed.file_digest(path) == digests.get(path.name)
            except OSError:
                same = False
            if not same:
                wrong.append(path.name)
        if not wrong:
            return None
        return wrong if any(path.name in digests for path in files) else []

    def _adopted(self) -> dict[str, str]:
        """Computes the digests of an earlier version's shards, as far as they are readable."""
        digests = {}
        for number in self._numbers():
            with contextlib.suppress(OSError, ValueError, EOFError):
                np.load(self.path(number), mmap_mode="r")
                if self.beside:
                    foreign.parse_json(self.path_beside(number).read_bytes())
                digests |= {path.name: sealed.file_digest(path) for path in self._files(number)}
        return digests


class Features(NamedTuple):
    """Embeddings of n images on disk."""

    store: Store
    num_images: int

    def read(self, *, flip: bool) -> np.ndarray:
        """Returns (n, D) float32: f(image), or f(image) + f(flipped image)."""
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
    """Aligns a loose crop by its five points to (112, 112, 3) uint8 RGB.

    Raises:
      DataError: the image does not exist, or cannot be decoded.
    """
    return faces.align(decode_any_size(read_bytes(path), where=str(path)), landmarks)


def read_bytes(path: Path) -> bytes:
    """Reads a file that a list of images names.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        return foreign.read(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): the list of images names it; unpack the "
            "images again"
        ) from None


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
    """Embeds all images whose shards are missing.

    While the devices embed one shard, threads read and align the next. With several hosts, each
    reads the images for its devices, and the first one writes; all need the same folder.

    Args:
      embed: (n, 112, 112, 3) uint8 to (n, D) float32.
      load: returns image i.
      names: names of the n images, for errors.
      folder: folder of the shards; created if missing.
      settings: what the embeddings depend on: network and list of images; plain JSON.
      flip: whether f(flipped image) is wanted too.
      threads: that read images; at least 1.
      host_rows: with several hosts, the rows of a shard that this one reads.
      progress: called with the number of finished images after each shard.

    Raises:
      DataError: the folder has embeddings of another network, list or kind, an image cannot be
        read, or an embedding is not finite.
      UserError: the folder cannot be written, or there are no threads.
    """
    if threads < 1:
        raise UserError(f"--threads {threads} must be at least 1: images are read in threads")
    count = len(names)
    first_host = jax.process_index() == 0
    store = Store(folder)
    with _writing(folder):
        views = _agreed_views(store, {**settings, "images": count}, flip=flip, write=first_host)
    starts = range(0, count, ROWS)
    missing = of_first_host(store.missing(len(starts), report=first_host), len(starts))
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
                with _writing(folder):
                    store.write(number, shard)
            progress(count - sum(min(ROWS, count - starts[n]) for n in missing[place + 1 :]))
    return Features(store, count)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Reports a write error of the system as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def _embed_views(embed: Embed, images: np.ndarray, *, views: int) -> np.ndarray:
    """Embeds the views of images: (n, views, D) float32."""
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
    """Compares settings with the store's; returns its number of views per image."""
    stored = store.agree(settings | {"shard": ROWS}, write=write, views=1 + flip)
    if stored.get("views", 0) < 1 + flip:
        raise DataError(
            f"{store.folder} was made without flipped images, which option F needs: use "
            "another folder, or delete this one"
        )
    return stored["views"]


def of_first_host(missing: list[int], shards: int) -> list[int]:
    """Returns the first host's missing shards: hosts that disagreed would deadlock."""
    if jax.process_count() == 1:
        return missing
    flags = np.isin(np.arange(shards), missing)
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(flags)).tolist()
