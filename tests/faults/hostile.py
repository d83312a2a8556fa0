"""Read hostile files of every format, and write what came of it as a table.

python -m tests.faults.hostile --write docs/reliability.md
python -m tests.faults.hostile --formats ONNX "torch .pth" --attacks expansion claims
python -m tests.faults.hostile --formats LMDB --write docs/reliability.md

`attacks` makes the files from the examples of `samples`; each is read as commands read it, in a
fork that is watched: 5 seconds of processor time and 1 GiB above the start are its limits. The
command fails if anything ends but in a result or one line, or if code of a file runs.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree
from subprocess import run
from tempfile import TemporaryDirectory

from tests.faults import attacks, confined, readers, samples
from tests.faults.attacks import Attack
from tests.faults.confined import Outcome

BEGIN, END = "<!-- made by python -m tests.faults.hostile -->\n", "<!-- end of hostile -->"
_MAKING = 600.0  # seconds, of a file
_NONE = {"image bomb": "no images", "expansion": "not tried", "claims": "no counts"}
_MARK = "CODE_RAN"  # which code of a file would leave
_IMPORTED = "this"  # a module that a file names, which prints and does nothing else


def read(kind: str, attack: Attack, example: Path, folder: Path) -> Outcome:
    """Makes one hostile file beside its example and reads it.

    Args:
      kind: the format.
      attack: makes the file.
      example: of the format, in a folder of its own.
      folder: where a copy of that folder is made, and removed.
    """
    copy = folder / "copy"
    copytree(example.parent, copy, symlinks=True)
    try:
        made = confined.run(
            lambda: str(attack(copy / example.name)), seconds=_MAKING, memory=1 << 40
        )
        assert made.kind == "read", f"{kind}: the attack cannot be made: {made}"
        path = Path(made.text)
        return confined.run(lambda: _without_code(kind, path))
    finally:
        run(["rm", "-rf", str(copy)], check=True)  # which is not afraid of deep folders


def _without_code(kind: str, path: Path) -> str:
    try:
        return readers.READERS[kind].read(path)
    finally:
        ran = [name for name in (_MARK, f"{path.parent}/{_MARK}") if os.path.exists(name)]
        assert not ran and _IMPORTED not in sys.modules, "code of the file ran"


def make_example(kind: str, folder: Path) -> Path:
    """An honest file or folder of a format, the only entry that its reader is given."""
    made = confined.run(lambda: str(samples.SAMPLES[kind](folder)), seconds=_MAKING)
    assert made.kind == "read", f"{kind}: {made}"
    return Path(made.text)


def cell(kind: str, attack: str, outcomes: Sequence[Outcome]) -> str:
    """What came of the files of a format and an attack, for the table."""
    if not outcomes:
        return _NONE.get(attack, "no place for it")
    words = Counter(_word(outcome) for outcome in outcomes)
    return ", ".join(f"{word} {count}" for word, count in words.most_common())


def _word(outcome: Outcome) -> str:
    if outcome.bad:
        return outcome.kind.upper()
    return "counted" if outcome.text.startswith("unreadable: ") else outcome.kind


def table(kinds: Sequence[str], names: Sequence[str], cells: dict[tuple[str, str], str]) -> str:
    """In Markdown."""
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[kind, *(cells[kind, attack] for attack in names)] for kind in kinds]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write(page: Path, cells: dict[tuple[str, str], str]) -> None:
    """Puts cells into the page's table, whose other cells stay."""
    before, _, rest = page.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    head, *lines = [line.strip("| \n").split(" | ") for line in old.splitlines()] or [[]]
    kept = {
        (row[0], attack): text
        for row in lines[1:]
        for attack, text in zip(head, row[1:], strict=True)
    }
    every = kept | cells
    kinds = [kind for kind in samples.SAMPLES if (kind, attacks.NAMES[0]) in every]
    page.write_text(before + BEGIN + table(kinds, attacks.NAMES, every) + END + after)


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if an outcome is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds, names = [*samples.SAMPLES], [*attacks.NAMES]
    parser.add_argument("--formats", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--attacks", nargs="+", choices=names, default=names)
    parser.add_argument("--write", type=Path, help="the page whose rows are replaced")
    given = parser.parse_args(arguments)
    page = given.write and given.write.resolve()
    if page and given.attacks != names:
        parser.error("--write needs all attacks: a row has a cell for each")
    readers.preload(given.formats)
    cells: dict[tuple[str, str], str] = {}
    every: list[Outcome] = []
    with TemporaryDirectory() as top:
        os.chdir(top)
        for number, kind in enumerate(given.formats):
            folder = Path(top) / str(number)
            (folder / "whole").mkdir(parents=True)
            example = make_example(kind, folder / "whole")
            for attack in given.attacks:
                outcomes = []
                for place, variant in enumerate(attacks.variants(kind, attack, example)):
                    outcomes.append(read(kind, variant, example, folder))
                    if outcomes[-1].bad:
                        print(f"{kind}, {attack} {place}: {outcomes[-1]}", flush=True)
                cells[kind, attack] = cell(kind, attack, outcomes)
                every += outcomes
            print(
                f"{kind}: {', '.join(cells[kind, attack] for attack in given.attacks)}", flush=True
            )
            if page:  # at once: all of it takes a quarter of an hour
                write(page, cells)
        os.chdir("/")
    bad = sum(outcome.bad for outcome in every)
    most = max(every, key=lambda outcome: outcome.memory)
    slowest = max(every, key=lambda outcome: outcome.seconds)
    result = {"files": len(every), "bad": bad, "seconds": round(slowest.seconds, 1)}
    print("RESULT " + json.dumps({**result, "memory_mib": most.memory >> 20}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
