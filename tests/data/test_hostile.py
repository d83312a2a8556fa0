"""Readers on input that nobody meant: no error but the declared ones, no memory, no code."""

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arcface_jax.data.images import decode_any_size
from arcface_jax.data.pairs.bins import read_bin
from arcface_jax.data.recordio.reader import RecordReader, RecordWriter
from arcface_jax.errors import DataError, ImageError

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
RGB = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
JPEG = cv2.imencode(".jpg", RGB)[1].tobytes()
BIN = pickle.dumps(([JPEG] * 4, [True, False]), protocol=2)


def changed(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some of them written over, and cut."""
    edit = st.tuples(st.integers(0, len(data) - 1), st.binary(min_size=1, max_size=8))

    def apply(edits: list[tuple[int, bytes]], end: int) -> bytes:
        out = bytearray(data)
        for at, new in edits:
            out[at : at + len(new)] = new
        return bytes(out[:end])

    return st.builds(apply, st.lists(edit, max_size=4), st.integers(0, len(data)))


@given(st.one_of(st.binary(max_size=200), changed(BIN), changed(BIN[:60] + BIN[-60:])))
@FUZZ
def test_any_verification_set_is_read_or_refused(tmp_path: Path, data: bytes):
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    try:
        pairs = read_bin(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert len(pairs.images) == 2 * len(pairs.same)


def record_file(folder: Path) -> tuple[bytes, bytes]:
    with RecordWriter(folder / "whole.rec") as writer:
        writer.write(0, b"", label=[3, 5])
        writer.write(1, JPEG[:200] + struct.pack("<I", 0xCED7230A) * 2, label=0.0)
        writer.write(2, JPEG[:64], label=[1.0, 2.0])
    return (folder / "whole.rec").read_bytes(), (folder / "whole.idx").read_bytes()


@given(st.data())
@FUZZ
def test_any_record_file_is_read_or_refused(tmp_path: Path, data: st.DataObject):
    rec, idx = record_file(tmp_path)
    folder = tmp_path / str(len(os.listdir(tmp_path)))
    folder.mkdir()
    (folder / "a.rec").write_bytes(data.draw(st.one_of(st.binary(max_size=99), changed(rec))))
    (folder / "a.idx").write_bytes(
        data.draw(st.one_of(st.just(idx), st.binary(max_size=40), changed(idx)))
    )
    try:
        reader = RecordReader(folder / "a.rec")
    except DataError as error:
        assert "a.idx" in str(error)
        return
    for key in (*list(reader.keys)[:5], 7):
        try:
            reader.read(int(key))
        except DataError as error:
            assert "a.rec" in str(error)


@given(st.one_of(st.binary(max_size=300), changed(JPEG)))
@FUZZ
def test_any_image_is_decoded_or_refused(data: bytes):
    try:
        image = decode_any_size(data, where="here")
    except ImageError as error:
        assert str(error).startswith("here: ")
    else:
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8


# ---- Memory and code -----------------------------------------------------------------------------


def huge_jpeg() -> bytes:
    """A small file whose header announces 65,000 x 16,000 pixels."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", 16_000, 65_000) + JPEG[at + 4 :]


def pickled(image: bytes) -> bytes:
    return pickle.dumps(([image] * 2, [True]), protocol=2)


HOSTILE = {
    "image": pickled(huge_jpeg()),
    "memo": b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b".",
    "length": b"\x80\x04\x8e" + struct.pack("<Q", 2**34) + b"x.",
    "bytes": b"\x80\x02cbuiltins\nbytes\nI9999999999\n\x85R]I01\na\x86.",
    "code": b"cos\nsystem\n(S'touch CODE_RAN'\ntR.",
    "array": b"cnumpy\nndarray\n(I9999999999\ntR.",
}


# What reading each of the files in this folder costs.
READ_ALL = """
import resource
from pathlib import Path
from arcface_jax.data.pairs import bins
from arcface_jax.errors import DataError

for path in sorted(Path().glob("*.bin")):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        bins.read_bin(path)
    except DataError as error:
        print(path.stem, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "KiB")
"""


def test_a_hostile_set_gets_neither_memory_nor_code(tmp_path: Path):
    for case, data in HOSTILE.items():
        (tmp_path / f"{case}.bin").write_bytes(data)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True},
    )
    refused = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert refused.keys() == HOSTILE.keys(), done.stderr
    assert max(refused.values()) < 50_000, refused
    assert not (tmp_path / "CODE_RAN").exists()


def test_a_hostile_length_in_a_record_takes_no_memory(tmp_path: Path):
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(1, JPEG, label=0.0)
    data = bytearray((tmp_path / "a.rec").read_bytes())
    data[4:8] = struct.pack("<I", 2**29 - 1)
    (tmp_path / "a.rec").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="announces 536870911 bytes"):
        RecordReader(tmp_path / "a.rec").read(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


# ---- Other kinds of images -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("L", "PNG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG")],
)
def test_images_of_other_modes_become_rgb(mode: str, kind: str):
    smooth = np.array(
        PIL.Image.fromarray(RGB[:5, :4]).resize((30, 40), PIL.Image.Resampling.BICUBIC)
    )
    image = PIL.Image.fromarray(smooth).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 98} if kind == "JPEG" else {}))
    expected = np.array(PIL.Image.open(file).convert("RGB")).astype(int)
    assert np.abs(decode_any_size(file.getvalue(), where="") - expected).mean() < 3


def test_16_bits_become_8():
    deep = RGB.astype(np.uint16) * 257
    data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(decode_any_size(data, where=""), RGB)
