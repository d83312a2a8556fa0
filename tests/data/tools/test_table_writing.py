"""A training set as a list, as Parquet and as Arrow holds the same bytes, labels and names."""

from pathlib import Path

import commands
import numpy as np
import pytest

from arcface_jax.config import DataConfig
from arcface_jax.data import names
from arcface_jax.data.opening import open_source
from arcface_jax.data.recordio.reader import RecordWriter
from arcface_jax.data.synthetic.faces import draw_face

PEOPLE = {"ada": 3, "grace": 2, "Zoë": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each person."""
    import cv2

    folder = tmp_path_factory.mktemp("faces")
    for identity, (name, images) in enumerate(PEOPLE.items()):
        (folder / name).mkdir()
        for index in range(images):
            face = draw_face(seed=1, identity=identity, index=index)
            (folder / name / f"{index}.png").write_bytes(cv2.imencode(".png", face)[1].tobytes())
    return folder


def pack(*words: str | Path) -> int:
    return commands.script("data").main(["pack", *map(str, words)])


@pytest.mark.parametrize("form", ["list", "parquet", "arrow"])
def test_what_is_packed_is_read_back(folder: Path, tmp_path: Path, form: str):
    if form != "list":
        pytest.importorskip("pyarrow")
    output = tmp_path / ("faces.csv" if form == "list" else form)
    assert pack(folder, output, "--format", form) == 0
    before, after = (open_source(DataConfig(path=str(path)), seed=0) for path in (folder, output))
    assert len(after) == sum(PEOPLE.values()) and after.num_classes == len(PEOPLE)
    assert before.names is not None and after.names is not None
    np.testing.assert_array_equal(after.labels(), before.labels())
    for index in range(len(before)):
        one, other = before.read(index), after.read(index)
        assert one.data == other.data
        assert before.names[one.label] == after.names[other.label]


def test_a_finished_set_is_not_written_over(folder: Path, tmp_path: Path, capsys):
    pytest.importorskip("pyarrow")
    assert pack(folder, tmp_path / "set", "--format", "parquet") == 0
    with pytest.raises(SystemExit):
        pack(folder, tmp_path / "set", "--format", "parquet")
    assert "has a train.parquet already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pack", "FACES", "FACES"], "is inside"),
        (["pack", "FACES", "FACES/packed", "--format", "folder"], "is inside"),
        (["inspect", "FACES", "--output", "FACES/report"], "is inside"),
        (["merge", "FACES/all", "--paths", "noise", "noise,FACES"], "is inside"),
        (["clean", "model.onnx", "--data", "FACES", "--output", "FACES/clean"], "is inside"),
        (["pack", "FACES", "all.csv"], "add --format list, or name a folder"),
        (["pack", "FACES", "all", "--format", "list"], "name all.csv"),
        (["pack", "FACES", "FILE"], "cannot use FILE"),
        (["pack", "FACES", "FILE/sub", "--format", "lmdb"], "cannot use FILE/sub"),
        (["inspect", "FACES", "--output", "FILE"], "cannot use FILE"),
        (["split", "FACES", "FILE", "--fraction", "0.4"], "cannot use FILE/train"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, monkeypatch, capsys, words: list[str], expected: str
):
    monkeypatch.chdir(tmp_path)
    Path("FACES").symlink_to(folder)
    Path("FILE").write_bytes(b"")
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        commands.script("data").main(words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert expected in captured.err and "images of" not in captured.out
    assert sorted(folder.rglob("*")) == before


def test_two_sets_do_not_share_a_folder(folder: Path, tmp_path: Path, capsys):
    pytest.importorskip("pyarrow")
    assert pack(folder, tmp_path / "set") == 0
    with pytest.raises(SystemExit):
        pack(folder, tmp_path / "set", "--format", "parquet")
    assert "has a train.rec already" in capsys.readouterr().err


def test_a_list_is_of_image_files(folder: Path, tmp_path: Path, capsys):
    assert pack(folder, tmp_path / "records") == 0
    with pytest.raises(SystemExit):
        pack(tmp_path / "records", tmp_path / "all.csv", "--format", "list")
    assert "not of image files" in capsys.readouterr().err


def test_parquet_files_of_two_sets_do_not_come_together(folder: Path, tmp_path: Path, capsys):
    pytest.importorskip("pyarrow")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-other.parquet").write_bytes(b"")
    with pytest.raises(SystemExit):
        pack(folder, tmp_path / "set", "--format", "parquet")
    assert "has a train-other.parquet already" in capsys.readouterr().err


def test_names_and_count_of_identities_without_images_are_kept(folder: Path, tmp_path: Path):
    """Labels 0, 1 and 99 of 100 identities, which no rule about their density may change."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("lmdb")
    faces = sorted(folder.glob("*/*.png"))[:3]
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, b"", label=[4.0, 104.0])
        for key, (face, label) in enumerate(zip(faces, (0, 1, 99), strict=True), start=1):
            writer.write(key, face.read_bytes(), label=float(label))
        for identity in range(100):
            writer.write(4 + identity, b"", label=[1, 1])
    for table in (None, [f"p{label:02d}" for label in range(100)]):
        if table:
            names.write(tmp_path, table)
        for form in ("parquet", "arrow", "webdataset", "lmdb"):
            output = tmp_path / f"{form} {bool(table)}"
            assert pack(tmp_path, output, "--format", form) == 0
            source = open_source(DataConfig(path=str(output)), seed=0)
            assert (source.labels().tolist(), source.num_classes) == ([0, 1, 99], 100)
            assert (source.names and list(source.names)) == table
