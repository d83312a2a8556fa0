"""The kept index of a record file: it is the text's, it is renewed, and it costs no memory."""

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGES, extra_file, symlink_away
from damage import name as damage_name

from arcface_jax.data.recordio import index as record_index
from arcface_jax.data.recordio import source as record_source
from arcface_jax.data.recordio.index import open_index, open_labels
from arcface_jax.data.recordio.reader import RecordReader, RecordWriter
from arcface_jax.data.recordio.source import RecordSource


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(rec: Path, keys, *, labels=None, old: bool = True) -> Path:
    rec.parent.mkdir(exist_ok=True)
    with RecordWriter(rec) as writer:
        for place, key in enumerate(keys):
            label = float(key % 7) if labels is None else labels[place]
            writer.write(key, b"x" * (key % 11), label=label)
    if old:
        age(rec)
    return rec


def age(rec: Path, *, seconds: float = 60.0) -> None:
    """As if the files had been written a while ago."""
    then = time.time() - seconds
    for path in (rec, rec.with_suffix(".idx")):
        os.utime(path, (then, then))


def by_hand(rec: Path) -> tuple[list[int], list[int]]:
    lines = rec.with_suffix(".idx").read_text().splitlines()
    keys, offsets = zip(*sorted(tuple(map(int, line.split())) for line in lines), strict=True)
    return list(keys), list(offsets)


KEYS = {
    "consecutive": list(range(1, 50)),
    "gaps": [0, 3, 4, 90, 1000],
    "shuffled": np.random.default_rng(0).permutation(40).tolist(),
    "large": [5, 2**32 + 3, 2**40],
    "one": [7],
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
def test_the_kept_index_is_what_the_text_says(tmp_path: Path, keys):
    rec = write(tmp_path / "d" / "train.rec", keys)
    first, again = open_index(rec), open_index(rec)
    for index in (first, again, pickle.loads(pickle.dumps(first))):
        assert index.folder == tmp_path / "d" / "train.arcface_index"
        assert (list(index.keys), index.offsets.tolist()) == by_hand(rec)
        assert open_labels(index).tolist() == [key % 7 for key in sorted(keys)]
        assert isinstance(index.offsets, np.memmap) and isinstance(open_labels(index), np.memmap)
    assert isinstance(first.keys, range) == (len(keys) in (49, 40, 1))
    assert len(pickle.dumps(first)) < 400 + len(str(rec))
    kept = {path.name for path in (tmp_path / "d" / "train.arcface_index").iterdir()}
    assert kept - {"keys.npy"} == {"stamp.json", "offsets.npy", "labels.npy"}
    assert sorted(p.name for p in (tmp_path / "d").iterdir())[0] == "train.arcface_index"


def test_the_second_opening_does_not_read_the_text(tmp_path: Path, monkeypatch):
    rec = write(tmp_path / "d" / "train.rec", range(30))
    open_labels(open_index(rec))
    monkeypatch.setattr(record_index, "_read_text", None)
    monkeypatch.setattr(record_index, "_scan", None)
    assert open_labels(open_index(rec)).tolist() == [key % 7 for key in range(30)]


@pytest.mark.parametrize("what", ["other records", "same size", "index alone"])
def test_a_changed_file_is_indexed_anew(tmp_path: Path, what: str):
    rec = write(tmp_path / "d" / "train.rec", range(30))
    open_labels(open_index(rec))
    if what == "index alone":
        lines = rec.with_suffix(".idx").read_text().splitlines(keepends=True)
        rec.with_suffix(".idx").write_text("".join(lines[:20]))
    else:
        write(rec, range(30 if what == "same size" else 22), labels=[3.0] * 30)
    age(rec, seconds=30.0)
    index = open_index(rec)
    assert (list(index.keys), index.offsets.tolist()) == by_hand(rec)
    expected = [key % 7 for key in index.keys] if what == "index alone" else [3] * len(index.keys)
    assert open_labels(index).tolist() == expected


def test_files_that_may_still_be_written_are_not_kept(tmp_path: Path):
    rec = write(tmp_path / "d" / "train.rec", range(9), old=False)
    index = open_index(rec)
    assert index.folder is None and not (tmp_path / "d" / "train.arcface_index").exists()
    assert open_labels(index).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    again = pickle.loads(pickle.dumps(index))
    assert (list(again.keys), again.offsets.tolist()) == by_hand(rec)


def test_a_read_only_folder_has_its_index_in_the_cache_and_says_so(tmp_path: Path, capsys):
    rec = write(tmp_path / "d" / "train.rec", range(9))
    rec.parent.chmod(0o555)
    try:
        index = open_index(rec)
        assert index.folder is not None and index.folder.parent == tmp_path / "cache/arcface_jax"
        said = capsys.readouterr().err
        assert f"{rec.parent} is read-only" in said and "cache" in said
        assert open_labels(open_index(rec)).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
        assert capsys.readouterr().err == ""
        assert {path.name for path in rec.parent.iterdir()} == {"train.rec", "train.idx"}
    finally:
        rec.parent.chmod(0o755)


@pytest.mark.parametrize("damage", ["stamp.json", "offsets.npy", "labels.npy"])
def test_a_damaged_kept_index_is_made_anew(tmp_path: Path, damage: str):
    rec = write(tmp_path / "d" / "train.rec", range(9))
    index = open_index(rec)
    open_labels(index)
    assert index.folder is not None
    (index.folder / damage).write_bytes(b"{}")
    index = open_index(rec)
    assert (list(index.keys), index.offsets.tolist()) == by_hand(rec)
    assert open_labels(index).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_labels_that_are_no_identity_and_damaged_records_are_minus_one(tmp_path: Path):
    labels = [0.0, 2.0**24, -1.0, 0.5, float("nan"), 2.0**31, [5.0, 0.5], [], 3.0, 4.0]
    rec = write(tmp_path / "d" / "train.rec", range(10), labels=labels)
    index = RecordReader(rec)
    data = bytearray(rec.read_bytes())
    data[int(by_hand(rec)[1][8])] ^= 1  # its magic word
    rec.write_bytes(data[:-9])  # and the last one is cut short
    age(rec)
    del index
    assert RecordReader(rec).labels().tolist() == [0, 2**24, -1, -1, -1, -1, 5, 0, -1, -1]


def test_a_header_beyond_float32_is_taken_for_what_it_means(tmp_path: Path, monkeypatch):
    # As if float32 were exact up to 8 alone: 100 images are announced as one fewer or one more.

    monkeypatch.setattr(record_source, "_INEXACT", 8)
    monkeypatch.setattr(np, "spacing", lambda _: 2.0)
    for first in (100.0, 101.0, 102.0):
        with RecordWriter(tmp_path / "train.rec") as writer:
            writer.write(0, b"", label=[first, first + 6])
            for key in range(1, 101):
                writer.write(key, b"image", label=float(key % 5))
            for identity in range(5):
                writer.write(101 + identity, b"", label=[1.0, 2.0])
        source = RecordSource(tmp_path / "train.rec")
        assert (len(source), source.num_classes) == (100, 5)


def test_shards_are_asked_for_once_and_change_nothing(tmp_path: Path, monkeypatch):
    rec = write(tmp_path / "d" / "train.rec", range(50))
    asked = []
    ahead = RecordReader.will_need
    monkeypatch.setattr(
        RecordReader,
        "will_need",
        lambda self, a, b: (asked.append((*a.tolist(), *b.tolist())), ahead(self, a, b)),
    )
    plain, source = RecordSource(rec), RecordSource(rec, shard=20)
    for number in (0, 5, 19, 45, 21, 49, 1):
        assert source.read(number) == plain.read(number)
    assert asked == [(0, 20), (40, 50), (20, 40)]


@pytest.mark.parametrize("name", ["stamp.json", "offsets.npy", "keys.npy", "labels.npy"])
@pytest.mark.parametrize("damage", DAMAGES, ids=damage_name)
def test_whatever_happens_to_a_kept_index_it_is_the_text_s(tmp_path: Path, capsys, name, damage):
    rec = write(tmp_path / "d" / "train.rec", KEYS["gaps"])
    index = open_index(rec)
    expected = open_labels(index).tolist()
    assert index.folder is not None
    damage(index.folder / name)
    index = open_index(rec)
    assert (list(index.keys), index.offsets.tolist()) == by_hand(rec)
    assert open_labels(index).tolist() == expected
    printed = capsys.readouterr().err
    harmless = damage in (extra_file, symlink_away)
    assert printed.count("warning: ") == (0 if harmless else 1), printed
    again = open_index(rec)
    assert again.folder == index.folder and open_labels(again).tolist() == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["offsets.npy", "labels.npy"])
@pytest.mark.parametrize("kind", ["permuted", "shorter"])
def test_valid_arrays_that_are_not_the_file_s_are_not_trusted(tmp_path: Path, capsys, name, kind):
    rec = write(tmp_path / "d" / "train.rec", range(9))
    index = open_index(rec)
    expected = open_labels(index).tolist()
    assert index.folder is not None
    values = np.load(index.folder / name)
    np.save(index.folder / name, values[::-1] if kind == "permuted" else values[:-1])
    index = open_index(rec)
    assert (list(index.keys), index.offsets.tolist()) == by_hand(rec)
    assert open_labels(index).tolist() == expected
    assert f"{name} is not what was written: " in capsys.readouterr().err


@pytest.mark.parametrize("what", ["file", "link", "dangling"])
def test_something_else_in_the_place_of_the_folder_is_replaced(tmp_path: Path, what: str):
    rec = write(tmp_path / "d" / "train.rec", range(9))
    folder = tmp_path / "d" / "train.arcface_index"
    if what == "file":
        folder.write_text("7")
    else:
        (tmp_path / "else").mkdir()
        folder.symlink_to(tmp_path / ("else" if what == "link" else "nowhere"))
    assert open_index(rec).folder == folder and not folder.is_symlink()
    assert {path.name for path in folder.iterdir()} == {"stamp.json", "offsets.npy"}
