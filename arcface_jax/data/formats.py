"""Detect an image's format by its first bytes, and read its size from the header.

Nothing is decoded. File names are not trusted, because images may have no suffix or a wrong one;
and a header may announce more pixels than fit into memory.
"""

import struct

MAX_PIXELS = 2**26
"""Most pixels of an image to decode, 200 MB as RGB; `data/__init__.py` sets OpenCV's limit to the
same."""
HEAD = 32
"""Number of bytes from which `sniff` detects a format."""

_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "HDR"),
    (b"#?RGBE", "HDR"),
    (b"\x59\xa6\x6a\x95", "Sun raster"),
)
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset((0x01, 0xFF, *range(0xD0, 0xD9)))  # markers without a length, and padding
_HEIGHT_WIDTH = struct.Struct(">HH").unpack_from
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
HEIC = "HEIC"
"""Format of Apple's photographs, which OpenCV cannot read."""


def sniff(data: bytes) -> str | None:
    """Detects the format of an image from its first `HEAD` bytes or more; None if unknown."""
    for start, name in _STARTS:
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        return _of_brands(data)
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0" and data[10:11]:
        return "BMP"
    # PBM, PGM, PPM, PAM, PFM: a letter, a digit, white space, then a number or a comment.
    if data[:1] == b"P" and data[1:2] in b"1234567fF" and data[2:3] in b" \t\r\n" and data[3:4]:
        return "PNM" if data[3:4].isdigit() or data[3:4] in b"#W" else None
    return None


def _of_brands(data: bytes) -> str | None:
    """Returns AVIF or HEIC by the brands of an ISO media file; None for a video."""
    brands = (data[8:12], *(data[i : i + 4] for i in range(16, len(data), 4)))
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    return HEIC if any(brand in _HEIC_BRANDS for brand in brands) else None


def may_have_16_bits(data: bytes) -> bool:
    """Returns whether these first bytes belong to a file that may have 16 bits per channel."""
    if data[:4] == b"\x89PNG":
        return data[24:25] == b"\x10"
    return sniff(data) in ("TIFF", "PNM", "JPEG 2000")


def announced(data: bytes) -> tuple[int, int] | None:
    """Returns width and height from the header; None if the format stores them elsewhere.

    Supports JPEG, PNG, GIF, BMP, WebP and PNM. OpenCV's own limit applies to the others.
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _of_jpeg(data)
        if data[:4] == b"\x89PNG":
            return struct.unpack_from(">II", data, 16)
        if data[:4] == b"GIF8":
            return struct.unpack_from("<HH", data, 6)
        if data[:2] == b"BM":
            width, height = struct.unpack_from("<ii", data, 18)
            return abs(width), abs(height)
        if data[:4] == b"RIFF":
            return _of_webp(data)
        if data[:1] == b"P" and data[1:2] in b"123456":
            return _of_pnm(data)
    except (struct.error, ValueError, IndexError):
        return None
    return None


def _of_jpeg(data: bytes) -> tuple[int, int] | None:
    """Reads the size from the frame header, skipping the segments before it."""
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            height, width = _HEIGHT_WIDTH(data, at + 5)
            return width, height
        if marker in _JPEG_BARE:
            at += 1 if marker == 0xFF else 2
        elif marker in (0xD9, 0xDA):  # the end, or the pixels
            return None
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _of_webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return (
            1 + int.from_bytes(data[24:27], "little"),
            1 + int.from_bytes(data[27:30], "little"),
        )
    return None


def _of_pnm(data: bytes) -> tuple[int, int]:
    lines = (line.partition(b"#")[0] for line in data[:1024].split(b"\n"))
    words = b" ".join(lines).split()
    return int(words[1]), int(words[2])
