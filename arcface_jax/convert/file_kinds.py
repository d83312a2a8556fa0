"""Detect the format of a file of weights by its first bytes and table of contents, not its name.

Does not need PyTorch, so commands use it to choose a reader before importing anything heavy.
"""

import re
import struct
import zipfile
from pathlib import Path
from typing import Literal

from arcface_jax.errors import UserError

Kind = Literal["zip", "legacy", "safetensors", "onnx"]
"""torch.save since PyTorch 1.6, torch.save before, safetensors, ONNX."""

# Packed files, which no reader of weights unpacks.
_PACKED = {
    b"\x1f\x8b": "gzip archive",
    b"BZh": "bzip2 archive",
    b"\xfd7zXZ\x00": "xz archive",
    b"7z\xbc\xaf\x27\x1c": "7-Zip archive",
    b"\x28\xb5\x2f\xfd": "Zstandard archive",
    b"Rar!": "RAR archive",
}
_OTHERS = {
    b"\x89HDF": "an HDF5 file, as Keras writes it; convert it to a state_dict of PyTorch first",
    b"\x93NUMPY": "a NumPy array; name the .pth file of the weights",
    b"\xff\xd8\xff": "a JPEG image; name the .pth file of the weights",
    b"\x89PNG": "a PNG image; name the .pth file of the weights",
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\b")
# The first bytes of torch.save before PyTorch 1.6: its magic number as a pickle.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
_ZIP_START = b"PK\x03\x04"
_HEAD = 4096


def recognize(path: Path) -> Kind:
    """Detects the format of a file of weights.

    Raises:
      UserError: it does not exist, or is something else: an empty file, a web page, a Git LFS
        pointer, TorchScript, one shard of several, an archive.
    """
    head = _head(path)
    _refuse_text(path, head)
    for start, kind in _PACKED.items():
        if head.startswith(start):
            raise UserError(f"{path} is a {kind}: unpack it and name the weights in it")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it and name the weights in it")
    for start, what in _OTHERS.items():
        if head.startswith(start):
            raise UserError(f"{path} is {what}")
    shard = _SHARD.search(path.name)
    if shard and int(shard[2]) > 1:
        raise UserError(
            f"{path} is one of {int(shard[2])} shards of a checkpoint: merge them into one file "
            "and name that"
        )
    if head.startswith(_ZIP_START):
        _refuse_other_archives(path)
        return "zip"
    if _LEGACY_START in head[:16]:
        return "legacy"
    if _is_safetensors(head, path.stat().st_size):
        return "safetensors"
    if _is_onnx(path, head):
        return "onnx"
    if head[:1] == b"\x80":
        raise UserError(
            f"{path} is a pickle that torch.save did not write: load it where it comes from and "
            "save its state_dict with torch.save"
        )
    raise UserError(
        f"{path} is not a file of weights (it begins with {head[:8]!r}): expected torch.save's "
        ".pth or .pt, or .safetensors"
    )


def is_onnx(path: Path) -> bool:
    """Returns whether to read a file as ONNX: by its content, or by its name if unreadable."""
    try:
        return _is_onnx(path, _head(path))
    except UserError:
        return path.suffix == ".onnx"


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a .pth or .safetensors file in it")
    if not path.is_file():
        raise UserError(f"no weights at {path}: name an existing .pth or .safetensors file")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise UserError(f"{path} is empty (0 bytes): download or copy it again")
    return head


def _refuse_text(path: Path, head: bytes) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not weights: run `git lfs pull` in its repository, or "
            "download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise UserError(
            f"{path} is a web page, not weights: the download was answered with a page (a login, a "
            "quota, a virus-scan warning); download the file itself"
        )
    if text.startswith(b"{") and (b'"weight_map"' in text or path.name.endswith(".index.json")):
        raise UserError(
            f"{path} is the index of a sharded checkpoint: merge the shards into one file and name "
            "that"
        )
    if text.startswith((b"{", b"[")):
        raise UserError(f"{path} is a JSON file, not weights: name a .pth or .safetensors file")


def _refuse_other_archives(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OSError,
        EOFError,
        struct.error,
    ) as error:
        size = path.stat().st_size
        raise UserError(
            f"{path} is truncated or damaged ({size:,} bytes, without a table of contents at "
            f"its end): download or copy it again"
        ) from error
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last and any("/code/" in f"/{name}" for name in names):
        raise UserError(
            f"{path} is a TorchScript program, not a state_dict: save its weights with "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth') and name those"
        )
    if "data.pkl" not in last:
        first = ascii(names[0])[:60] if names else "nothing"
        raise UserError(
            f"{path} is a zip archive that torch.save did not write (it contains {first}): "
            f"unpack it "
            "and name the weights in it"
        )


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= size - 8


def _is_onnx(path: Path, head: bytes) -> bool:
    """Returns whether it starts like ONNX: a protobuf with the small number `ir_version` in
    front.
    """
    begins = head[:1] == b"\x08" and head[1:2] <= b"\x20"
    return begins and (path.suffix == ".onnx" or head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42"))
