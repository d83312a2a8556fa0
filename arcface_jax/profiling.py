"""Where the time goes: a profiler trace of some steps, and the slowest of several hosts."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# A host that takes so much longer than the median is called slow, if it costs this many ms a step.
_SLOW_RATIO, _SLOW_MS = 1.5, 5.0


class Trace:
    """Traces steps `first` to `last` into WORKDIR/profile; 0, 0 traces none.

    Args:
      workdir: of the run.
      steps: first and last.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int]):
        self._folder = workdir / "profile"
        self._first, self._last = steps
        self._open = False

    def before(self, step: int) -> None:
        """Starts at the first step, or at the one that a run resumes with among them."""
        if self._first <= step <= self._last and not self._open:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._open = True

    def after(self, step: int, metrics: Any) -> str | None:
        """Stops behind the last step, once the devices are done; says how to look at it."""
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
        """Writes what was traced, where a trace is open."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()


def slowest_host(own_ms: float) -> tuple[dict[str, float], str | None]:
    """Compares the hosts; all of them have to call this at the same step.

    Args:
      own_ms: of this host, a step: the time that it did not spend waiting for its devices. A step
        takes every host equally long, for they meet in its collectives; in the slowest the others'
        devices wait.

    Returns:
      `perf/slowest_host_ms` and `perf/slowest_host`, and words where one host holds up the rest.
    """
    if jax.process_count() == 1:
        return {"perf/slowest_host_ms": own_ms, "perf/slowest_host": 0}, None
    times = multihost_utils.process_allgather(np.float32(own_ms)).reshape(-1)
    return compare_hosts(np.asarray(times))


def compare_hosts(times: np.ndarray) -> tuple[dict[str, float], str | None]:
    """What `slowest_host` returns, of the times (hosts,) of all, in milliseconds."""
    slowest = int(times.argmax())
    worst, others = float(times[slowest]), float(np.median(np.delete(times, slowest)))
    values = {"perf/slowest_host_ms": worst, "perf/slowest_host": slowest}
    if worst < max(_SLOW_RATIO * others, others + _SLOW_MS):
        return values, None
    return values, (
        f"host {slowest} of {len(times)} holds the others up: it is busy for {worst:.0f} ms a step "
        f"outside the devices, the others for {others:.0f}; look at its disk, its processor, and "
        "its data.workers"
    )
