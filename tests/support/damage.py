"""Ways in which a file on disk gets damaged: each takes the file's path and changes it in place."""

import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], None]


def flip_bit(path: Path) -> None:
    """Flips the lowest bit of the byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    """Leaves zero bytes, as a crash does between creating a file and writing it."""
    path.write_bytes(b"")


def truncate(path: Path) -> None:
    """Drops the second half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def delete(path: Path) -> None:
    """Removes the file."""
    path.unlink()


def wrong_json(path: Path) -> None:
    """Replaces the content by valid JSON of a type that no file here has: a bare number."""
    path.write_text("7\n")


def dangling_symlink(path: Path) -> None:
    """Puts a symbolic link to nothing in the file's place."""
    path.unlink()
    path.symlink_to(path.with_name(path.name + ".gone"))


def symlink_away(path: Path) -> None:
    """Moves the file beside its folder and leaves a symbolic link to it."""
    target = path.parent.with_name(f"{path.parent.name}.{path.name}.moved")
    shutil.move(path, target)
    path.symlink_to(target)


def folder_in_place(path: Path) -> None:
    """Puts an empty folder in the file's place."""
    path.unlink()
    path.mkdir()


def extra_file(path: Path) -> None:
    """Leaves a stray file with similar name and content beside it."""
    shutil.copyfile(path, path.with_name(path.name + ".copy"))


DAMAGES: tuple[Damage, ...] = (
    flip_bit,
    empty,
    truncate,
    delete,
    wrong_json,
    dangling_symlink,
    symlink_away,
    folder_in_place,
    extra_file,
)
"""All of them, for `pytest.mark.parametrize(..., ids=name)`."""


def name(damage: Damage) -> str:
    """The damage's name, for test ids and tables."""
    return damage.__name__
