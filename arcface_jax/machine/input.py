"""Measure the speed of the input pipeline: each stage against bare decode loops, in one run."""

import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from arcface_jax.config import DataConfig
from arcface_jax.data import images, opening, pipeline
from arcface_jax.data.source import Source
from arcface_jax.errors import DataError, ImageError, UserError
from arcface_jax.runtime import devices

BARE_PROCESSES = 2
_IN_MEMORY = 4096  # images in memory for the bare loops
_WARM_UP = 4  # batches to skip


class Rate(NamedTuple):
    """Speed of one stage."""

    stage: str
    """bare decode: loops in two processes at once, from memory; read: bytes from the source;
    decode: images from the source, one thread; pipeline: batches on the host; to device."""
    workers: int
    threads: int
    images_per_second: float
    """Median over the rounds."""
    of_bare: float
    """Median, over the rounds, of the ratio to the bare loops in the same round."""


class Measured(NamedTuple):
    """The rates of all stages, and the damaged images among the sample for the bare loops."""

    rates: list[Rate]
    damaged: list[ImageError]
    sampled: int
    """Number of images in the sample."""


def measure(
    data: DataConfig, *, workers: tuple[int, ...], rounds: int = 5, seconds: float = 2.0
) -> Measured:
    """Measures all stages in turn, round by round, so that all see the same machine load.

    Args:
      data: path, batch size, threads, augmentation; its workers are ignored.
      workers: numbers of worker processes to try; 0 means threads only.
      rounds: number of rounds over all stages.
      seconds: time per stage in a round.

    Raises:
      UserError: an argument is out of range, the training set cannot be opened or is smaller than
        a batch, or a decode loop died.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds} must be 1 or more")
    if not 0 < seconds < math.inf:
        raise UserError(f"--seconds {seconds:g} must be above 0: seconds per stage, as 2")
    if not workers:
        raise UserError("--workers is empty: name numbers of processes, for instance --workers 0 2")
    source = opening.open_source(data, seed=0)
    if len(source) < data.global_batch_size:
        raise DataError(
            f"{data.path} has {len(source)} images, fewer than one batch of "
            f"{data.global_batch_size}: use --batch-size {len(source)} or less"
        )
    encoded, damaged = _encoded(source)
    threads = pipeline.num_threads(data)
    one_device = devices.make(1)
    found: dict[tuple[str, int, int], list[float]] = {}
    with _bare_loops(encoded, seconds) as bare:
        for _ in range(rounds):
            found.setdefault(("bare decode", BARE_PROCESSES, 1), []).append(bare())
            for name, take in (("read", source.read), ("decode", source.__getitem__)):
                rate = one_thread(take, len(source), seconds)
                found.setdefault((name, 0, 1), []).append(rate)
            for count in workers:
                for stage in ("pipeline", "to device"):
                    device = one_device if stage == "to device" else None
                    rate = pipeline_rate(source, data, count, device=device, seconds=seconds)
                    found.setdefault((stage, count, threads), []).append(rate)
    reference = next(iter(found.values()))
    rates = [
        Rate(
            *case,
            images_per_second=median(rates),
            of_bare=median(rate / base for rate, base in zip(rates, reference, strict=True)),
        )
        for case, rates in found.items()
    ]
    return Measured(rates, damaged, len(encoded) + len(damaged))


def bottleneck(rates: list[Rate]) -> str:
    """Returns a sentence naming the slowest stage."""
    best = max((r for r in rates if r.stage == "pipeline"), key=lambda r: r.images_per_second)
    sent = max((r for r in rates if r.stage == "to device"), key=lambda r: r.images_per_second)
    read, decode = (next(r for r in rates if r.stage == name) for name in ("read", "decode"))
    speed = f"the fastest pipeline, with {best.workers} workers, gives {best.images_per_second:.0f}"
    if sent.images_per_second < 0.8 * best.images_per_second:
        return (
            f"{speed} images/s; copying to the device is the bottleneck: "
            f"{sent.images_per_second:.0f} images/s"
        )
    share = decode.images_per_second / read.images_per_second
    if share > 0.5:
        return (
            f"{speed} images/s; reading is the bottleneck: it takes {share:.0%} of a thread's time"
        )
    return (
        f"{speed} images/s, {best.of_bare:.2f} of {BARE_PROCESSES} bare decode loops; "
        f"decoding is the bottleneck: reading takes {share:.0%} of a thread's time"
    )


def _encoded(source: Source) -> tuple[list[bytes], list[ImageError]]:
    """Reads a sample of the images; returns the intact ones, and the errors of the others.

    Raises:
      DataError: none is intact.
    """
    intact, damaged = [], []
    for place in np.random.default_rng(0).permutation(len(source))[:_IN_MEMORY].tolist():
        try:
            encoded = source.read(place).data
            if images.pixels(encoded) is None:
                source[place]  # raises the error that names it
            intact.append(encoded)
        except ImageError as error:
            damaged.append(error)
    if not intact:
        raise DataError(f"none of {len(damaged)} sampled images can be read; one is {damaged[0]}")
    return intact, damaged


@contextmanager
def _bare_loops(encoded: list[bytes], seconds: float) -> Iterator[Callable[[], float]]:
    """Provides a function that decodes in two processes at once and returns images per second."""
    context = multiprocessing.get_context("spawn")
    loops = []
    for number in range(BARE_PROCESSES):
        ours, theirs = context.Pipe()
        arguments = (encoded[number::BARE_PROCESSES], seconds, theirs)
        process = context.Process(target=_decode_loop, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that `recv` ends with the process
        loops.append((ours, process))

    def run() -> float:
        try:
            for pipe, _ in loops:
                pipe.send(True)
            return sum(pipe.recv() for pipe, _ in loops)
        except (EOFError, OSError) as error:
            for _, process in loops:
                process.join(timeout=1)
            codes = [process.exitcode for _, process in loops if process.exitcode is not None]
            raise UserError(
                f"a process of the bare decode loops died (exit code {', '.join(map(str, codes))}):"
                " if the system ended it for lack of memory, free some"
            ) from error

    try:
        yield run
    finally:
        for pipe, process in loops:
            with suppress(OSError):  # it died
                pipe.send(False)
            process.join()


def _decode_loop(encoded: list[bytes], seconds: float, pipe: Connection) -> None:
    buffers = [np.frombuffer(data, np.uint8) for data in encoded]
    for buffer in buffers[:100]:
        images.pixels(buffer)
    while pipe.recv():
        done, begin = 0, time.perf_counter()
        while (now := time.perf_counter() - begin) < seconds:
            for buffer in buffers[:256]:
                images.pixels(buffer)
            done += len(buffers[:256])
            buffers = buffers[256:] + buffers[:256]
        pipe.send(done / now)


def one_thread(take: Callable[[int], object], length: int, seconds: float) -> float:
    """Measures calls per second of `take` with the numbers 0 .. length - 1 in shuffled order.

    Damaged images count too: training skips them, up to data.max_bad_share.
    """
    places = np.random.default_rng(0).permutation(length).tolist()
    done, begin = 0, time.perf_counter()
    while (now := time.perf_counter() - begin) < seconds:
        with suppress(ImageError):
            take(places[done % length])
        done += 1
    return done / now


def pipeline_rate(
    source: Source, data: DataConfig, workers: int, *, device: Mesh | None, seconds: float
) -> float:
    """Measures images per second in whole batches, after the prefetched ones are used up."""
    data = dataclasses.replace(data, workers=workers)
    stream = pipeline.batches(source, data, seed=0, start=0, stop=10**9)

    taken = stream
    if device is not None:
        send = partial(_to_device, device=device)
        taken = devices.ahead(stream, send, count=2)
    with closing(stream), closing(taken):
        for _ in range(_WARM_UP + (data.prefetch_batches + 1) * max(1, workers)):
            next(taken)
        done, begin = 0, time.perf_counter()
        while (now := time.perf_counter() - begin) < seconds:
            jax.block_until_ready(next(taken))
            done += data.global_batch_size
    return done / now


def _to_device(batch: pipeline.Batch, *, device: Mesh) -> dict[str, jax.Array]:
    return devices.to_devices({"image": batch.images, "label": batch.labels}, device)
