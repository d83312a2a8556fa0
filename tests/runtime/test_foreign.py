"""Files of any origin: only regular ones are read, and no header is believed."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.runtime import foreign


def test_only_regular_files_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"abc")
    for name, problem in {"pipe": "Not a regular file", "zero": "Not a regular file"}.items():
        with pytest.raises(OSError, match=problem):
            foreign.read(tmp_path / name)
        with pytest.raises(OSError, match=problem):
            foreign.require_regular(tmp_path / name)
        assert not foreign.is_file(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        foreign.read(tmp_path)
    assert foreign.read(tmp_path / "file") == b"abc" and foreign.is_file(tmp_path / "file")
    assert foreign.read(tmp_path / "file", most=3) == b"abc"
    with pytest.raises(OSError, match="More than 2 bytes"):
        foreign.read(tmp_path / "file", most=2)


@pytest.mark.parametrize("name", ["a\0b", "n" * 5000])
def test_names_that_no_file_has(tmp_path: Path, name: str):
    assert not foreign.is_file(tmp_path / name)
    with pytest.raises(OSError):
        foreign.read(tmp_path / name)
    with pytest.raises(OSError):
        foreign.require_regular(tmp_path / name)


def test_json_that_is_nested_too_deep_is_a_value_error():
    assert foreign.parse_json('{"a": [1]}') == {"a": [1]}
    for text in ("[" * 100_000, '{"a":' * 100_000, "{", "9" * 10_000):
        with pytest.raises(ValueError):
            foreign.parse_json(text)


@pytest.mark.parametrize("shape", ["(10000000000, 512)", "(4611686018427387904,)", "(-1,)", "("])
def test_an_array_is_no_larger_than_its_file(tmp_path: Path, shape: str):
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + bytes(64)
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(ValueError):
        foreign.load_array(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([{}]))
    with pytest.raises(ValueError):
        foreign.load_array(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.arange(6).reshape(2, 3))
    assert foreign.load_array(tmp_path / "c.npy").sum() == 15
