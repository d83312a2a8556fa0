"""Where the time goes: a profiler trace of some steps, and the slowest of several hosts."""

from pathlib import Path
from typing import Any

import jax


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
