"""RecordIO read by struct alone, for comparison with what the project reads and writes."""

import io
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

MAGIC = 0xCED7230A


class Seen(NamedTuple):
    """A record as it stands in the file."""

    labels: tuple[float, ...]
    id: int
    data: bytes


def read(rec: Path) -> dict[int, Seen]:
    """Walks through a record file from its beginning; the index is compared with where it gets."""
    raw = rec.read_bytes()
    lines = rec.with_suffix(".idx").read_text().splitlines()
    keys = {int(at): int(key) for key, at in (line.split("\t") for line in lines)}
    records, at = {}, 0
    while at < len(raw):
        begin, payload, part = at, b"", 0
        while True:
            magic, word = struct.unpack_from("<II", raw, at)
            assert magic == MAGIC, at
            part, length = word >> 29, word & 0x1FFFFFFF
            payload += raw[at + 8 : at + 8 + length]
            at += 8 + (length + 3) // 4 * 4
            if part in (0, 3):
                break
            payload += struct.pack("<I", MAGIC)
        flag, label, number, _ = struct.unpack_from("<IfQQ", payload)
        labels = struct.unpack_from(f"<{flag}f", payload, 24) if flag else (label,)
        records[keys.pop(begin)] = Seen(labels, number, payload[24 + 4 * flag :])
    assert not keys, "the index names records that are not there"
    return records


def face(number: int, *, height: int = 112, width: int = 112) -> np.ndarray:
    """(height, width, 3) uint8 of its own."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def encode(image: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """By Pillow, not by OpenCV."""
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def smooth(number: int, *, height: int = 112, width: int = 112) -> np.ndarray:
    """A picture that JPEG keeps small."""
    rng = np.random.default_rng(number)
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
    waves = [np.sin(x * rng.uniform(0.3, 2) + y * rng.uniform(0.3, 2) + c) for c in range(3)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)
