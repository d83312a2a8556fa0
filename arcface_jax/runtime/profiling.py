"""Measure where the time goes: the step clock, and a profiler trace of some steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


class Clock:
    """Measures training time and the waits for data and devices, without pauses."""

    def __init__(self, *, global_batch_size: int):
        self._batch = global_batch_size
        self.restart()

    def restart(self) -> None:
        """Discards the measurements so far."""
        self._start, self._steps = time.perf_counter(), 0
        self._waited = self._blocked = self._paused = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures a wait for a batch; use around every one."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Measures a wait for the devices; use around every one."""
        start = time.perf_counter()
        yield
        self._blocked += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes what is not training: compilation, evaluation, saving."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def count_step(self) -> None:
        """Counts one training step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Returns the `perf/...` metrics since the last call; empty if no step was counted."""
        seconds = time.perf_counter() - self._start - self._paused
        steps, waited, blocked = self._steps, self._waited, self._blocked
        self.restart()
        if not steps or seconds <= 0:
            return {}
        return {
            "perf/images_per_sec": steps * self._batch / seconds,
            "perf/steps_per_sec": steps / seconds,
            "perf/data_wait_ms": 1e3 * waited / steps,
            "perf/data_wait_share": waited / seconds,
            "perf/host_ms": 1e3 * (seconds - blocked) / steps,
        }


class Trace:
    """Profiles some steps into WORKDIR/profile; other processes than the first below it.

    Args:
      workdir: workdir of the run.
      steps: the first and the last step to trace; (0, 0) traces none.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int]):
        # JAX names a trace by second and host, and fails if it finds several in a folder.
        folder, number = workdir / "profile", jax.process_index()
        self._folder = folder / f"process_{number}" if number else folder
        self._first, self._last = steps
        self._open = False

    def before(self, step: int) -> None:
        """Starts the trace if this step is among the traced ones."""
        if self._first <= step <= self._last and not self._open:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._open = True

    def after(self, step: int, metrics: Any) -> str | None:
        """Stops the trace after its last step, and returns how to open it."""
        if not self._open or step < self._last:
            return None
        jax.block_until_ready(metrics)
        self.close()
        return (
            f"profile of steps {self._first} to {self._last} in {self._folder}: open "
            "perfetto_trace.json.gz below it at https://ui.perfetto.dev, or pip install xprof and "
            f"run xprof --logdir {self._folder}"
        )

    def close(self) -> None:
        """Stops and writes the trace if it is running."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
