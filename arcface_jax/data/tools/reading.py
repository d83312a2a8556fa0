"""Read a whole training set in order, with threads and a progress bar."""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from arcface_jax.errors import ImageError
from arcface_jax.runtime import streams

T = TypeVar("T")
_AHEAD = 64  # images in flight per thread


@contextlib.contextmanager
def in_order(
    numbers: Sequence[int] | np.ndarray,
    look: Callable[[int], T],
    *,
    what: str,
    threads: int = 0,
    done: int = 0,
    total: int | None = None,
) -> Iterator[Iterator[tuple[int, T | ImageError]]]:
    """Applies a function to image numbers in parallel, with the results in their order.

    A context, because a generator that an error abandons ends late, and in any thread.

    Args:
      numbers: numbers of the images.
      look: processes one; it should mostly release the GIL, as reading and decoding do.
      what: label of the progress bar on stderr.
      threads: 0 for one per processor.
      done: numbers of the whole job that earlier calls have done.
      total: numbers of the whole job, where this call does a part of it.

    Yields:
      An iterator over each number and what `look` returned, or the ImageError that it raised.
    """
    threads = threads or os.cpu_count() or 1
    waiting: deque[tuple[int, Future]] = deque()
    with _progress() as progress, ThreadPoolExecutor(threads) as pool:
        task = progress.add_task(what, total=total or len(numbers), completed=done)

        def results() -> Iterator[tuple[int, T | ImageError]]:
            for number in map(int, numbers):
                waiting.append((number, pool.submit(look, number)))
                if len(waiting) > threads * _AHEAD:
                    yield _result(*waiting.popleft())
                    progress.advance(task)
            while waiting:
                yield _result(*waiting.popleft())
                progress.advance(task)

        try:
            yield results()
        finally:
            for _, future in waiting:
                future.cancel()


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(file=streams.plain(sys.stderr)))


def _result(number: int, future: Future) -> tuple[int, T | ImageError]:
    try:
        return number, future.result()
    except ImageError as error:
        return number, error
