"""Measure time and memory to open a record file with millions of records.

python -m benchmarks.record_index [--records 40000000] [--identities 2059906]

Writes a record file with an identity header and records without images (32 bytes each), and opens
it in new processes, for the first time and again. Needs 60 bytes of disk per record.
"""

import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro

from arcface_jax.data.recordio import index as record_index
from arcface_jax.data.recordio.index import FRAME, HEADER, MAGIC
from arcface_jax.data.recordio.source import RecordSource

_CHUNK = 1_000_000  # records written at a time
_RECORD = np.dtype(
    [("magic", "<u4"), ("length", "<u4"), ("count", "<u4"), ("label", "<f4"), ("ids", "<u8", 2)]
)
_IDENTITY = np.dtype([*_RECORD.descr, ("labels", "<f4", 2)])


def write(rec: Path, *, records: int, identities: int) -> None:
    """Writes record 0, the records of the images and identities, and the index of all."""
    first = records + 1
    with rec.open("wb") as data, rec.with_suffix(".idx").open("w") as index:
        for begin, end, kind in (
            (0, 1, _IDENTITY),
            (1, first, _RECORD),
            (first, first + identities, _IDENTITY),
        ):
            for start in range(begin, end, _CHUNK):
                keys = np.arange(start, min(start + _CHUNK, end))
                rows = np.zeros(len(keys), kind)
                rows["magic"], rows["length"] = MAGIC, kind.itemsize - FRAME.size
                rows["ids"][:, 0] = keys
                if kind is _IDENTITY:
                    rows["count"] = 2
                    rows["labels"] = (first, first + identities)
                else:
                    rows["label"] = (keys - 1) * identities // records
                offsets = data.tell() + np.arange(len(keys)) * kind.itemsize
                lines = zip(keys.tolist(), offsets.tolist(), strict=True)
                index.write("".join(f"{key}\t{at}\n" for key, at in lines))
                rows.tofile(data)
                data.seek(0, 2)  # the array bypassed Python's buffer


def measure(rec: Path, what: str) -> dict[str, float]:
    """Runs one step in this process; returns seconds, and the peak of its own memory in bytes."""
    steps: dict[str, Callable[[], object]] = {
        "text": lambda: record_index._read_text(rec.with_suffix(".idx")),
        "open": lambda: RecordSource(rec),
        "labels": lambda: RecordSource(rec).labels()[::100_000].sum(),
    }
    before = _own_memory()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak.append(_own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    kept = steps[what]()
    seconds = time.perf_counter() - begin
    peak.append(_own_memory())
    done.set()
    watcher.join()
    after = _own_memory() - before
    del kept
    return {"seconds": seconds, "peak": max(peak) - before, "after": after}


def _own_memory() -> int:
    """Returns the bytes of this process without file backing; mapped files can be dropped
    anytime.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


def main(
    records: int = 40_000_000, identities: int = 2_059_906, folder: Path | None = None
) -> None:
    """Runs the command.

    Args:
      records: Images in the file.
      identities: Number of identities in them.
      folder: Temporary folder; by default the system's.
    """
    assert _RECORD.itemsize == FRAME.size + HEADER.size
    place = Path(tempfile.mkdtemp(dir=folder))
    rec = place / "train.rec"
    result = {}
    try:
        write(rec, records=records, identities=identities)
        time.sleep(3)  # until the files count as complete
        context = multiprocessing.get_context("spawn")
        for name, what in (
            ("index text alone", "text"),
            ("first opening", "open"),
            ("second opening", "open"),
            ("labels, first time", "labels"),
            ("labels, second time", "labels"),
        ):
            with context.Pool(1) as pool:
                found = pool.apply(measure, (rec, what))
            result[name] = found
            print(
                f"{name:>20}: {found['seconds']:7.2f} s, own memory per record: "
                f"{found['peak'] / records:5.2f} bytes at most, "
                f"{found['after'] / records:5.2f} after"
            )
        kept = sum(file.stat().st_size for file in place.glob("*.arcface_index/*"))
        print(f"kept on disk, mapped: {kept / records:.2f} bytes per record")
    finally:
        shutil.rmtree(place)
    print("RESULT " + json.dumps({**result, "kept": kept, "records": records, "files": []}))


if __name__ == "__main__":
    tyro.cli(main, prog="record_index", description=__doc__)
