"""Read randomly changed files of every format: nothing but a result or a declared error.

python -m tests.faults.fuzz --minutes 10
python -m tests.faults.fuzz --minutes 1 --formats ONNX LMDB
python -m tests.faults.fuzz --formats LMDB --seed 1234 --count 1

Each format's example (`samples`) is changed in one file at a time: bits are flipped, bytes written
over, parts cut, doubled and exchanged. What a change is depends on its seed only, so that a failure
is repeated by its number. Readers run in forks of this process, which watches them: a crash, a
hang, or too much memory fails as an exception does.
"""

import argparse
import json
import os
import random
import shutil
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from arcface_jax.errors import UserError
from tests.faults import confined, readers, samples

_ROUND = 50  # files that one fork reads
_LONGEST = 1 << 16  # bytes at the beginning and the end of a file that are changed
_NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)


class Failure(NamedTuple):
    """A file that its reader does not stand."""

    kind: str
    seed: int
    text: str


def change(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four changes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not out:
            return bytes(rng.randbytes(rng.randrange(64)))
        rng.choice(_CHANGES)(out, rng)
    return bytes(out)


def _place(out: bytearray, rng: random.Random) -> int:
    """Headers are at the beginning, directories at the end; between them are images and numbers."""
    size = len(out)
    if size <= 2 * _LONGEST or rng.random() < 0.1:
        return rng.randrange(size)
    near = rng.randrange(_LONGEST)
    return near if rng.random() < 0.5 else size - 1 - near


def _flip(out: bytearray, rng: random.Random) -> None:
    out[_place(out, rng)] ^= 1 << rng.randrange(8)


def _byte(out: bytearray, rng: random.Random) -> None:
    out[_place(out, rng)] = rng.randrange(256)


def _number(out: bytearray, rng: random.Random) -> None:
    form = rng.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    value = rng.choice(_NUMBERS) % (1 << 8 * struct.calcsize(form))
    at = _place(out, rng)
    out[at : at + struct.calcsize(form)] = struct.pack(form, value)


def _digit(out: bytearray, rng: random.Random) -> None:
    """Of text: another digit, a sign, a bracket."""
    out[_place(out, rng)] = rng.choice(b"0123456789-+.eE,:;\"'{}[]()\t\n\\/ #")


def _cut(out: bytearray, rng: random.Random) -> None:
    del out[_place(out, rng) :]


def _drop(out: bytearray, rng: random.Random) -> None:
    at = _place(out, rng)
    del out[at : at + rng.choice((1, 2, 4, 8, 64))]


def _double(out: bytearray, rng: random.Random) -> None:
    at, length = _place(out, rng), rng.choice((1, 4, 16, 256))
    out[at:at] = out[at : at + length] * rng.choice((1, 1, 2, 100))


def _move(out: bytearray, rng: random.Random) -> None:
    a, b, length = _place(out, rng), _place(out, rng), rng.choice((1, 4, 16, 64))
    out[a : a + length] = out[b : b + length]


_CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(_flip, _flip, _byte, _number, _number, _digit, _cut, _drop, _double, _move),
)


class Example:
    """The example of a format, of which changed copies are made.

    Args:
      kind: of `samples.SAMPLES`.
      folder: an empty one, for the example and a copy.
    """

    def __init__(self, kind: str, folder: Path):
        self.kind = kind
        self._whole, self._copy = folder / "whole", folder / "copy"
        self._whole.mkdir()
        made = confined.run(lambda: str(samples.SAMPLES[kind](self._whole)), seconds=300)
        assert made.kind == "read", str(made)
        self._path = Path(made.text).relative_to(self._whole)
        found = sorted(p for p in self._whole.rglob("*") if p.is_file() and not p.is_symlink())
        # Of images one is enough, and locks are none of a reader's.
        images = [p for p in found if p.suffix == ".jpg"][:1]
        self._files = [p.relative_to(self._whole) for p in found if p.suffix != ".jpg"]
        self._files += [p.relative_to(self._whole) for p in images]

    def read_changed(self, seed: int) -> str:
        """Reads a copy in which one file is changed; returns the outcome's name.

        Raises:
          Exception: the reader raised what it does not declare.
        """
        rng = random.Random(f"{self.kind} {seed}")
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._whole, self._copy)
        file = self._copy / rng.choice(self._files)
        file.write_bytes(change(file.read_bytes(), rng))
        try:
            readers.READERS[self.kind].read(self._copy / self._path)
        except UserError as error:
            assert "\n" not in str(error), f"more than one line: {error}"
            return "refused"
        return "read"

    def round(self, seeds: Sequence[int], log: Path) -> str:
        """Reads several changed copies; keeps in a file which one is being read.

        Returns:
          JSON of the outcomes' counts, and of failures.
        """
        counts: Counter[str] = Counter()
        failures = []
        for seed in seeds:
            log.write_text(str(seed))
            try:
                counts[self.read_changed(seed)] += 1
            except Exception:
                failures.append([seed, traceback.format_exc()])
        return json.dumps([counts, failures])


def fuzz(
    example: Example, seeds: Iterator[int], folder: Path
) -> tuple[Counter[str], list[Failure]]:
    """One round of a format: a fork of this process reads changed copies until it ends or fails."""
    log = folder / "seed"
    batch = [next(seeds) for _ in range(_ROUND)]
    outcome = confined.run(lambda: example.round(batch, log), seconds=_ROUND * confined.SECONDS)
    if outcome.kind == "read":
        counts, failures = json.loads(outcome.text)
        return Counter(counts), [Failure(example.kind, *failure) for failure in failures]
    # The process was ended: the copy that it was reading is the reason.
    seed = int(log.read_text())
    done = batch.index(seed)
    counts, failures = Counter({"not counted": done}), [Failure(example.kind, seed, str(outcome))]
    return counts, failures


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if a reader failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all formats together")
    parser.add_argument("--formats", nargs="+", choices=samples.SAMPLES, default=[*samples.SAMPLES])
    parser.add_argument("--seed", type=int, default=0, help="number of the first change")
    parser.add_argument("--count", type=int, help="changes of each format, instead of a time")
    given = parser.parse_args(arguments)
    readers.preload(given.formats)
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    with TemporaryDirectory() as top:
        os.chdir(top)  # where code of a file would leave its mark
        examples = []
        for number, kind in enumerate(given.formats):
            (Path(top) / str(number)).mkdir()
            examples.append(Example(kind, Path(top) / str(number)))
        if given.count:
            for example in examples:
                text = example.round(
                    range(given.seed, given.seed + given.count), Path(top) / "seed"
                )
                found, wrong = json.loads(text)
                counts.update(found)
                failures += [Failure(example.kind, *failure) for failure in wrong]
        else:
            failures = _until(given.minutes, examples, given.seed, Path(top), counts)
    for failure in failures:
        print(f"{failure.kind}, --seed {failure.seed}: {failure.text}")
    print(
        "RESULT " + json.dumps({**counts, "formats": len(given.formats), "failures": len(failures)})
    )
    return 1 if failures else 0


def _until(
    minutes: float, examples: list[Example], seed: int, folder: Path, counts: Counter[str]
) -> list[Failure]:
    """Rounds of all formats in turn, for some minutes; each distinct failure once."""
    seeds = {example.kind: iter(range(seed, 1 << 60)) for example in examples}
    failures: dict[tuple[str, str], Failure] = {}
    end = time.monotonic() + 60 * minutes
    while True:
        for example in examples:
            if time.monotonic() > end:
                return list(failures.values())
            found, wrong = fuzz(example, seeds[example.kind], folder)
            counts.update(found)
            counts.update({f"{example.kind}": found.total()})
            for failure in wrong:
                last = failure.text.strip().splitlines()[-1][:60]
                failures.setdefault((failure.kind, last), failure)


if __name__ == "__main__":
    sys.exit(main())
