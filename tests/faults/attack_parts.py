"""What hostile files are made of: the registry of attacks, and changes that several share."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Attack = Callable[[Path], Path]
"""Changes an example, given its path, and returns the path to read."""
HUGE = 2_147_483_646  # the largest label that a 32-bit number counts classes of


def changed_json(path: Path, **changed: Any) -> Path:
    """Replaces fields, `a__b` for a field of a field, of a JSON file."""
    content = json.loads(path.read_text())
    for name, value in changed.items():
        place = content
        *parents, last = name.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))
    return path


def inside(name: str, change: Callable[[Path], object]) -> Attack:
    """A change of a file in the example's folder."""

    def attack(path: Path) -> Path:
        change(path / name)
        return path

    return attack


def text_file(text: str) -> Attack:
    """Text in the file's place."""

    def attack(path: Path) -> Path:
        path.write_text(text)
        return path

    return attack


def bytes_file(data: bytes) -> Attack:
    """Bytes in the file's place."""

    def attack(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return attack


DEEP = 200_000
NESTED_JSON = '{"a":' * DEEP + "1" + "}" * DEEP
NESTED_PICKLE = b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."
CODE = b"cposix\nsystem\n(S'touch CODE_RAN'\ntR."
LONG_NUMBER = "9" * 10_000
LONG_NAME = "n" * 5000


class Call:
    """Pickled, it asks for a call."""

    def __reduce__(self):
        return os.system, ("touch CODE_RAN",)


def npy_claiming(shape: tuple[int, ...]) -> bytes:
    """A `.npy` file of 64 bytes of numbers, whose header announces a shape."""
    head = repr({"descr": "<f4", "fortran_order": False, "shape": shape}) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head.encode() + bytes(64)


Variants = Callable[[], Iterator[Attack]]
SPECIAL: dict[tuple[str, str], Variants] = {}
"""By format and attack, beside what `GENERAL` has for all formats."""


def hostile(kind: str, attack: str) -> Callable[[Variants], Variants]:
    """Registers what makes the hostile files of a format and an attack."""

    def register(make: Variants) -> Variants:
        SPECIAL[kind, attack] = make
        return make

    return register


def patched(path: Path, at: int, data: bytes) -> Path:
    """Bytes written over others."""
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)
    return path
