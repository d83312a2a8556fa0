"""`FOLDER#SPLIT` in every kind of set that has splits, and its refusal in the others."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from witness import encode, smooth

from arcface_jax.config import DataConfig
from arcface_jax.data import tfds, webdataset
from arcface_jax.data.opening import folder_with, open_source
from arcface_jax.data.source import account
from arcface_jax.errors import DataError

JPEG = encode(smooth(0), "JPEG", quality=90)


def opened(path):
    return open_source(DataConfig(path=str(path)), seed=0)


def parquet(path: Path, rows: int) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [JPEG] * rows, "label": range(rows)}), path)


def arrow(path: Path, rows: int) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [JPEG] * rows, "label": range(rows)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def tar(path: Path, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in range(rows):
            for name, content in ((f"{number}.jpg", JPEG), (f"{number}.cls", b"%d" % number)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


# What writes a file, and the name of the file of a split.
KINDS = {
    "Parquet": (parquet, "{}-00000-of-00001.parquet"),
    "Parquet in data": (parquet, "data/{}-00000-of-00001.parquet"),
    "Parquet, the hub's branch": (parquet, "default/{}/0000.parquet"),
    "Arrow, the hub's cache": (arrow, "faces-{}.arrow"),
    "WebDataset": (tar, "{}-000000.tar"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_is_chosen_by_name_and_the_others_are_counted(tmp_path: Path, kind: str):
    write, name = KINDS[kind]
    write(tmp_path / name.format("train"), 3)
    write(tmp_path / name.format("test"), 2)
    for path in (tmp_path, f"{tmp_path}#train"):
        source = opened(path)
        assert len(source) == 3 and "1 ignored (files of other splits 1)" in account(source)
    assert len(opened(f"{tmp_path}#test")) == 2
    with pytest.raises(DataError, match=r"(has no file of the split|has no split) dev"):
        opened(f"{tmp_path}#dev")


@pytest.mark.parametrize("kind", ["Parquet", "Arrow, the hub's cache", "WebDataset"])
def test_without_a_training_split_there_is_no_guess(tmp_path: Path, kind: str):
    write, name = KINDS[kind]
    write(tmp_path / name.format("validation"), 3)
    assert len(opened(tmp_path)) == 3
    write(tmp_path / name.format("test"), 2)
    with pytest.raises(DataError, match="has the splits test, validation and no train: name one"):
        opened(tmp_path)
    assert len(opened(f"{tmp_path}#validation")) == 3


def test_a_saved_split_is_not_read_under_another_name(tmp_path: Path):
    arrow(tmp_path / "data.arrow", 3)
    state = {"_data_files": [{"filename": "data.arrow"}], "_split": "train"}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert len(opened(f"{tmp_path}#train")) == len(opened(tmp_path)) == 3
    with pytest.raises(DataError, match=r"is a single split \(its name: train\), not test: name"):
        opened(f"{tmp_path}#test")


def test_a_split_of_what_has_none_is_refused(tmp_path: Path):
    for person in ("ada", "bob"):
        (tmp_path / "faces" / person).mkdir(parents=True)
        (tmp_path / "faces" / person / "0.jpg").write_bytes(JPEG)
    (tmp_path / "faces.csv").write_text("faces/ada/0.jpg,0\nfaces/bob/0.jpg,1\n")
    parquet(tmp_path / "x.parquet", 2)
    for name in ("faces", "faces.csv", "x.parquet"):
        assert len(opened(tmp_path / name)) == 2
        with pytest.raises(DataError, match=f"/{name} has no split test: leave out #test"):
            opened(f"{tmp_path / name}#test")
    assert folder_with(f"{tmp_path / 'faces'}#test", "lfw.bin") == tmp_path / "faces"


def test_the_split_of_a_tfds_set_needs_no_folder():
    assert tfds.without_split("tfds:faces#test") == ("tfds:faces", "test")
    assert tfds.without_split("tfds:faces") == ("tfds:faces", "")


def test_two_ranges_of_one_folder_have_an_index_each(tmp_path: Path, monkeypatch):
    for number in range(4):
        tar(tmp_path / "set" / f"s-{number}.tar", 2)
        os.utime(tmp_path / "set" / f"s-{number}.tar", (1, 1))
    path = ",".join(str(tmp_path / "set" / place) for place in ("s-{0..1}.tar", "s-{2..3}.tar"))
    source = opened(path)

    def again(*_):
        raise AssertionError("the index is made again")

    monkeypatch.setattr(webdataset, "_index", again)
    for found in (opened(path), pickle.loads(pickle.dumps(source))):
        assert found.labels().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
