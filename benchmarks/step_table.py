"""Compare arcface_torch's published speed table with the memory of this project's step.

Published: insightface's recognition/arcface_torch README of 2021, on 8 x V100-32GB. This project's
bytes come from the real train step, compiled for eight devices from shapes; nothing is allocated.
Temporaries are laid out by XLA's CPU backend; a GPU's differ, mostly in the savings of 16 bits.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from arcface_jax.config import Dtype, Network
from arcface_jax.machine import plan
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import manifest, step
from benchmarks import head
from benchmarks.step import Case, make_config

DEVICES = 8
CASES: tuple[tuple[Network, int, int], ...] = (
    ("r100", 2_000_000, 1024),
    ("r50", 4_000_000, 1024),
    ("r50", 8_000_000, 512),
)
"""Network, classes and global batch of the published table's columns."""

# samples/s over all GPUs, GB per GPU.
PUBLISHED = {
    "model parallel, float32": ((1362, 27.3), (1600, 30.3), (482, 32.1)),
    "model parallel, float16": ((2006, 20.3), (2165, 26.6), (767, 32.1)),
    "Partial FC 0.1, float16": ((3247, 11.9), (4385, 10.8), (3001, 11.1)),
}

METHODS: dict[str, tuple[Dtype, float]] = {
    "float32": ("float32", 1.0),
    "bfloat16": ("bfloat16", 1.0),
    "float16": ("float16", 1.0),
    "Partial FC 0.1, bfloat16": ("bfloat16", 0.1),
    "Partial FC 0.1, float16": ("float16", 0.1),
}
"""This project's methods by compute type and sample rate; without one, blocked full softmax."""


class Row(NamedTuple):
    """One method on one case; bytes are per device, of eight."""

    network: str
    classes: int
    batch: int
    method: str
    source: str
    """`published`, `compiled` (this project's step), or `sum` (its backbone and a dense head,
    compiled separately)."""
    state_bytes: int | None = None
    temporary_bytes: int | None = None
    total_bytes: int | None = None
    published_gb: float | None = None
    published_images_per_second: int | None = None
    compile_seconds: float | None = None


def measure(
    *, cases: tuple[tuple[Network, int, int], ...] = CASES, say: Callable[[str], None]
) -> list[Row]:
    """Computes all rows of the table.

    Args:
      cases: network, classes and global batch.
      say: called with each finished row, because the whole takes minutes.
    """
    rows = []
    for network, classes, batch in cases:
        for row in _rows(network, classes, batch):
            say(f"{network}, {classes:,} classes, batch {batch}: {row.method} ({row.source})")
            rows.append(row)
    return rows


def _rows(network: Network, classes: int, batch: int) -> Iterator[Row]:
    size = network, classes, batch
    if size in CASES:
        for method, columns in PUBLISHED.items():
            speed, memory = columns[CASES.index(size)]
            yield Row(
                *size,
                method,
                "published",
                published_gb=memory,
                published_images_per_second=speed,
            )
    for method, (dtype, rate) in METHODS.items():
        row = _compiled(Case(network, batch, classes, DEVICES, dtype, rate), method)
        if rate == 1:
            yield _with_dense_head(row, dtype)
        yield row


def _compiled(case: Case, method: str) -> Row:
    """Compiles this project's step from shapes."""
    config, mesh = make_config(case), meshes.make(case.devices)
    begin = time.perf_counter()
    state = step.abstract_state(config, num_classes=case.classes, mesh=mesh)
    temporary = plan.temporary_bytes(config, case.batch, state, num_classes=case.classes, mesh=mesh)
    seconds = time.perf_counter() - begin
    kept = sum(manifest.state_bytes(state).values())
    total = kept + temporary + manifest.device_bytes(plan.abstract_batch(case.batch, mesh))
    name = f"blocked full softmax, {method}" if case.sample_rate == 1 else method
    sizes = (case.network, case.classes, case.batch)
    return Row(*sizes, name, "compiled", kept, temporary, total, compile_seconds=seconds)


def _with_dense_head(row: Row, dtype: Dtype) -> Row:
    """Adds a dense head, which stores the logits, to the backbone's step.

    This is an upper bound: the backbone keeps its activations while the head runs, but its peak, in
    the backward pass, comes after the logits are freed. The blocked head's tens of MiB are included
    in the sum.
    """
    case = head.Case(row.classes, row.batch, DEVICES, dtype=dtype)
    dense = head.compile_method("model parallel", case).temporary_bytes
    assert row.temporary_bytes is not None and row.total_bytes is not None
    return row._replace(
        method=f"model parallel, {dtype}",
        source="sum",
        temporary_bytes=row.temporary_bytes + dense,
        total_bytes=row.total_bytes + dense,
        compile_seconds=None,
    )
