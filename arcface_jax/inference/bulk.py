"""Embed whole folders into shards of files: streamed, and resumable after any interruption.

OUTPUT is a `Store` of arcface_jax.evaluation.shards: settings.json has the settings of the shards.
Shard i is `embeddings-0000i.npy`, (n, D) float32, and `ids-0000i.json`, whose `ids` are the n files
in the order of the rows and whose `skipped` are the files without a row, with the reason.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from arcface_jax.data import faces, fingerprint
from arcface_jax.data.faces import Face
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation.embed import Model
from arcface_jax.evaluation.shards import Store
from arcface_jax.runtime import foreign

_BATCHES_AHEAD = 2
Decoded = np.ndarray | DataError


class FaceEmbedder(Protocol):
    """The part of `arcface_jax.Embedder` that this module needs."""

    model: Model
    flip: bool
    batch_size: int

    def prepare(
        self, face: Face, points: np.ndarray | None = None, *, in_identity_folder: bool = False
    ) -> np.ndarray:
        """Returns a face as (112, 112, 3) uint8 RGB; called from threads."""
        ...

    def alignment(self) -> Mapping[str, str]:
        """The settings that `prepare` depends on."""
        ...

    def embed_aligned(self, images: np.ndarray, *, normalized: bool = True) -> np.ndarray:
        """Embeds (n, 112, 112, 3) uint8 RGB as (n, D) float32."""
        ...


class Summary(NamedTuple):
    """Contents of an output folder."""

    embedded: int
    """Number of rows in all shards."""
    skipped: dict[str, str]
    """Reason for each skipped file."""
    shards: int
    kept: int
    """Number of shards that already existed."""


def embed_folder(
    embedder: FaceEmbedder,
    folder: Path,
    output: Path,
    *,
    shard_size: int,
    points: Mapping[str, np.ndarray] | None = None,
    normalized: bool = True,
) -> Summary:
    """Embeds every image below a folder; the same call resumes after an interruption.

    Args:
      embedder: of arcface_jax.
      folder: the images; an id is an image's path from here.
      output: folder of the shards, created if missing.
      shard_size: files per shard, including unreadable ones.
      points: (5, 2) by id, to align every image by; one without points is skipped.
      normalized: whether the embeddings are of length 1.

    Returns:
      Summary of the whole output.

    Raises:
      DataError: the folder does not exist, or has no image.
      UserError: the output was made with other settings, or cannot be written.
    """
    if shard_size < 1:
        raise UserError(f"shard_size must be at least 1, got {shard_size}")
    ids = faces.find(folder)
    settings = {
        "model": embedder.model.digest(),
        "flip": embedder.flip,
        **embedder.alignment(),
        "normalized": normalized,
        "shard_size": shard_size,
        "images": len(ids),
        "files": fingerprint.of_folder(folder, ids, points),
        "sample": fingerprint.of_files([folder / name for name in ids], read=_content),
    }
    try:
        # A store of an exact export is resumed only by that file, while a gallery of it serves its
        # run and all of the run's exact exports.
        _store(output).agree(settings, gallery_model=embedder.model.input.digest)
        return _embed_all(embedder, folder, output, ids, points, settings)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error


def shards(output: Path) -> list[Path]:
    """Returns the embeddings' files, in order."""
    return _store(output).present()


def read(output: Path) -> tuple[list[str], np.ndarray]:
    """Reads the ids and embeddings (n, D) of all shards of an output folder.

    Raises:
      DataError: the folder has no shards, or damaged ones.
    """
    paths = shards(output)
    if not paths:
        raise DataError(f"{output} holds no embeddings-*.npy: name the output of a bulk run")
    _store(output).require_whole()
    try:
        ids = [str(name) for path in paths for name in _ids(path)["ids"]]
        return ids, _joined(paths, len(ids))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{output} holds damaged embeddings ({error}): run the same command that embedded the "
            "images again"
        ) from None


def _joined(paths: Sequence[Path], count: int) -> np.ndarray:
    """Concatenates the rows of all shards.

    Raises:
      OSError, ValueError: one is damaged, or there are not as many rows as ids.
    """
    parts = [foreign.load_array(path) for path in paths]
    if any(part.ndim != 2 or part.dtype != np.float32 for part in parts):
        raise ValueError("a shard that is not (n, D) float32")
    if sum(map(len, parts)) != count:
        raise ValueError(f"{sum(map(len, parts))} rows for {count} ids")
    return np.concatenate(parts)


def settings(output: Path) -> dict[str, Any]:
    """Returns the settings of an output folder's shards: model, flip and so on.

    `gallery_model` is the model for `gallery.build`.

    Raises:
      DataError: the folder has no shards.
    """
    if not shards(output):
        raise DataError(f"{output} holds no embeddings-*.npy: name the output of a bulk run")
    found = _store(output).settings()
    return {"gallery_model": found.get("model"), **found}  # earlier versions did not store it


def _store(output: Path) -> Store:
    return Store(output, "embeddings-{:05d}.npy", beside="ids-{:05d}.json")


def _embed_all(
    embedder: FaceEmbedder,
    folder: Path,
    output: Path,
    ids: list[str],
    points: Mapping[str, np.ndarray] | None,
    settings: dict,
) -> Summary:
    def load(name: str) -> Decoded:
        if points is not None and name not in points:
            return DataError("its five points are not in the list")
        five = None if points is None else points[name]
        try:
            return embedder.prepare(folder / name, five, in_identity_folder="/" in name)
        except DataError as error:
            return error

    store, size = _store(output), settings["shard_size"]
    count = -(-len(ids) // size)
    missing = store.missing(count)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number in missing:
            shard = ids[number * size : (number + 1) * size]
            decoded = _in_batches(pool, load, shard, embedder.batch_size)
            _write_shard(embedder, store, number, decoded, normalized=settings["normalized"])
    embedded, skipped = 0, {}
    for number in range(count):
        found = _ids(store.path(number))
        embedded += len(found["ids"])
        skipped |= found["skipped"]
    return Summary(embedded, skipped, shards=count, kept=count - len(missing))


def _in_batches(
    pool: ThreadPoolExecutor, load, names: Sequence[str], size: int
) -> Iterator[tuple[Sequence[str], list[Decoded]]]:
    """Yields batches of names with the results of `load`, while the next ones are loading."""
    ahead: deque[tuple[Sequence[str], list[Future]]] = deque()
    for start in range(0, len(names), size):
        batch = names[start : start + size]
        ahead.append((batch, [pool.submit(load, name) for name in batch]))
        if len(ahead) > _BATCHES_AHEAD:
            batch, futures = ahead.popleft()
            yield batch, [future.result() for future in futures]
    for batch, futures in ahead:
        yield batch, [future.result() for future in futures]


def _write_shard(
    embedder: FaceEmbedder,
    store: Store,
    number: int,
    decoded: Iterator[tuple[Sequence[str], list[Decoded]]],
    *,
    normalized: bool,
) -> None:
    ids, skipped, parts = [], {}, []
    for names, images in decoded:
        good = []
        for name, image in zip(names, images, strict=True):
            if isinstance(image, DataError):
                skipped[name] = str(image)
            else:
                ids.append(name)
                good.append(image)
        if good:
            parts.append(embedder.embed_aligned(np.stack(good), normalized=normalized))
    if not parts:  # a shard without rows still has columns
        black = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        parts = [embedder.embed_aligned(black)[:0]]
    store.write(number, np.concatenate(parts), beside={"ids": ids, "skipped": skipped})


def _content(path: Path) -> bytes:
    """Reads a file's bytes; returns none if it is unreadable, because such files are skipped."""
    try:
        return foreign.read(path)
    except OSError:
        return b""


def _ids_path(shard: Path) -> Path:
    return shard.with_name(shard.name.replace("embeddings-", "ids-")).with_suffix(".json")


def _ids(shard: Path) -> dict:
    return foreign.parse_json(foreign.read(_ids_path(shard)))
