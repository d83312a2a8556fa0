"""Search in a large gallery of random directions, scanned as float32 and as int8."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.errors import DataError
from arcface_jax.inference import gallery

_PART = 50_000


class Row(NamedTuple):
    """Result of one form and number of queries: the best of several repeats, because of other
    load.
    """

    form: gallery.Form
    queries: int
    seconds: float
    cpu_seconds: float
    """CPU time of all threads; on idle cores, the seconds are this divided by the cores."""


def measure(*, rows: int, size: int, k: int, repeats: int, queries: tuple[int, ...]) -> list[Row]:
    """Builds both galleries and searches them in turn, warm.

    Args:
      rows: N.
      size: D.
      k: number of rows to find.
      repeats: timed searches of each, after two that read the files.
      queries: numbers of queries searched together.

    Raises:
      DataError: the two forms differ.
    """

    def parts() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for start in range(0, rows, _PART):
            yield rng.standard_normal((min(_PART, rows - start), size), np.float32)

    names = list(map(str, range(rows)))
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        forms: tuple[gallery.Form, ...] = ("float32", "int8")
        made = {
            form: gallery.build(Path(folder) / form, parts(), names, model="", form=form)
            for form in forms
        }
        for count in queries:
            asked = np.random.default_rng(1).standard_normal((count, size), np.float32)
            times: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
            found = {}
            for _ in range(repeats + 2):
                for form, each in made.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    found[form] = each.search(asked, k)
                    times[form].append((time.perf_counter() - wall, time.process_time() - cpu))
            if found["float32"].name != found["int8"].name:
                raise DataError("the int8 gallery found different rows than the float32 one")
            for form in forms:
                walls, cpus = zip(*times[form][2:], strict=True)
                measured.append(Row(form, count, min(walls), min(cpus)))
    return measured
