"""Batches that depend only on seed and step, so resumed runs continue exactly.

The number of threads, worker processes or hosts and the step at which a run starts do not change a
batch. One call reads, decodes and augments a whole batch, which is cheaper than one call per image.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from arcface_jax.config import DataConfig
from arcface_jax.data import augment, order
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.data.source import Source
from arcface_jax.errors import CheckpointError, DataError, ImageError, UserError
from arcface_jax.runtime import metrics, processes, shared_memory
from arcface_jax.runtime.files import open_own, write_atomic

# Images tried in place of a damaged one before the whole set counts as damaged.
_TRIES = 100
# More threads than this contend for the GIL.
_MOST_THREADS = 8
# Images that a thread of `read_images` reads at a time.
_PIECE = 64
# Seconds between two checks of the workers; one that both find suspended is reported.
_LOOK_SECONDS = 10.0


class BadImage(NamedTuple):
    """An image that could not be read."""

    number: int
    """Number of the image in the training set."""
    where: str
    """The file, and the place in it."""
    problem: str


class Batch(NamedTuple):
    """This host's part of a global batch."""

    images: np.ndarray
    """(b, 112, 112, 3) uint8 RGB."""
    labels: np.ndarray
    """(b,) int32."""
    numbers: np.ndarray
    """(b,) int64 numbers of the images in the training set, replacements included."""
    bad: tuple[BadImage, ...]
    """Damaged images that were replaced in this batch."""


def batches(
    source: Source,
    data: DataConfig,
    *,
    seed: int,
    start: int,
    stop: int,
    host: int = 0,
    hosts: int = 1,
) -> Generator[Batch]:
    """Yields the batches of steps start .. stop - 1, read ahead by threads or worker processes.

    Args:
      source: the training set; it is sent to the worker processes.
      data: batch size, augmentation, workers, threads, how far to read ahead.
      seed: random seed of the order and of the augmentation.
      start: the first step; for a resumed run, the step where it stopped.
      stop: the step after the last.
      host: which part of each batch to return.
      hosts: number of equal, ordered parts of each batch.

    Returns:
      A generator; closing it ends the worker processes.

    Raises:
      DataError: the set is smaller than one batch; or, while iterating, a label is wrong, or no
        intact image is found to replace a damaged one.
      UserError: while iterating, a worker process died.
    """
    shared_memory.remove_leftovers()
    read = _BatchReader(source, data, seed=seed, host=host, hosts=hosts)
    return _iterate(read, data, start=start, stop=stop)


def _iterate(read: "_BatchReader", data: DataConfig, *, start: int, stop: int) -> Generator[Batch]:
    steps = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(read_options(data))
    if data.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own flags when it starts a process
            flags.FLAGS.mark_as_parsed()
        shared_memory.name_semaphores()
        # Each worker also keeps data.prefetch_batches of its own.
        workers = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=1)
        owner = shared_memory.name_of_owner(os.getpid())
        steps = steps.mp_prefetch(workers, worker_init_fn=partial(_prepare_worker, owner))
    iterator = iter(steps)
    try:
        with _watched_workers() if data.workers else nullcontext():
            yield from iterator
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise UserError(
            f"a process that reads images died ({error}): if the system ended it for lack of "
            f"memory, use fewer --data.workers (now {data.workers}) or --data.prefetch-batches; "
            "--data.workers 0 reads in this process, and shows the error"
        ) from error
    finally:
        iterator.close()


def num_threads(data: DataConfig) -> int:
    """Returns the number of threads that read and decode, in this process or in each worker."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return data.threads or min(_MOST_THREADS, cores or 1)


def read_options(data: DataConfig) -> grain.ReadOptions:
    """Returns the number of reading threads, and how far ahead they read."""
    threads = num_threads(data)
    ahead = max(data.prefetch_batches, threads)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)


@contextmanager
def _watched_workers() -> Iterator[None]:
    """Reports suspended workers, for which this process would wait silently."""
    ended = threading.Event()

    def watch() -> None:
        before: set[int] = set()
        reported: set[int] = set()
        while not ended.wait(_LOOK_SECONDS):
            pids = [child.pid for child in multiprocessing.active_children() if child.pid]
            stopped = set(filter(processes.is_stopped, pids))
            for pid in sorted((stopped & before) - reported):
                _report_stopped(pid)
                reported.add(pid)
            before, reported = stopped, reported & stopped

    watcher = threading.Thread(target=watch, name="workers", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _report_stopped(pid: int) -> None:
    print(
        f"warning: process {pid}, which reads images, is suspended (SIGSTOP or a debugger), and "
        f"training waits for it: kill -CONT {pid} resumes it",
        file=sys.stderr,
        flush=True,
    )


def _prepare_worker(owner: str, *_: int) -> None:
    """Makes a worker end with the process that started it, and not before.

    Workers ignore signals sent to all processes, because the main process has to save first. If the
    main process is killed, no loop of the worker would notice by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    shared_memory.name_blocks(owner)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


class _BatchReader:
    """Reads this host's part of a step's batch."""

    def __init__(self, source: Source, data: DataConfig, *, seed: int, host: int, hosts: int):
        self._source = source
        self._order = order.make(len(source), data, seed=seed)
        share = data.global_batch_size // hosts
        self._part = slice(share * host, share * (host + 1))
        self._augment = augment.make(data.augment, seed=seed)
        self._batch_size = data.global_batch_size

    def __call__(self, step: int) -> Batch:
        epoch, places = self._order.places(int(step))
        places = places[self._part]
        numbers = self._order.images(epoch, places)
        images = np.empty((len(numbers), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        labels = np.empty(len(numbers), np.int32)
        bad: list[BadImage] = []
        for row, error in self._source.load(numbers, np.arange(len(numbers)), images, labels):
            bad.append(BadImage(int(numbers[row]), error.where, error.problem))
            numbers[row], image, labels[row] = self._instead(epoch, int(places[row]), error)
            images[row] = image
        if self._augment is not None:
            self._augment(images, step=int(step), batch_size=self._batch_size, part=self._part)
        return Batch(images, labels, numbers, tuple(bad))

    def _instead(self, epoch: int, place: int, error: ImageError) -> tuple[int, np.ndarray, int]:
        """Returns number, image and label of the first intact image from half an epoch away.

        This way no batch has an image twice.
        """
        total = self._order.num_images
        others = (place + total // 2 + np.arange(min(_TRIES, total))) % total
        for number in self._order.images(epoch, others).tolist():
            try:
                return number, *self._source[number]
            except ImageError:
                continue
        raise DataError(
            f"{error}; neither could any of {len(others)} other images be read in its place: the "
            "training set is damaged as a whole; fetch it again"
        )


def read_images(
    source: Source, numbers: np.ndarray, *, threads: int
) -> tuple[np.ndarray, dict[int, ImageError]]:
    """Reads images in threads, once and without augmentation.

    Args:
      source: the training set.
      numbers: (n,) int64 image numbers.
      threads: number of threads that read and decode.

    Returns:
      (n, 112, 112, 3) uint8 RGB, black where an image cannot be read; and the errors by row.
    """
    images = np.zeros((len(numbers), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = np.zeros(len(numbers), np.int32)

    def read(rows: np.ndarray) -> list[tuple[int, ImageError]]:
        return source.load(numbers[rows], rows, images, labels)

    pieces = np.split(np.arange(len(numbers)), range(_PIECE, len(numbers), _PIECE))
    with ThreadPoolExecutor(threads) as pool:
        failed = {row: error for part in pool.map(read, pieces) for row, error in part}
    images[list(failed)] = 0
    return images, failed


class BadImages:
    """Unreadable images of a run, one line each in WORKDIR/bad_images.jsonl; resuming appends.

    Args:
      path: path of the file, which is created with its first line.
      num_images: images in the training set.
      max_share: largest share of them that may be damaged.
    """

    def __init__(self, path: Path, *, num_images: int, max_share: float):
        self._path = path
        self._num_images = num_images
        self._max_share = max_share
        try:
            content = path.read_bytes() if path.exists() else b""
            lines, end = metrics.whole_lines(content)
            self._known = {int(line["index"]) for line in lines}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot read {path}: {error!r}; remove it") from error
        if b"\n" in content[end:]:
            raise CheckpointError(
                f"{path} is damaged at line {len(lines) + 1}: remove it; its images are listed "
                "again when they are met"
            )
        if end < len(content):  # the next line would be appended to half a line
            write_atomic(path, content[:end])

    def __len__(self) -> int:
        return len(self._known)

    def add(self, bad: tuple[BadImage, ...], *, step: int) -> list[BadImage]:
        """Records a step's images, and returns those that are new.

        Raises:
          DataError: more than the allowed share of the training set is damaged.
        """
        unknown = {image.number: image for image in bad if image.number not in self._known}
        new = list(unknown.values())
        if not new:
            return new
        with open_own(self._path, "a") as file:
            for image in new:
                line = {"step": step, "index": image.number}
                line |= {"where": image.where, "problem": image.problem}
                file.write(json.dumps(line) + "\n")
        self._known.update(unknown)
        if len(self._known) > self._max_share * self._num_images:
            last = new[-1]
            raise DataError(
                f"{len(self._known)} of {self._num_images} training images cannot be read, more "
                f"than data.max_bad_share {self._max_share} allows; the last: {last.where}: "
                f"{last.problem}. {self._path} lists them: fix or remove them, or allow more with "
                "--data.max-bad-share"
            )
        return new
