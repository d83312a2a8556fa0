"""RecordIO: the bytes, the round trip, and everything that can be wrong with the files."""

import contextlib
import gc
import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.data.recordio.reader import Record, RecordReader, RecordWriter
from arcface_jax.errors import DataError

MAGIC = b"\x0a\x23\xd7\xce"


def write(rec: Path, records: dict[int, tuple[bytes, object]]) -> Path:
    with RecordWriter(rec) as writer:
        for key, (data, label) in records.items():
            writer.write(key, data, label=label)
    return rec


def handmade(rec: Path, chunks: list[tuple[int, bytes]], keys: dict[int, int]) -> Path:
    """A record file of (flag, data) parts and an index key -> byte offset, by struct alone."""
    body = b""
    for flag, data in chunks:
        body += MAGIC + struct.pack("<I", flag << 29 | len(data)) + data + bytes(-len(data) % 4)
    rec.write_bytes(body)
    rec.with_suffix(".idx").write_text("".join(f"{k}\t{at}\n" for k, at in keys.items()))
    return rec


def header(label: float = 0.0, *, flag: int = 0, number: int = 0) -> bytes:
    return struct.pack("<IfQQ", flag, label, number, 0)


def test_the_bytes_are_those_of_the_format(tmp_path: Path):
    rec = write(tmp_path / "a.rec", {0: (b"", [3.0, 5.0]), 7: (b"abcde", 2.0)})
    identity = struct.pack("<IfQQff", 2, 0, 0, 0, 3, 5)
    image = struct.pack("<IfQQ", 0, 2, 7, 0) + b"abcde"
    assert (len(identity), len(image)) == (32, 29)
    assert rec.read_bytes() == (
        MAGIC + struct.pack("<I", 32) + identity + MAGIC + struct.pack("<I", 29) + image + bytes(3)
    )
    assert rec.with_suffix(".idx").read_text() == "0\t0\n7\t40\n"


def test_a_payload_with_the_magic_word_is_split_there(tmp_path: Path):
    data = b"wxyz" + MAGIC + MAGIC + b"end"
    rec = write(tmp_path / "a.rec", {1: (data, 4.0)})
    parts = [(1, header(4.0, number=1) + b"wxyz"), (2, b""), (3, b"end")]
    expected = handmade(tmp_path / "b.rec", parts, {1: 0})
    assert rec.read_bytes() == expected.read_bytes()
    assert rec.with_suffix(".idx").read_text() == expected.with_suffix(".idx").read_text()


def test_files_made_by_hand_are_read(tmp_path: Path):
    chunks = [
        (0, header(3.0, number=11) + b"one"),
        (1, header(5.0)[:20]),  # the header itself may be cut by a magic word inside it
        (3, b"two"),
        (0, header(flag=3) + struct.pack("<fff", 1, 2.5, -3) + b"three"),
    ]
    rec = handmade(tmp_path / "a.rec", chunks, {20: 0, 3: 36, 4: 76})
    reader = RecordReader(rec)
    assert len(reader) == 3
    assert list(reader.keys) == [3, 4, 20]
    assert reader.read(20) == Record(3.0, 11, b"one")
    assert reader.read(3).data == b"two"
    labels = reader.read(4).label
    assert isinstance(labels, np.ndarray) and labels.dtype == np.float32
    assert labels.tolist() == [1, 2.5, -3]
    assert reader.read(4).data == b"three"


MAGICS = {
    "at the start": MAGIC + b"rest of the data",
    "alone": MAGIC,
    "twice in a row": b"some" + MAGIC + MAGIC + b"more",
    "three times in a row and nothing else": MAGIC * 3,
    "at the end": b"data" + MAGIC,
    "at the end, and one byte": b"data" + MAGIC + b"x",
    "at the start and at the end": MAGIC + b"12345678" + MAGIC,
    "off the boundary by one": b"x" + MAGIC + b"more",
    "off the boundary by two": b"xx" + MAGIC * 2 + b"yy",
    "off the boundary by three": b"xxx" + MAGIC,
    "cut off at the end": b"data" + MAGIC[:3],
    "on and off the boundary": MAGIC + b"x" + MAGIC + b"xyz" + MAGIC,
}


@pytest.mark.parametrize("label", [7.0, [1.0, 2.0], [3.0]], ids=["one", "two", "array of one"])
def test_payloads_with_the_magic_word_come_back(tmp_path: Path, label):
    records = {key: (data, label) for key, data in enumerate(MAGICS.values())}
    reader = RecordReader(write(tmp_path / "a.rec", records))
    for key, where in enumerate(MAGICS):
        record = reader.read(key)
        assert record.data == MAGICS[where], where
        assert np.array_equal(record.label, label), where
        assert reader.labels()[reader.position(key)] == np.ravel(label)[0], where


def test_a_label_that_is_the_magic_word_comes_back(tmp_path: Path):
    # The header is part of the payload: its label, id or further labels may equal the word.
    (label,) = struct.unpack("<f", MAGIC)
    (number,) = struct.unpack("<I", MAGIC)
    rec = write(tmp_path / "a.rec", {1: (b"x", label), 2: (b"y", [1.0, label]), number: (b"z", 5)})
    reader = RecordReader(rec)
    assert reader.read(1) == Record(label, 1, b"x")
    assert np.array_equal(reader.read(2).label, np.float32([1, label]))
    assert reader.read(number) == Record(5.0, number, b"z")
    assert reader.labels().tolist() == [-1, 1, 5]  # the word as a float is negative


def test_random_payloads_come_back(tmp_path: Path):
    rng = np.random.default_rng(0)
    pieces = [MAGIC, MAGIC[:2], b"\x00", b"ab", b"wxyz"]
    records = {
        int(key): (b"".join(pieces[i] for i in rng.integers(5, size=rng.integers(12))), float(key))
        for key in rng.permutation(500)
    }
    reader = RecordReader(write(tmp_path / "a.rec", records))
    assert list(reader.keys) == list(range(500))
    for key, (data, label) in records.items():
        assert reader.read(key) == Record(label, key, data)
        assert reader.labels()[key] == label


def test_what_was_read_can_be_written_again(tmp_path: Path):
    rec = write(tmp_path / "a.rec", {0: (b"", [9.0, 12.0]), 1: (b"x", 4.0), 2: (b"y", [4.0, 0.5])})
    reader = RecordReader(rec)
    records = {key: reader.read(key) for key in (0, 1, 2)}
    again = write(tmp_path / "b.rec", {k: (r.data, r.label) for k, r in records.items()})
    assert again.read_bytes() == rec.read_bytes()


def test_one_file_without_the_other_is_named(tmp_path: Path):
    rec = write(tmp_path / "train.rec", {1: (b"x", 0.0)})
    rec.with_suffix(".idx").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"train\.idx is missing \(train\.rec is there without it"):
        RecordReader(rec)
    rec.unlink()
    (tmp_path / "away").rename(rec.with_suffix(".idx"))
    with pytest.raises(DataError, match=r"train\.rec is missing \(train\.idx is there without it"):
        RecordReader(rec)
    with pytest.raises(DataError, match=r"none\.rec is missing \(nor its index.*copy both"):
        RecordReader(tmp_path / "none.rec")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty.*key<TAB>offset"),
        ("\n\n", "is empty.*key<TAB>offset"),
        ("1 0\n", "not an index of lines"),
        ("1\t0\n2\n", "not an index of lines"),
        ("1\t0.5\n", "not an index of lines"),
        ("1\t\n", "not an index of lines"),
        ("one\t0\n", "not an index of lines"),
        ("#1\t0\n", "not an index of lines"),
        ("1\t99999999999999999999\n", "not an index of lines"),
        ("1\t0\t5\n", "each line should be"),
        ("-1\t0\n", "neither negative"),
        ("1\t-4\n", "neither negative"),
        ("1\t0\n2\t0\n1\t0\n", "lists key 1 more than once"),
        ("1\t0\n2\t400000\n", r"points to byte 400000 but .*a\.rec has 36.*belongs to another"),
        ("1\t36\n", "points to byte 36"),
        ("1\t9223372036854775807\n", "points to byte 9223372036854775807"),
    ],
)
def test_a_wrong_index_is_refused_at_once(tmp_path: Path, text: str, expected: str):
    rec = write(tmp_path / "a.rec", {1: (b"data", 0.0)})
    rec.with_suffix(".idx").write_text(text)
    with pytest.raises(DataError, match=expected):
        RecordReader(rec)


def test_an_index_of_bytes_that_are_no_text_is_refused(tmp_path: Path):
    rec = write(tmp_path / "a.rec", {1: (b"data", 0.0)})
    for garbage in (b"\xff\xfe\x00", bytes(16), rec.read_bytes()):
        rec.with_suffix(".idx").write_bytes(garbage)
        with pytest.raises(DataError, match=r"a\.idx is not an index of lines"):
            RecordReader(rec)


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_index_may_end_its_lines_in_any_way(tmp_path: Path, ending: str):
    rec = write(tmp_path / "a.rec", {1: (b"data", 0.0)})
    rec.with_suffix(".idx").write_bytes(b"1\t0" + ending.encode())
    assert RecordReader(rec).read(1).data == b"data"


def test_a_key_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path):
    reader = RecordReader(write(tmp_path / "a.rec", {5: (b"x", 0.0), 9: (b"y", 0.0)}))
    for key in (-1, 0, 4, 6, 10, 2**40):
        with pytest.raises(DataError, match=rf"key {key} \(keys run from 5 to 9\)"):
            reader.read(key)


@pytest.mark.parametrize("data", [b"0123456789", b"0123" + MAGIC + b"456789"])
def test_a_truncated_record_is_an_error_wherever_it_is_cut(tmp_path: Path, data: bytes):
    rec = write(tmp_path / "a.rec", {1: (b"first", 1.0), 2: (data, 2.0)})
    whole, second, padding = rec.read_bytes(), 8 + 24 + 5 + 3, 2
    for size in range(second + 8, len(whole) - padding):
        rec.write_bytes(whole[:size])
        reader = RecordReader(rec)
        assert reader.read(1).data == b"first"
        with pytest.raises(DataError, match=r"a\.rec, record 2: at byte \d+ .*truncated.*again"):
            reader.read(2)
    for size in range(second + 8):
        rec.write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated"):
            RecordReader(rec)
    rec.write_bytes(whole[:-padding])  # without its padding the last record is whole
    assert RecordReader(rec).read(2).data == data


def test_bytes_that_are_no_record_say_what_stands_there(tmp_path: Path):
    rec = write(tmp_path / "a.rec", {1: (bytes(64), 1.0)})
    rec.with_suffix(".idx").write_text("1\t4\n")
    reader = RecordReader(rec)
    expected = "record 1: at byte 4 it begins with 0x00000058 instead of 0xced7230a"
    with pytest.raises(DataError, match=expected):
        reader.read(1)
    assert reader.labels().tolist() == [-1]


@pytest.mark.parametrize(
    ("flags", "stray"),
    [((2,), 2), ((3,), 3), ((1, 0), 0), ((1, 1, 3), 1), ((1, 2, 0), 0), ((5,), 5), ((1, 7), 7)],
)
def test_parts_in_an_impossible_order_are_refused(tmp_path: Path, flags, stray: int):
    rec = handmade(tmp_path / "a.rec", [(flag, header()) for flag in flags], {1: 0})
    with pytest.raises(DataError, match=f"has part number {stray} where"):
        RecordReader(rec).read(1)


def test_a_last_part_that_is_missing_is_an_error(tmp_path: Path):
    rec = handmade(tmp_path / "a.rec", [(1, header()), (2, b"")], {1: 0})
    with pytest.raises(DataError, match="ends before its header does"):
        RecordReader(rec).read(1)


def test_a_payload_too_short_for_its_header_is_an_error(tmp_path: Path):
    short = [(0, header()[:23]), (0, b""), (0, header(flag=2) + bytes(7)), (0, header(flag=2**31))]
    rec = handmade(tmp_path / "a.rec", short, {1: 0, 2: 32, 3: 40, 4: 80})
    reader = RecordReader(rec)
    for key, expected in (
        (1, "23 bytes are too few for the 24-byte header"),
        (2, "0 bytes are too few"),
        (3, "announces 2 labels"),
        (4, "announces 2147483648 labels"),
    ):
        with pytest.raises(DataError, match=rf"a\.rec, record {key}: .*{expected}"):
            reader.read(key)
    assert reader.labels().tolist() == [-1] * 4


def some_records() -> dict[int, tuple[bytes, float]]:
    rng = np.random.default_rng(1)
    return {
        key: (rng.bytes(int(rng.integers(1, 5000))), float(rng.integers(100))) for key in range(300)
    }


def test_eight_threads_read_what_one_reads(tmp_path: Path):
    records = some_records()
    reader = RecordReader(write(tmp_path / "a.rec", records))
    keys = np.random.default_rng(2).integers(300, size=4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for key, record in zip(keys, pool.map(reader.read, keys), strict=True):
            assert record == Record(records[key][1], key, records[key][0])


def test_a_reader_can_be_pickled_and_outlives_its_original(tmp_path: Path):
    records = some_records()
    reader = RecordReader(write(tmp_path / "a.rec", records))
    sent = pickle.dumps(reader)
    assert len(sent) < 300 * 2 * 8 + 1000  # the index alone, no data
    del reader
    copy = pickle.loads(sent)
    assert copy.read(299).data == records[299][0]
    assert pickle.loads(pickle.dumps(copy)).read(0).data == records[0][0]


def descriptors(path: Path) -> int:
    """How many descriptors of this process refer to a file; other threads may open theirs."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since it was listed
            found += os.readlink(link) == str(path.resolve())
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads open files in /proc")
def test_files_are_closed_with_the_reader(tmp_path: Path):
    rec = write(tmp_path / "a.rec", {1: (b"x", 0.0)})
    readers = [RecordReader(rec) for _ in range(5)]
    readers += [pickle.loads(pickle.dumps(readers[0]))]
    assert descriptors(rec) == 6
    del readers
    gc.collect()
    assert descriptors(rec) == 0


def test_flipped_bytes_give_the_record_or_a_data_error(tmp_path: Path):
    rng = np.random.default_rng(3)
    records = {0: (b"", [4.0, 6.0])}
    records |= {k: (rng.bytes(20) + MAGIC * (k == 2) + rng.bytes(9), float(k)) for k in (1, 2, 3)}
    rec = write(tmp_path / "whole.rec", records)
    whole = [rec.read_bytes(), rec.with_suffix(".idx").read_bytes()]
    outcomes = {"error": 0, "read": 0}
    for trial in range(400):
        files = [bytearray(data) for data in whole]
        damaged = files[int(rng.random() < 0.2)]
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        rec = tmp_path / f"{trial}.rec"
        rec.write_bytes(files[0])
        rec.with_suffix(".idx").write_bytes(files[1])
        try:
            reader = RecordReader(rec)
            labels = reader.labels()
            for key, label in zip(list(reader.keys), labels.tolist(), strict=True):
                stored = np.ravel(reader.read(key).label)[0]
                assert label in (stored, -1)
            outcomes["read"] += 1
        except DataError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 30
