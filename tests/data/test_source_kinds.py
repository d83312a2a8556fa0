"""Folders, lists, Parquet, TFDS, noise, several sets at once: the same images from all."""

import hashlib
import importlib.util
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from witness import encode, face, smooth

from arcface_jax.config import DataConfig, NoiseConfig, SyntheticConfig
from arcface_jax.data.opening import folder_with, open_source, split_paths
from arcface_jax.data.recordio.reader import RecordWriter
from arcface_jax.data.source import Source
from arcface_jax.data.tools import lmdb_writing, packing, tfds_writing, webdataset_writing
from arcface_jax.errors import DataError, ImageError

PEOPLE = {"ada": 3, "bob": 1, "eve": 2}
LABELS = [0, 0, 0, 1, 2, 2]
JPEGS = [encode(smooth(i), "JPEG", quality=90) for i in range(6)]


def opened(path, **options) -> Source:
    return open_source(DataConfig(path=str(path), **options), seed=0)


def image_folder(folder: Path) -> Path:
    number = 0
    for name, images in PEOPLE.items():
        (folder / name).mkdir(parents=True)
        for image in range(images):
            (folder / name / f"{image}.jpg").write_bytes(JPEGS[number])
            number += 1
    return folder


def parquet(file: Path, rows: list[tuple], *, group: int = 2) -> Path:
    import pyarrow as pa
    from pyarrow import parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    table = pa.table(
        {"image": [{"bytes": d, "path": None} for d, _ in rows], "label": [y for _, y in rows]},
        schema,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=group)
    return file


def make(kind: str, tmp_path: Path) -> str:
    """The six images as a training set of a kind; returns data.path."""
    if kind == "records":
        (tmp_path / "r").mkdir(parents=True)
        with RecordWriter(tmp_path / "r" / "train.rec") as writer:
            for key, (data, label) in enumerate(zip(JPEGS, LABELS, strict=True)):
                writer.write(key, data, label=label)
        return str(tmp_path / "r")
    if kind == "folder":
        return str(image_folder(tmp_path / "f"))
    if kind == "list":
        folder = image_folder(tmp_path / "f")
        names = [f"{n}/{i}.jpg" for n, count in PEOPLE.items() for i in range(count)]
        lines = [f"{name},{label}" for name, label in zip(names, LABELS, strict=True)]
        (folder / "all.csv").write_text("\n".join(lines))
        return str(folder / "all.csv")
    if kind == "parquet":
        rows = list(zip(JPEGS, LABELS, strict=True))
        parquet(tmp_path / "p" / "data" / "train-00000-of-00002.parquet", rows[:4])
        parquet(tmp_path / "p" / "data" / "train-00001-of-00002.parquet", rows[4:])
        parquet(tmp_path / "p" / "data" / "test-00000-of-00001.parquet", rows[:1])
        return str(tmp_path / "p")
    source = opened(image_folder(tmp_path / "f"))
    if kind in PACKED:
        PACKED[kind](source, packing.select(source), tmp_path / "out")
        (tmp_path / "out" / "identities.txt").unlink()
        return str(tmp_path / "out")
    if kind == "arrow":
        import pyarrow as pa

        (tmp_path / "out").mkdir(parents=True)
        table = pa.table({"image": JPEGS, "label": LABELS})
        with pa.ipc.new_stream(str(tmp_path / "out" / "data.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return str(tmp_path / "out")
    tfds_writing.write(
        source, packing.select(source), tmp_path / "t", name="faces", shard_images=4, threads=2
    )
    if kind == "tfds by name":
        return f"tfds:faces@{tmp_path / 't'}"
    return str(tmp_path / "t" / "faces" / "1.0.0")


PACKED = {"webdataset": webdataset_writing.write, "lmdb": lmdb_writing.write}
KINDS = ["records", "folder", "list", "parquet", "arrow", "webdataset", "tfds by name"]
KINDS += ["tfds by folder", *(["lmdb"] if importlib.util.find_spec("lmdb") else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_bytes_labels_and_images(tmp_path: Path, kind: str):
    source = opened(make(kind, tmp_path))
    assert (len(source), source.num_classes) == (6, 3)
    assert source.labels().tolist() == LABELS
    assert source.labels().dtype == np.int32
    for index in range(6):
        assert source.read(index) == (JPEGS[index], LABELS[index])
        image, label = source[index]
        expected = cv2.imdecode(np.frombuffer(JPEGS[index], np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(image, expected[..., ::-1])
        assert label == LABELS[index] and type(label) is int
    places = {source.where(index) for index in range(6)}
    assert len(places) == 6


def test_pickled_sources_are_small_and_read_in_another_process(tmp_path: Path):
    for number, kind in enumerate(KINDS):
        source = opened(make(kind, tmp_path / kind))
        source.read(5)
        sent = pickle.dumps(source)
        assert len(sent) < 2000 + 4 * len(str(tmp_path)) < len(JPEGS[0])
        (tmp_path / f"{number}.pickle").write_bytes(sent)
    code = (
        "import pickle, sys, hashlib; from pathlib import Path\n"
        f"for file in sorted(Path({str(tmp_path)!r}).glob('*.pickle')):\n"
        "    source = pickle.loads(file.read_bytes())\n"
        "    data = b''.join(source.read(i).data for i in range(6))\n"
        "    print(hashlib.md5(data).hexdigest())\n"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    digest = hashlib.md5(b"".join(JPEGS)).hexdigest()
    assert done.stdout.split() == [digest] * len(KINDS) + ["False"], done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_eight_threads_read_what_one_reads(tmp_path: Path, kind: str):
    source = opened(make(kind, tmp_path))
    numbers = np.random.default_rng(0).integers(6, size=300).tolist()
    with ThreadPoolExecutor(8) as pool:
        for number, sample in zip(numbers, pool.map(source.read, numbers), strict=True):
            assert sample == (JPEGS[number], LABELS[number])


# ---- Lists -----------------------------------------------------------------------------------


LISTS = {
    "csv": "a b.png,1\nb.png,0\n",
    "csv quoted": '"a b.png",1\n"b.png",0\n',
    "csv with spaces": "a b.png, 1\nb.png, 0\n",
    "header": "path,label\na b.png,1\nb.png,0\n",
    "header the other way round": "Identity,Extra,Filename\n1,x,a b.png\n0,y,b.png\n",
    "byte order mark and crlf": "\ufeffpath,label\r\na b.png,1\r\nb.png,0\r\n",
    "tabs": "a b.png\t1\nb.png\t0\n",
    "spaces": "a b.png 1\nb.png 0\n",
    "im2rec": "0\t1.000000\ta b.png\n7\t0.000000\tb.png\n",
    "im2rec, several labels": "0\t1\t0.5\t7\ta b.png\n1\t0\t2\t3\tb.png\n",
    "names": "a b.png,zoe\nb.png,adam\n",
}


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_every_form(tmp_path: Path, form: str):
    for name, number in (("a b.png", 0), ("b.png", 1)):
        (tmp_path / name).write_bytes(encode(face(number)))
    (tmp_path / "x.lst").write_text(LISTS[form])
    source = opened(tmp_path / "x.lst")
    assert (len(source), source.num_classes) == (2, 2)
    for index, label in ((0, 1), (1, 0)):
        image, found = source[index]
        assert found == label
        np.testing.assert_array_equal(image, face(index))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.csv is empty"),
        ("a.png\n", "first line 'a.png' is neither"),
        ("a.png,b,c\n", "first line 'a.png,b,c' is neither"),
        ("a.png,0\nb.png\n", "line 2: 1 columns, but the first line has 2"),
        ("a.png,0\nb.png,-1\n", "line 2: label -1.0 is not an identity"),
        ("path,label\na.png,0\nb.png,0.5\n", "line 3: label 0.5 is not an identity"),
        ("a.png,0\nb.png,nan\n", "line 2: label nan is not an identity"),
        (
            "".join(f"{i}.png,{i if i < 5 else 3000000000}\n" for i in range(6)),
            "line 6: label 3000000000 is far beyond the others",
        ),
        (b"\xff\xfe\x00", "not text in UTF-8"),
    ],
)
def test_wrong_lists_are_refused_with_the_line(tmp_path: Path, text, message: str):
    (tmp_path / "x.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "x.csv")


def test_a_listed_file_that_is_missing_is_named_when_it_is_read(tmp_path: Path):
    (tmp_path / "x.csv").write_text("gone.png,0\n")
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read \(No such file"):
        opened(tmp_path / "x.csv").read(0)


# ---- Folders -----------------------------------------------------------------------------------


def test_a_folder_counts_identities_with_images_and_passes_other_files_by(tmp_path: Path):
    image_folder(tmp_path)
    (tmp_path / "nobody").mkdir()
    (tmp_path / "ada" / "notes.txt").write_text("x")
    (tmp_path / "bob" / "x.JPG").write_bytes(JPEGS[0])
    source = opened(tmp_path)
    assert (len(source), source.num_classes) == (7, 3)
    assert source.where(3) == str(tmp_path / "bob" / "0.jpg")
    assert source.where(4) == str(tmp_path / "bob" / "x.JPG")


@pytest.mark.parametrize("name", ["faces.tar", "faces.tar.gz", "old.lmdb", "old.arrow"])
def test_an_archive_beside_the_folders_of_identities_is_not_the_set(tmp_path: Path, name: str):
    image_folder(tmp_path)
    (tmp_path / name).write_bytes(bytes(16) + b"\xde\xc0\xef\xbe")
    source = opened(tmp_path)
    assert (len(source), source.num_classes, sum(source.ignored.values())) == (6, 3, 1)


# ---- Parquet ------------------------------------------------------------------------------------


def test_parquet_bytes_without_a_struct_and_labels_that_are_none(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet as pq

    table = pa.table({"image": JPEGS[:3], "label": pa.array([0.0, None, 4.0])})
    pq.write_table(table, tmp_path / "x.parquet")
    source = opened(tmp_path / "x.parquet")
    assert source.num_classes == 5 and source.labels().tolist() == [0, -1, 4]
    assert source.read(2) == (JPEGS[2], 4)
    with pytest.raises(ImageError, match=r"x\.parquet, group 0, row 1: has no label"):
        source.read(1)


def test_wrong_parquet_files_are_refused(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet as pq

    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        opened(file)
    pq.write_table(pa.table({"image": ["a.jpg"], "label": ["ada"]}), file)
    with pytest.raises(DataError, match=r"columns image \(string\), label \(string\): it needs"):
        opened(file)
    pq.write_table(pa.table({"image": JPEGS[:1]}), file)
    with pytest.raises(DataError, match="no clear label"):
        opened(file)


# ---- TFDS ----------------------------------------------------------------------------------------


def test_a_tfds_set_that_is_not_there_or_has_other_features_is_refused(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"tfds:nothing_here@.*cannot be opened.*tfds:NAME@DATA_DIR"
    ):
        opened(f"tfds:nothing_here@{tmp_path}")
    make("tfds by folder", tmp_path)
    folder = tmp_path / "t" / "faces" / "1.0.0"
    with pytest.raises(DataError, match="cannot be opened"):
        opened(f"{folder}#validation")
    features = folder / "features.json"
    features.write_text(features.read_text().replace('"label"', '"number"'))
    with pytest.raises(DataError, match="has the features image, number: it needs"):
        opened(folder)


# ---- Without files, and several ----------------------------------------------------------------


def test_noise_has_any_number_of_classes_and_images():
    source = opened("noise", noise=NoiseConfig(classes=10_000_000, images=40_000_000))
    assert (source.num_classes, len(source)) == (10_000_000, 40_000_000)
    image, label = source[39_999_999]
    assert (image.shape, image.dtype, label) == ((112, 112, 3), np.uint8, 9_999_999)
    np.testing.assert_array_equal(image, source[39_999_999][0])
    assert abs(image.mean() - 127.5) < 1.5 and not np.array_equal(image, source[0][0])
    small = opened("noise", noise=NoiseConfig(classes=3, images=7))
    assert small.labels().tolist() == [small[i][1] for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert not np.array_equal(small[0][0], open_source(DataConfig(path="noise"), seed=1)[0][0])


def test_several_sets_at_once_have_labels_behind_each_other(tmp_path: Path):
    paths = [make("records", tmp_path), make("list", tmp_path), "synthetic"]
    source = opened(",".join(paths), synthetic=SyntheticConfig(identities=2, images_per_identity=2))
    assert (len(source), source.num_classes) == (16, 8)
    expected = [*LABELS, *[3 + label for label in LABELS], 6, 6, 7, 7]
    assert source.labels().tolist() == expected == [source.read(i).label for i in range(16)]
    assert [source[i][1] for i in range(16)] == expected
    assert source.read(11).data == JPEGS[5]
    np.testing.assert_array_equal(source[3][0], source[9][0])
    assert "record 2" in source.where(2) and source.where(6).endswith("ada/0.jpg")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[15][0], source[15][0])


def test_a_path_with_a_comma_that_exists_is_one_path(tmp_path: Path):
    folder = image_folder(tmp_path / "a,b")
    assert split_paths(str(folder)) == [str(folder)]
    assert len(opened(folder)) == 6
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "lfw.bin").touch()
    assert folder_with(f"synthetic,{tmp_path / 'c'}", "lfw.bin") == tmp_path / "c"
    assert folder_with(str(folder), "lfw.bin") == folder
    assert split_paths(",".join(100 * ["abc"])) == 100 * ["abc"]  # longer than a file's name


@pytest.mark.parametrize("path", ["", "synthetic,", "synthetic, ,noise"])
def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch, path: str):
    monkeypatch.chdir(image_folder(tmp_path / "set"))
    with pytest.raises(DataError, match=rf"data\.path '{path}' has an empty path: set"):
        opened(path)
