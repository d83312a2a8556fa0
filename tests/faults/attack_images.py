"""Image files of a few hundred bytes whose headers announce gigabytes of pixels."""

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from tests.faults.attack_parts import Attack


def _jpeg(width: int, height: int) -> bytes:
    """822 bytes or so that announce a size."""
    data = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(1 << 24), 9)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _tiff(width: int, height: int) -> bytes:
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 5),  # LZW
        (262, 3, 1),
        (273, 4, 200),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, 16),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(216, b"\0")


def _encoded(suffix: str, old: bytes, new: bytes) -> bytes:
    """An image whose size, written as `old`, is replaced."""
    lossy = [cv2.IMWRITE_WEBP_QUALITY, 80] if suffix == ".webp" else []
    data = cv2.imencode(suffix, np.zeros((113, 119, 3), np.uint8), lossy)[1].tobytes()
    assert old in data[:64], suffix
    return data.replace(old, new, 1)


def bombs() -> dict[str, bytes]:
    """Small files that announce 30,000 x 30,000 pixels, or the most that their format can."""
    side = 30_000
    return {
        "JPEG": _jpeg(side, side),
        "PNG": _png(side, side),
        "TIFF": _tiff(side, side),
        "BMP": _encoded(".bmp", struct.pack("<ii", 119, 113), struct.pack("<ii", side, side)),
        "GIF": b"GIF89a"
        + struct.pack("<HHBBB", side, side, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, side, side, 0)
        + b"\x02\x02\x44\x01\x00;",
        "WebP": _encoded(".webp", struct.pack("<HH", 119, 113), struct.pack("<HH", 16383, 16383)),
        "PNM": b"P6\n%d %d\n255\n" % (side, side) + bytes(64),
        "JPEG 2000": _encoded(".jp2", struct.pack(">II", 113, 119), struct.pack(">II", side, side)),
        "Sun raster": struct.pack(">8I", 0x59A66A95, side, side, 24, 0, 1, 0, 0) + bytes(64),
        "HDR": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y %d +X %d\n" % (side, side) + bytes(64),
    }


def with_each_bomb(put: Callable[[Path, bytes], Path]) -> Iterator[Attack]:
    for data in bombs().values():
        yield lambda path, data=data: put(path, data)
