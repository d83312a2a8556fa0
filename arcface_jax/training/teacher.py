"""A teacher's embeddings of the training set: computed once, stored on disk, read by image.

The cache is a `Store` of arcface_jax.evaluation.shards: CACHE/settings.json names teacher, set and
views, and shard i is `teacher-0000i.npy`, (rows, V, Dt) float16 unit vectors of `SHARD` images. A
row of zeros stands for an image that cannot be read.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from arcface_jax.config import DataConfig, DistillConfig
from arcface_jax.data import fingerprint, order, pipeline
from arcface_jax.data.source import Source
from arcface_jax.errors import ConfigError, DataError, UserError
from arcface_jax.evaluation.embed import Model
from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.evaluation.shards import Store, of_first_host
from arcface_jax.heads.centers import of_directions
from arcface_jax.models.registry import Arrays
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime import launch, sealed
from arcface_jax.runtime.files import atomic
from arcface_jax.training import step
from arcface_jax.training.distill import unit
from arcface_jax.training.network import Network
from arcface_jax.training.teacher_record import Record

SHARD = 2048
"""Images in a shard; an interrupted run loses its current shard."""
_PIECE = 512  # images read and embedded together: 19 MB, two of them in memory
_BYTES = 2  # of a float16
_SAMPLE = 65536  # images whose embeddings give the principal components
_SEED = 20260101  # seed of the lift and of that sample; any fixed number
VIEWS = {"mean": 1, "both": 2}


def bytes_needed(images: int, *, embedding_size: int, views: str) -> int:
    """Returns the size of a cache on disk in bytes."""
    return images * VIEWS[views] * embedding_size * _BYTES


def shape(distill: DistillConfig, *, embedding_size: int) -> tuple[int, int] | None:
    """Returns (V, D) of the teacher's embeddings per image in a batch; None without a teacher."""
    return (VIEWS[distill.views], embedding_size) if distill.teacher else None


def folder_of(distill: DistillConfig, workdir: Path) -> Path:
    """Returns the folder of a run's cache."""
    return Path(distill.cache) if distill.cache else workdir / "teacher"


class Cache(NamedTuple):
    """The teacher's embeddings of a training set, memory-mapped."""

    shards: tuple[np.ndarray, ...]
    """(rows, V, Dt) float16 each."""
    projection: np.ndarray | None
    """(Dt, D) float32 with orthonormal rows or columns; None if the sizes are equal."""

    def __call__(self, numbers: np.ndarray, /) -> np.ndarray:
        """Reads (n,) int64 image numbers as (n, V, D) float16 of length 1, or zeros."""
        first = self.shards[0]
        stored = np.empty((len(numbers), *first.shape[1:]), np.float16)
        shards, rows = np.divmod(numbers, SHARD)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            stored[here] = self.shards[shard][rows[here]]
        return self._projected(stored)

    def class_means(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Returns (C, D) float32: direction of each class's mean embedding; zeros if it is empty.

        Args:
          labels: (images,) int32; negative ones are skipped.
          num_classes: C.
        """
        sums = np.zeros((num_classes, self.shards[0].shape[2]), np.float32)
        for number, shard in enumerate(self.shards):
            of = labels[number * SHARD : (number + 1) * SHARD]
            known = (of >= 0) & (of < num_classes)
            np.add.at(sums, of[known], shard[known].astype(np.float32).sum(axis=1))
        if self.projection is not None:
            sums = sums @ self.projection
        return normalize(sums)

    def _projected(self, stored: np.ndarray) -> np.ndarray:
        if self.projection is None:
            return stored
        n, views, size = stored.shape
        flat = stored.reshape(n * views, size).astype(np.float32) @ self.projection
        return normalize(flat, dtype=np.float16).reshape(n, views, -1)


def open_cache(
    model: Model,
    source: Source,
    *,
    distill: DistillConfig,
    data: DataConfig,
    folder: Path,
    embedding_size: int,
    between: Callable[[], None] = lambda: None,
) -> Cache:
    """Completes the cache and maps it; the same call resumes after an interruption.

    A collective operation: each host embeds its part of every shard, and the first one writes. All
    hosts need the folder.

    Args:
      model: the teacher, on the devices of this host.
      source: the training set.
      distill: the recipe's section, with the views of an image.
      data: the recipe's section, with the number of threads.
      folder: folder of the cache.
      embedding_size: D of the network, to which the teacher's embeddings are projected.
      between: called between batches; it may raise to stop.

    Raises:
      DataError: the folder has embeddings of another teacher, set or kind, an embedding is not
        finite, or another host cannot see the folder.
      UserError: the disk is too small, or the folder cannot be written.
    """
    store = Store(folder, "teacher-{:05d}.npy")
    first = launch.is_first()
    settings = {
        "model": model.digest(),
        "data": fingerprint.digest(fingerprint.of_source(source)),
        "images": len(source),
        "views": distill.views,
        "shard": SHARD,
    }
    count = -(-len(source) // SHARD)
    size = model.input.embedding_size
    try:
        missing: list[int] = []
        with launch.failing_together():
            if first:
                store.agree(settings)
                missing = store.missing(count)
                _require_room(folder, len(source), missing, size=size, views=distill.views)
        missing = of_first_host(missing, count)
        _fill(model, source, store, missing, distill=distill, data=data, between=between)
        return _map(store, count, embedding_size=embedding_size)
    except OSError as error:
        raise UserError(
            f"cannot use the teacher's cache {folder}: {error.strerror}; free space, fix "
            "permissions, or name another folder with --distill.cache"
        ) from error


def _require_room(folder: Path, images: int, missing: list[int], *, size: int, views: str) -> None:
    """Refuses a cache that does not fit on the disk, before computing anything."""
    rows = sum(min(SHARD, images - number * SHARD) for number in missing)
    needed = bytes_needed(rows, embedding_size=size, views=views)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the teacher's cache {folder} needs {needed / 1e9:.3g} GB more and the disk has "
            f"{free / 1e9:.3g} GB free: free space, or name a folder elsewhere with --distill.cache"
        )


def _fill(
    model: Model,
    source: Source,
    store: Store,
    missing: list[int],
    *,
    distill: DistillConfig,
    data: DataConfig,
    between: Callable[[], None],
) -> None:
    if not missing:
        return
    ranges = [np.arange(n * SHARD, min((n + 1) * SHARD, len(source))) for n in missing]
    unreadable = 0
    hidden = not launch.is_first()
    with Progress(console=Console(stderr=True), disable=hidden, transient=True) as bar:
        task = bar.add_task("teacher", total=sum(map(len, ranges)))
        for number, rows in zip(missing, ranges, strict=True):
            share = -(-len(rows) // jax.process_count())
            own = rows[share * jax.process_index() :][:share]
            parts = []
            with launch.failing_together():
                for images, failed in _pieces(source, own, threads=pipeline.num_threads(data)):
                    between()
                    part = _views(model, images, views=distill.views)
                    part[failed] = 0
                    unreadable += len(failed)
                    parts.append(part)
                    bar.advance(task, len(images) * jax.process_count())
            shard = _of_all_hosts(parts, share, model.input.embedding_size, distill.views)
            with launch.failing_together():
                if not hidden:
                    store.write(number, shard[: len(rows)])
    if unreadable:
        print(
            f"teacher: {unreadable:,} images cannot be read and have no embedding", file=sys.stderr
        )


def _pieces(
    source: Source, numbers: np.ndarray, *, threads: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yields images, and the rows of unreadable ones; reads the next ones ahead."""

    def begin(start: int) -> tuple[np.ndarray, list[int]]:
        images, failed = pipeline.read_images(
            source, numbers[start : start + _PIECE], threads=threads
        )
        return images, list(failed)

    starts = range(0, len(numbers), _PIECE)
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(begin, start) for start in starts[:1]]
        for start in starts:
            found = ahead.pop().result()
            if start + _PIECE < len(numbers):
                ahead.append(reader.submit(begin, start + _PIECE))
            yield found


def _views(model: Model, images: np.ndarray, *, views: str) -> np.ndarray:
    """Embeds the views of images: (n, V, Dt) float16 unit vectors."""
    plain, mirrored = model(images), model(images[:, :, ::-1])
    if not (np.isfinite(plain).all() and np.isfinite(mirrored).all()):
        raise DataError(
            "the teacher's embeddings are not finite: its weights are damaged, or its training "
            "diverged; name another with --distill.teacher"
        )
    each = [normalize(plain), normalize(mirrored)]
    chosen = each if views == "both" else [normalize(each[0] + each[1])]
    return np.stack(chosen, axis=1).astype(np.float16)


def _of_all_hosts(parts: list[np.ndarray], share: int, size: int, views: str) -> np.ndarray:
    """Gathers (hosts * share, V, Dt): the embeddings of all hosts in their order."""
    own = np.zeros((share, VIEWS[views], size), np.float16)
    start = 0
    for part in parts:
        own[start : start + len(part)] = part
        start += len(part)
    if jax.process_count() == 1:
        return own
    gathered = multihost_utils.process_allgather(own)
    return np.asarray(gathered).reshape(-1, *own.shape[1:])


def _map(store: Store, count: int, *, embedding_size: int) -> Cache:
    with launch.failing_together():  # all shards are written: `_fill` ended so
        lacking = [number for number in range(count) if not store.path(number).is_file()]
        if lacking:
            raise DataError(
                f"{store.folder} has no {store.path(lacking[0]).name} on {launch.host_name()}: "
                "--distill.cache has to be a folder that all hosts share"
            )
    shards = tuple(np.load(store.path(number), mmap_mode="r") for number in range(count))
    size = shards[0].shape[2]
    if size == embedding_size:
        return Cache(shards, None)
    if size < embedding_size:
        return Cache(shards, lift(size, embedding_size))
    return Cache(shards, _principal(shards, store.folder, embedding_size))


def lift(size: int, larger: int) -> np.ndarray:
    """Returns (Dt, D) float32 with orthonormal rows, D above Dt: x @ lift preserves all cosines."""
    random = np.random.default_rng(_SEED).standard_normal((larger, size))
    return np.linalg.qr(random)[0].T.astype(np.float32)


def _principal(shards: tuple[np.ndarray, ...], folder: Path, size: int) -> np.ndarray:
    """Returns (Dt, D) float32 with orthonormal columns: principal components of the embeddings.

    Computed from a sample without centering, because cosines refer to the origin. They are stored
    in the cache, because another machine's linear algebra may rotate components of nearly equal
    weight.
    """
    path = folder / f"principal-{size}.npy"
    with launch.first_process_first():
        if not path.is_file():
            total = sum(map(len, shards))
            numbers = order.Order(total, 1, total, _SEED).images(0, np.arange(min(total, _SAMPLE)))
            rows = Cache(shards, None)(np.sort(numbers)).astype(np.float64).sum(axis=1)
            _, vectors = np.linalg.eigh(rows.T @ rows)
            found = vectors[:, ::-1][:, :size].astype(np.float32)
            with atomic(path, "wb") as file:
                np.save(file, found)
        return np.load(path)


def centers(cache: Cache, source: Source, random: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Returns (C_padded, D): the teacher's class means, scaled to the norm of random centers.

    A class without images keeps its random center.

    Args:
      cache: the teacher's embeddings.
      source: the training set.
      random: (C_padded, D) initial centers, split over the devices.
      mesh: the devices.
    """
    means = np.zeros(random.shape, np.float32)
    means[: source.num_classes] = cache.class_means(source.labels(), source.num_classes)
    split = meshes.split(mesh)
    given = jax.make_array_from_callback(means.shape, split, lambda index: means[index])
    return jax.jit(of_directions, out_shardings=split)(given, random)


class Online(NamedTuple):
    """A teacher that runs on each batch, before the step, on the same devices."""

    run: Callable[[jax.Array], jax.Array]
    """(B, 112, 112, 3) uint8 RGB to (B, V, D) float16 of length 1, both split over the devices."""


def make_online(model: Model, *, views: str, embedding_size: int, mesh: Mesh) -> Online:
    """Prepares a teacher to run on the network's training images.

    Args:
      model: the teacher, on the devices of the mesh.
      views: as `distill.views`.
      embedding_size: D of the network.
      mesh: the devices.

    Raises:
      ConfigError: it is not a network of this project, or its embeddings are longer than D.
    """
    if not isinstance(model, Network):
        raise ConfigError(
            "distill.online runs the teacher at every step, which takes a network of this project: "
            "name a workdir, a .pth or .safetensors file, or import an ONNX file first "
            "(arcface-jax import onnx)"
        )
    size = model.embedding_size
    if size > embedding_size:
        raise ConfigError(
            f"distill.online cannot shorten the teacher's {size} numbers to model.embedding_size "
            f"{embedding_size}: use the cache, which gives their principal components, or "
            f"--model.embedding-size {size}"
        )
    projection = None if size == embedding_size else jnp.asarray(lift(size, embedding_size))
    embed = step.make_embed(model.backbone)

    def run(params: Arrays, batch_stats: Arrays, images: jax.Array) -> jax.Array:
        each = [unit(embed(params, batch_stats, shown)) for shown in (images, images[:, :, ::-1])]
        chosen = each if views == "both" else [unit(each[0] + each[1])]
        found = jnp.stack(chosen, axis=1)
        if projection is not None:
            found = jnp.matmul(found, projection, precision=jax.lax.Precision.HIGHEST)
        return found.astype(jnp.float16)

    jitted = jax.jit(run, out_shardings=meshes.split(mesh))
    return Online(partial(jitted, model.params, model.batch_stats))


def record(model: Model, projection: np.ndarray | None, *, distill: DistillConfig) -> Record:
    """Returns a run's record of its teacher."""
    digest = "" if projection is None else sealed.array_digest(projection)
    return Record(
        model.input.digest, model.input.embedding_size, distill.views, digest, distill.compatible
    )


def check_compatible(model: Model, *, embedding_size: int) -> None:
    """Refuses a student whose embedding size differs from the teacher's.

    Raises:
      ConfigError: the sizes differ.
    """
    size = model.input.embedding_size
    if size != embedding_size:
        raise ConfigError(
            f"distill.compatible needs the teacher's embedding size {size}, and "
            f"model.embedding_size is {embedding_size}: use --model.embedding-size {size}"
        )
