"""Coverage-guided fuzzing of the readers: any error but the declared ones is a crash.

pip install atheris
python tests/fuzz/readers.py --seconds 60 [--readers recordio bin pairs] [--corpus FOLDER]

Each reader is fuzzed in a process of its own, for libFuzzer ends the process that it runs in. An
input that crashes a reader is left in the corpus folder as READER/crash-*; with `--replay FILE` it
is read once, for the traceback.
"""

import argparse
import json
import pickle
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

try:
    import atheris
except ImportError:
    raise SystemExit("error: the fuzzer needs atheris: pip install atheris") from None

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for the checkout that this file lies in

with atheris.instrument_imports(include=["arcface_jax.data", "pickletools"]):
    from arcface_jax.data import sidecar
    from arcface_jax.data.pairs import bins, lists
    from arcface_jax.data.recordio.reader import RecordReader, RecordWriter
    from arcface_jax.data.recordio.source import RecordSource
    from arcface_jax.errors import DataError

_MEMORY_MIB = 2048
_LONGEST = 4096  # bytes of an input
_CUT = b"\n--\n"  # between the two files of a record set, and list and ending of a pair list


def read_recordio(data: bytes, folder: Path) -> None:
    """An index and a record file, then every record by every way in."""
    idx, _, rec = data.partition(_CUT)
    (folder / "a.idx").write_bytes(idx)
    (folder / "a.rec").write_bytes(rec)
    reader = RecordReader(folder / "a.rec")
    reader.labels()
    for key in list(reader.keys[:5]):
        try:
            reader.read(int(key))
        except DataError:
            continue
    source = RecordSource(folder / "a.rec", shard=2)
    source.labels()
    for index in range(min(5, len(source))):
        try:
            source.read(index)
        except DataError:
            continue
    numbers = np.arange(min(5, len(source)))
    source.load(numbers, numbers, np.zeros((5, 112, 112, 3), np.uint8), np.zeros(5, np.int32))


def read_bin(data: bytes, folder: Path) -> None:
    """A verification set."""
    (folder / "a.bin").write_bytes(data)
    bins.read_bin(folder / "a.bin")


def read_pairs(data: bytes, folder: Path) -> None:
    """The same text as LFW's list and as CSV, over a folder with three images."""
    for ending in lists.SUFFIXES:
        path = folder / f"a{ending}"
        path.write_bytes(data)
        try:
            lists.read(path, folder)
        except DataError:
            continue


READERS = {"recordio": read_recordio, "bin": read_bin, "pairs": read_pairs}


def seeds(reader: str, folder: Path) -> list[bytes]:
    """Whole inputs to begin with."""
    jpeg = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    if reader == "bin":
        array = np.frombuffer(jpeg, np.uint8)
        contents = [([jpeg] * 4, [True, False]), ([array] * 2, np.array([True]))]
        return [pickle.dumps(content, protocol=p) for content in contents for p in (0, 2, 4)]
    if reader == "pairs":
        return [b"1\t1\nAnn\t1\t2\nAnn\t1\tBob\t1\n", b"left,right,same\na.png,b.png,1\n"]
    files = []
    for header in (True, False):
        with RecordWriter(folder / "seed.rec") as writer:
            if header:
                writer.write(0, b"", label=[3, 5])
            writer.write(1, b"abc" + struct.pack("<I", 0xCED7230A) * 2, label=0.0)
            writer.write(2, b"xyz", label=[1.0, 2.0])
        both = (folder / "seed.idx", folder / "seed.rec")
        files.append(_CUT.join(file.read_bytes() for file in both))
    return files


def fuzz(reader: str, corpus: Path, seconds: int) -> None:
    """Fuzzes one reader in this process, which ends with it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Files change faster than their time stamps: nothing may be kept of the last input.
        sidecar.SETTLED = float("inf")
        for image in ("Ann/Ann_0001.png", "Ann/Ann_0002.png", "Bob/Bob_0001.png", "a.png", "b.png"):
            (folder / image).parent.mkdir(exist_ok=True)
            cv2.imwrite(str(folder / image), np.zeros((8, 8, 3), np.uint8))

        def once(data: bytes) -> None:
            try:
                READERS[reader](data, folder)
            except DataError:
                return

        for number, seed in enumerate(seeds(reader, folder)):
            (corpus / f"seed-{number}").write_bytes(seed)
        limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={_MEMORY_MIB}", "-timeout=10"]
        options = [f"-max_len={_LONGEST}", f"-artifact_prefix={corpus}/", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], once)
        atheris.Fuzz()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for all readers together")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--corpus", type=Path, default=ROOT / "runs" / "fuzz")
    parser.add_argument("--replay", type=Path, help="read one input, of one reader")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay is not None:
        with tempfile.TemporaryDirectory() as folder:
            READERS[options.readers[0]](options.replay.read_bytes(), Path(folder))
        return
    if options.here:
        return fuzz(options.readers[0], options.corpus, options.seconds)
    result: dict = {}
    each = max(1, options.seconds // len(options.readers))
    for reader in options.readers:
        corpus = options.corpus / reader
        corpus.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--here", "--readers", reader]
        command += ["--corpus", str(corpus), "--seconds", str(each)]
        together = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, **together, text=True, errors="replace")
        runs = re.search(r"number_of_executed_units: (\d+)", done.stdout)
        covered = re.findall(r"cov: (\d+)", done.stdout)
        if done.returncode or runs is None or not covered:
            sys.exit(f"{done.stdout[-6000:]}\nerror: {reader} crashed; inputs: {corpus}/crash-*")
        result[f"{reader}/runs"], result[f"{reader}/branches"] = int(runs[1]), int(covered[-1])
        print(f"{reader}: {int(runs[1]):,} inputs, {covered[-1]} branches, no crash", flush=True)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
