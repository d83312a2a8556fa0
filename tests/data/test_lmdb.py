"""LMDB sets: every form that converters write, labels from all their places, damage named."""

import os
import pickle
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from witness import encode, smooth

from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.source import account
from arcface_jax.errors import DataError, ImageError

lmdb = pytest.importorskip("lmdb")

JPEGS = [encode(smooth(i), "JPEG", quality=90) for i in range(6)]
LABELS = [0, 0, 0, 1, 2, 2]
TABLE = ["ada", "bob", "eve"]
KEYS = [b"%d" % i for i in (9, 10, 11, 12, 13, 14)]  # whose order is not that of their bytes
PAIRS = list(zip(KEYS, JPEGS, LABELS, strict=True))


def opened(path, columns: str = ""):
    return open_source(DataConfig(path=str(path), columns=columns), seed=0)


def database(path: Path, entries: Iterable[tuple[bytes, bytes]], *, folder: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(path), subdir=folder, map_size=1 << 22)
    with environment, environment.begin(write=True) as transaction:
        for key, value in entries:
            assert transaction.put(key, value)
    return path


def packed(data: bytes) -> bytes:
    """MessagePack's bytes."""
    return b"\xc5" + struct.pack(">H", len(data)) + data


def datum(image: bytes, label: int) -> bytes:
    size = bytes([len(image) & 127 | 128, len(image) >> 7])
    return b"\x08\x03\x10\x70\x18\x70\x22" + size + image + b"\x28" + bytes([label]) + b"\x38\x01"


LISTED = [(b"__keys__", pickle.dumps(KEYS[::-1])), (b"__len__", b"6")]
# Entries, the order in which the images are read, and the names of the identities.
FORMS = {
    "MessagePack": [(k, b"\x92" + packed(x) + bytes([y])) for k, x, y in PAIRS],
    "MessagePack, a dictionary": [
        (k, b"\x82\xa5label" + bytes([y]) + b"\xa5image" + packed(x)) for k, x, y in PAIRS
    ],
    "MessagePack, a large number": [
        (k, b"\x92" + packed(x) + b"\xcf" + struct.pack(">Q", y)) for k, x, y in PAIRS
    ],
    "pickle": [(k, pickle.dumps((x, y))) for k, x, y in PAIRS],
    "pickle, label first": [(k, pickle.dumps([y, x])) for k, x, y in PAIRS],
    "pickle of Python 2": [(k, pickle.dumps((x, y), protocol=2)) for k, x, y in PAIRS],
    "pickle, NumPy": [
        (k, pickle.dumps((np.frombuffer(x, np.uint8), np.int64(y)))) for k, x, y in PAIRS
    ],
    "pickle, a dictionary": [
        (k, pickle.dumps({"size": 112, "image": x, "label": y})) for k, x, y in PAIRS
    ],
    "Datum": [(k, datum(x, y)) for k, x, y in PAIRS],
    "labels beside": [
        entry
        for k, x, y in PAIRS
        for entry in ((b"image-" + k.zfill(9), x), (b"label-" + k.zfill(9), b"%d" % y))
    ]
    + [(b"num-samples", b"6")],
    "pickled labels beside": [
        entry
        for k, x, y in PAIRS
        for entry in (
            (b"image-" + k.zfill(9), x),
            (b"label-" + k.zfill(9), pickle.dumps(np.int64(y))),
        )
    ],
    "folders": [(f"s/{TABLE[y]}/{i}.jpg".encode(), x) for i, (_, x, y) in enumerate(PAIRS)],
    "names": [(k, pickle.dumps((x, TABLE[y]))) for k, x, y in PAIRS],
}


@pytest.mark.parametrize("form", FORMS)
def test_images_and_labels_of_every_form(tmp_path: Path, form: str):
    source = opened(database(tmp_path / "a.lmdb", FORMS[form]))
    assert source.labels().tolist() == LABELS and source.num_classes == 3
    assert [source.read(i) for i in range(6)] == list(zip(JPEGS, LABELS, strict=True))
    names = TABLE if form in ("folders", "names") else None
    assert (source.names and list(source.names)) == names
    assert account(source) == "6 entries: 6 images used of 3 identities, 0 ignored"


def test_the_writers_own_keys_give_order_and_count(tmp_path: Path):
    facts = [*LISTED, (b"__classnum__", b"\x05")]
    folder = database(tmp_path / "set" / "a.lmdb", [*FORMS["MessagePack"], *facts], folder=True)
    for path in (folder, folder.parent):
        source = opened(path)
        assert source.labels().tolist() == LABELS[::-1] and source.num_classes == 5
        assert source.read(0) == (JPEGS[5], 2)
        assert source.where(0) == f"{folder}, key 14"


def test_what_is_not_used_is_counted(tmp_path: Path):
    keys = pickle.dumps([*KEYS[:5], b"gone"])
    entries = [*FORMS["pickle"], (b"x", b"nothing"), (b"__keys__", keys)]
    line = account(opened(database(tmp_path / "a.lmdb", entries)))
    assert line.startswith("8 entries: 5 images used of 3 identities, 3 ignored (")
    for kind in ("entries that __keys__ does not list 1", "keys without an image 1"):
        assert kind in line


@pytest.mark.parametrize("folder", [False, True])
def test_a_list_beside_has_the_labels(tmp_path: Path, folder: bool):
    path = database(tmp_path / "a.lmdb", [(k, x) for k, x, _ in PAIRS], folder=folder)
    with pytest.raises(DataError, match=r"a\.lmdb, key 9: the image has no label with it"):
        opened(path)
    listed = path / "kv.txt" if folder else tmp_path / "a.txt"
    listed.write_text("".join(f"{k.decode()} {TABLE[y]}\n" for k, _, y in PAIRS[:5]))
    with pytest.raises(DataError, match=r"has no line for 1 of 6 keys of .*a\.lmdb \(14\)"):
        opened(path)
    with listed.open("a") as file:
        file.write("14 eve\n")
    source = opened(path)
    assert source.labels().tolist() == LABELS and source.notes == (f"labels: {listed}",)
    assert source.names is not None and list(source.names) == TABLE


def test_folders_in_keys_follow_the_rules_of_an_image_folder(tmp_path: Path):
    nested = ["f/p0/0.jpg", "f/p0/more/1.jpg", "f/p1/2020/2.jpg", "f/p2/3.jpg"]
    others = ["__MACOSX/p0/0.jpg", "f/.thumbs/0.jpg", "f/cover.jpg"]
    entries = [(name.encode(), JPEGS[i % 6]) for i, name in enumerate([*nested, *others])]
    source = opened(database(tmp_path / "a.lmdb", entries))
    assert source.num_classes == 3 and source.ignored == {"hidden": 2, "loose images": 1}
    found = {source.read(i).data: source.labels()[i] for i in range(len(source))}
    assert found == dict(zip(JPEGS[:4], [0, 0, 1, 2], strict=True))


def test_sparse_labels_below_the_writers_count_are_numbers(tmp_path: Path):
    entries = [(b"%d" % i, pickle.dumps((JPEGS[i], y))) for i, y in enumerate((0, 1, 99))]
    path = database(tmp_path / "a.lmdb", [*entries, (b"__classnum__", b"\x64")])
    source = opened(path)
    assert source.labels().tolist() == [0, 1, 99] and source.num_classes == 100


def test_other_texts_beside_are_passed_by(tmp_path: Path):
    path = database(tmp_path / "a.lmdb", FORMS["folders"], folder=True)
    (path / "README.txt").write_text(
        "Faces of three people.\n" + 600 * "x" + ",,\nSome of them, at least, in color.\n"
    )
    source = opened(path)
    assert source.labels().tolist() == LABELS
    assert source.notes == ("labels: the folders of the keys",)


class Malicious:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [(b"0", pickle.dumps((JPEGS[0], Malicious())))],
            r"a\.lmdb, key 0: the pickle asks for posix\.system, which no image with a label needs",
        ),
        (
            [(b"7", b"hello"), (b"8", b"")],
            r"holds 2 entries and no image that can be read: key 7 has 5 bytes that begin with 68",
        ),
        ([(b"__len__", b"0")], "holds no entry"),
        (
            [(b"image-7", JPEGS[0]), (b"label-7", struct.pack("<i", 200))],
            r"key label-7: c8 00 00 00 is not a label: write it as text",
        ),
        (
            [(b"%d" % i, pickle.dumps((JPEGS[0], i if i < 9 else 20_000_000))) for i in range(10)],
            r"key 9: label 20000000 is far beyond the others",
        ),
    ],
)
def test_what_is_not_understood_is_refused_with_what_was_found(tmp_path: Path, entries, message):
    with pytest.raises(DataError, match=message):
        opened(database(tmp_path / "a.lmdb", entries))


def test_a_database_that_is_cut_short_is_refused(tmp_path: Path):
    path = database(tmp_path / "a.lmdb", FORMS["pickle"])
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(
        DataError, match=r"a\.lmdb is truncated \([0-9,]+ of [0-9,]+ bytes\): copy it"
    ):
        opened(path)


def test_what_lmdb_raises_is_an_error_of_the_image(tmp_path: Path, monkeypatch):
    source = opened(database(tmp_path / "a.lmdb", FORMS["MessagePack"]))
    source.read(0)

    class Damaged:
        def begin(self, **_):
            raise lmdb.CorruptedError("a page")

        def close(self) -> None:
            pass

    monkeypatch.setattr(source._environment, "_lmdb", Damaged())
    with pytest.raises(ImageError, match=r"a\.lmdb: cannot be read \(.*a page.*\): copy it again"):
        source.read(0)


def test_several_databases_in_a_folder_are_asked_about(tmp_path: Path):
    for name in ("a", "b"):
        database(tmp_path / f"{name}.lmdb", FORMS["pickle"])
    with pytest.raises(DataError, match=r"holds 2 LMDBs \(a\.lmdb, b\.lmdb\): name one"):
        opened(tmp_path)


def test_the_index_is_kept_and_the_source_is_sent_without_it(tmp_path: Path):
    path = database(tmp_path / "a.lmdb", FORMS["MessagePack"])
    os.utime(path, (1, 1))
    source = opened(path)
    assert (tmp_path / "a.lmdb.arcface_index" / "labels.npy").is_file()
    sent = pickle.dumps(source)
    assert len(sent) < 1500
    again = pickle.loads(sent)
    expected = list(zip(JPEGS, LABELS, strict=True))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.read, range(6))) == expected
    assert list(map(opened(path).read, range(6))) == expected


def test_an_entry_that_is_gone_is_one_error(tmp_path: Path):
    path = database(tmp_path / "a.lmdb", FORMS["MessagePack"])
    source = opened(path)
    environment = lmdb.open(str(path), subdir=False)
    with environment, environment.begin(write=True) as transaction:
        transaction.delete(KEYS[2])
    with pytest.raises(ImageError, match="key 11: is missing"):
        source.read(2)
    assert source.read(3) == (JPEGS[3], 1)
