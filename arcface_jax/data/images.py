"""Image files: find them, and the only code that decodes, encodes and resizes them."""

import glob
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from arcface_jax.data import OPENCV_IS_LIMITED, formats
from arcface_jax.errors import DataError, ImageError, install
from arcface_jax.runtime import foreign

IMAGE_SIZE = 112
"""Side of an aligned face in pixels, the input of every backbone."""
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".jpe", ".jfif", ".gif", ".avif", ".jp2"),
    *(".pgm", ".ppm", ".pnm", ".heic", ".heif", ".tif", ".tiff"),
)
"""Suffixes of files that count as images without being opened, in upper or lower case."""

_IMAGES = frozenset(IMAGE_SUFFIXES)
# Suffixes that are never images and not opened either: a set may have a text file per image.
_OTHERS = frozenset(
    (
        *(".txt", ".csv", ".tsv", ".lst", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md"),
        *(".html", ".npy", ".npz", ".mat", ".pkl", ".pts", ".rec", ".idx", ".bin", ".zip"),
        *(".tar", ".gz", ".py", ".log", ".db", ".ini", ".mp4", ".avi", ".mov", ".pth", ".pt"),
        *(".onnx", ".parquet"),
    )
)
_SYSTEM = frozenset(
    (
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir"),
        *("$recycle.bin", "system volume information", "lost+found", "__pycache__"),
    )
)
HIDDEN, SPECIAL = "hidden", "special files"
"""Kinds of entries that are never opened: hidden or system files; pipes, sockets and devices."""
_DEEPEST = 64
_VISITS, _MORE_VISITS = 10, 1000  # most visits of a folder below links
_ALIKE = 256  # files of an unknown suffix to check; if all agree, the rest is assumed


def is_image(path: str | Path) -> bool:
    """Returns whether a file has an image's name."""
    return os.path.splitext(path)[1].lower() in _IMAGES


def is_hidden(path: str) -> bool:
    """Returns whether a path in an archive leads through an entry that `Walk` takes as hidden."""
    return any(
        part[0] == "." or (not is_image(part) and part.lower() in _SYSTEM)
        for part in path.split("/")
        if part not in ("", ".", "..")
    )


class Walk:
    """The image files below a folder, found by name, or by content if the name is inconclusive.

    Args:
      folder: searched with all its sub-folders, at any depth.
    """

    def __init__(self, folder: str | Path):
        self.ignored: Counter[str] = Counter()
        """Entries that are not images, by kind: a suffix, or the reason for not opening them."""
        self._top = os.fspath(folder)
        self._alike: dict[str, tuple[bool, int]] = {}
        self._at: list[tuple[int, int]] = []  # the folders that are being walked
        self._below_link = False
        self._by_links: Counter[tuple[int, int]] = Counter()  # visits of each folder below a link

    def files(self) -> Iterator[str]:
        """Yields the images' relative paths in no particular order, while it walks the folder."""
        yield from self._files(self._top, "")

    def _files(self, path: str, prefix: str) -> Iterator[str]:
        folders = []
        for entry in self._entries(path):
            name = entry.name
            dot = name.rfind(".")  # os.path.splitext takes a sixth of the time of a large folder
            suffix = name[dot:].lower() if dot > 0 else ""
            if name[0] == "." or (suffix not in _IMAGES and name.lower() in _SYSTEM):
                self.ignored[HIDDEN] += 1
            elif _is(entry.is_file):
                if suffix in _IMAGES or self._is_image(entry.path, suffix):
                    yield prefix + name
                else:
                    self.ignored[suffix or "no suffix"] += 1
            elif _is(entry.is_dir):
                folders.append(entry)
            else:
                self.ignored["broken links" if entry.is_symlink() else SPECIAL] += 1
        if not folders:
            return
        if len(self._at) >= _DEEPEST:
            self.ignored[f"folders more than {_DEEPEST} deep"] += len(folders)
            return
        self._at.append(_identity(path))
        for entry in folders:
            if entry.is_symlink() and _identity(entry.path) in self._at:
                self.ignored["links to a folder above"] += 1
            else:
                yield from self._linked(entry, prefix)
        self._at.pop()

    def _linked(self, entry: os.DirEntry, prefix: str) -> Iterator[str]:
        """Yields the files of a sub-folder.

        Raises:
          DataError: links multiply the folders.
        """
        if entry.is_symlink() or self._below_link:
            self._by_links[_identity(entry.path)] += 1
            visits, different = self._by_links.total(), len(self._by_links)
            if visits > _VISITS * different + _MORE_VISITS:
                raise DataError(
                    f"{self._top}: links lead to the same {different:,} folders {visits:,} times: "
                    "remove links to folders that are in the set already"
                )
        below, self._below_link = self._below_link, self._below_link or entry.is_symlink()
        yield from self._files(entry.path, f"{prefix}{entry.name}/")
        self._below_link = below

    def _entries(self, path: str) -> list[os.DirEntry]:
        try:
            with os.scandir(path) as entries:
                return list(entries)
        except OSError as error:
            if path == self._top and not isinstance(error, PermissionError):
                raise
            # A path beyond the system's longest one is among these.
            self.ignored["folders that cannot be opened"] += 1
            return []

    def _is_image(self, path: str, suffix: str) -> bool:
        """Decides by content about a file with an unknown suffix, or as for others with its
        suffix.
        """
        if suffix in _OTHERS:
            return False
        alike, count = self._alike.get(suffix, (True, 0))
        if count >= _ALIKE:
            return alike
        found = is_image_by_content(path)
        self._alike[suffix] = (found, count + 1 if found == alike else 1)
        return found


def _is(kind: Callable[[], bool]) -> bool:
    """Returns whether an entry is of a kind; False for a link to itself, which raises."""
    try:
        return kind()
    except OSError:
        return False


def _identity(folder: str) -> tuple[int, int]:
    """Returns a value that is the same for all paths to a folder."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def is_image_by_content(path: str | Path) -> bool:
    """Returns whether a regular file starts with the signature of an image."""
    try:
        with open(path, "rb") as file:
            return formats.sniff(file.read(formats.HEAD)) is not None
    except OSError:
        return False


def find_below(folder: Path, *, ignored: Counter[str] | None = None) -> list[Path]:
    """Returns the image files of a folder and its sub-folders, sorted.

    Args:
      folder: the folder to search.
      ignored: counts the entries that are not images, by kind.

    Raises:
      DataError: the folder does not exist, or has no image.
    """
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}: name an existing folder of images")
    walk = Walk(folder)
    found = sorted(walk.files(), key=lambda name: name.split("/"))
    if ignored is not None:
        ignored.update(walk.ignored)
    if not found:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise DataError(f"{folder} holds no image ({suffixes}), nor do its sub-folders")
    return [folder / name for name in found]


def read_file(path: str | Path, *, fix: str = "restore the file, or take it off the list") -> bytes:
    """Reads the bytes of a regular file; does not wait for a pipe or a device.

    Args:
      path: path of the file.
      fix: what to do if it cannot be read, for the message.

    Raises:
      ImageError: it cannot be read.
    """
    try:
        return foreign.read(path)
    except OSError as error:
        raise ImageError(
            str(path), f"cannot be read ({error.strerror}): {fix}", kind="missing"
        ) from error


def find_named(stem: Path) -> Path | None:
    """Finds the image file FOLDER/NAME with any image suffix, given the path without the suffix."""
    usual = (stem.with_name(stem.name + suffix) for suffix in IMAGE_SUFFIXES)
    if found := next((path for path in usual if foreign.is_file(path)), None):
        return found
    others = sorted(stem.parent.glob(f"{glob.escape(stem.name)}.*"))
    return next((path for path in others if path.stem == stem.name and is_image(path)), None)


def decode(data: bytes, *, where: Callable[[], str]) -> np.ndarray:
    """Returns an encoded image as (112, 112, 3) uint8 RGB.

    Args:
      data: JPEG, PNG, or another format that OpenCV reads.
      where: names the image in the error message.

    Raises:
      ImageError: it cannot be decoded, or has another size.
    """
    image = pixels(data)
    if image is None:
        raise _not_an_image(data, where())
    if image.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ImageError(
            where(),
            f"the image is {image.shape[1]} x {image.shape[0]} pixels, training takes "
            f"faces aligned to {IMAGE_SIZE} x {IMAGE_SIZE}: align and crop the images first "
            "(`arcface-jax data align`)",
            kind="other size",
        )
    return image


def decode_any_size(data: bytes, *, where: str) -> np.ndarray:
    """Returns an encoded image as (H, W, 3) uint8 RGB.

    Raises:
      ImageError: it cannot be decoded.
    """
    image = pixels(data)
    if image is None:
        raise _not_an_image(data, where)
    return image


def pixels(data: bytes | np.ndarray) -> np.ndarray | None:
    """Decodes an image to (H, W, 3) uint8 RGB; None if it is not an image or too large.

    Args:
      data: bytes, or (n,) uint8.
    """
    encoded = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    # If cv2 was loaded before this package, it allocates whatever a header asks for.
    if not encoded.size or (not OPENCV_IS_LIMITED and _too_large(encoded.tobytes())):
        return None
    try:
        scaled = _twelve_bits(encoded)
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if scaled is None else scaled
    except cv2.error:  # for instance a header that announces a billion pixels
        return None
    if image is None and encoded[4:8].tobytes() == b"ftyp":
        return _from_heic(encoded.tobytes())
    return image


def _twelve_bits(encoded: np.ndarray) -> np.ndarray | None:
    """Scales a 16-bit image with 12-bit values to 8 bits; returns None for any other.

    OpenCV takes the upper 8 of the 16 bits, which makes a 12-bit image nearly black.
    """
    if encoded[:2].tobytes() == b"\xff\xd8":  # JPEG, the usual case: a microsecond counts
        return None
    if not formats.may_have_16_bits(encoded[: formats.HEAD].tobytes()):
        return None
    # Not IMREAD_COLOR_RGB, which OpenCV 5.0 ignores in TIFF files of 16 bits.
    image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_BGR | cv2.IMREAD_ANYDEPTH)
    if image is None or image.dtype != np.uint16 or image.max(initial=0) >= 2**12:
        return None
    return cv2.cvtColor(np.right_shift(image, 4).astype(np.uint8), cv2.COLOR_BGR2RGB)


def _too_large(data: bytes) -> bool:
    size = formats.announced(data)
    return size is not None and size[0] * size[1] > formats.MAX_PIXELS


def _from_heic(data: bytes) -> np.ndarray | None:
    """Decodes with pillow-heif; None if it is not installed, or the image is damaged."""
    try:
        pillow_heif = importlib.import_module("pillow_heif")
    except ImportError:
        return None
    try:
        found = pillow_heif.open_heif(data, convert_hdr_to_8bit=True)
        width, height = found.size
        if width * height > formats.MAX_PIXELS:
            return None
        values = np.asarray(found.to_pillow().convert("RGB"))
    except (ValueError, OSError, RuntimeError, EOFError):
        return None
    return np.ascontiguousarray(values)


def _not_an_image(data: bytes, where: str) -> ImageError:
    size, found = formats.announced(data), formats.sniff(data)
    if size is not None and _too_large(data):
        problem = (
            f"{len(data)} bytes that are not an image that can be decoded: the header announces "
            f"{size[0]} x {size[1]} pixels, at most {formats.MAX_PIXELS:,} are decoded; scale it "
            "down, or remove it"
        )
        return ImageError(where, problem, kind="too large")
    if found == formats.HEIC:
        problem = (
            f"a HEIC photograph, which needs pillow-heif: {install('heic')}, or convert it "
            "to JPEG (heif-convert, or sips -s format jpeg on macOS)"
        )
        return ImageError(where, problem, kind=formats.HEIC)
    problem = f"{len(data)} bytes that are not an image; remove or replace it"
    return ImageError(where, problem, kind="damaged" if found else "not an image")


def square(data: bytes, *, where: str) -> np.ndarray:
    """Decodes an image of any size to (112, 112, 3) uint8 RGB: its middle square, resized.

    Args:
      data: JPEG, PNG, or another format that OpenCV reads.
      where: what the image is, for the error message.

    Raises:
      ImageError: it cannot be decoded.
    """
    image = decode_any_size(data, where=where)
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side])


def resize(image: np.ndarray) -> np.ndarray:
    """Stretches (H, W, 3) uint8 to (112, 112, 3), bilinear; returns an image of that size as it
    is.
    """
    if image.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        return image
    return cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LINEAR)


def encode(image: np.ndarray) -> bytes:
    """Encodes (H, W, 3) uint8 RGB as PNG, which is lossless."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def encode_jpeg(image: np.ndarray, *, quality: int) -> bytes:
    """Encodes (H, W, 3) uint8 RGB as JPEG with a quality from 0 to 100."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
