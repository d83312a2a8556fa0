"""Hostile files of every format: each a change of an honest example that `samples` makes.

An attack takes the path of the example, in a folder of its own, and returns the path to read.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import attacks_on_models, attacks_on_sets
from tests.faults.attack_parts import CODE, LONG_NAME, NESTED_JSON, SPECIAL, Attack

OF_FORMATS = (attacks_on_models, attacks_on_sets)
"""The modules that add to `SPECIAL` what only some formats can be given."""


def _files(path: Path) -> list[Path]:
    """The example's files, relative to the folder that it lies in; of many alike the first."""
    top = path.parent
    found = sorted(file for file in top.rglob("*") if file.is_file())
    kinds = {
        (file.parent.name if file.parent.name == "d" else "", file.suffix, file.name[:9]): file
        for file in found
    }
    images = [file for file in kinds.values() if file.suffix == ".jpg"][:1]
    return [file for file in kinds.values() if file.suffix != ".jpg"] + images


def _each_file(change: Callable[[Path], object]) -> Callable[[Path], Iterator[Attack]]:
    def make(example: Path) -> Iterator[Attack]:
        for file in _files(example):
            name = file.relative_to(example.parent)

            def attack(path: Path, name: Path = name) -> Path:
                change(path.parent / name)
                return path

            yield attack

    return make


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _bad_paths(example: Path) -> Iterator[Attack]:
    for name in ("a\0b", LONG_NAME, "n" * 252):
        yield lambda path, name=name: path.with_name(f"{name}{example.suffix}")


def _nested_json(file: Path) -> None:
    if file.suffix in (".json", ".yaml"):
        file.write_text(NESTED_JSON)


GENERAL: dict[str, Callable[[Path], Iterator[Attack]]] = {
    "code": _each_file(lambda file: file.write_bytes(CODE)),
    "names": _bad_paths,
    "nesting": _each_file(_nested_json),
    "pipe": _each_file(_pipe),
    "device": _each_file(_device),
    "empty": _each_file(lambda file: file.write_bytes(b"")),
    "cut": _each_file(_cut),
}


NAMES = (
    *("code", "image bomb", "claims", "expansion", "nesting", "names", "pipe", "device"),
    *("empty", "cut"),
)
"""Of all attacks, in the order of the table."""


def variants(kind: str, attack: str, example: Path) -> Iterator[Attack]:
    """The hostile files of a format and an attack; none where the format has no place for it."""
    if attack in GENERAL:
        yield from GENERAL[attack](example)
    if (kind, attack) in SPECIAL:
        yield from SPECIAL[kind, attack]()
