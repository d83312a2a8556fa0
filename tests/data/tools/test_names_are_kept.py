"""The identities' names, from the set as it came to every form that is written of it."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from witness import encode, smooth

from arcface_jax.commands import data as command
from arcface_jax.config import DataConfig
from arcface_jax.data import faces
from arcface_jax.data.opening import open_source
from arcface_jax.data.tools import aligning, pictures

PEOPLE = ["Zoë", "adam", "bob_2", "李"]
JPEGS = [encode(smooth(i), "JPEG", quality=80) for i in range(8)]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two images of each of four people, beside a file that is none."""
    for number, person in enumerate(PEOPLE):
        folder = tmp_path / "in" / person
        folder.mkdir(parents=True)
        for image in range(2):
            (folder / f"{image}.jpg").write_bytes(JPEGS[2 * number + image])
    (tmp_path / "in" / "notes.txt").write_text("x")
    return tmp_path / "in"


def names(path) -> dict[bytes, str]:
    """The person of each image."""
    source = open_source(DataConfig(path=str(path)), seed=0)
    assert source.names is not None
    samples = [source.read(i) for i in range(len(source))]
    return {sample.data: source.names[sample.label] for sample in samples}


EXPECTED = {JPEGS[i]: PEOPLE[i // 2] for i in range(8)}


def run(capsys, *words) -> tuple[dict, list[str]]:
    command.main([str(word) for word in words])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1].removeprefix("RESULT ")), lines[:-1]


def test_packing_and_going_back_keep_the_names(photographs: Path, tmp_path: Path, capsys):
    result, lines = run(capsys, "pack", photographs, tmp_path / "rec")
    assert lines[0] == "9 files: 8 images used of 4 identities, 1 ignored (.txt 1)"
    assert (result["ignored"], result["ignored_by_kind"]) == (1, {".txt": 1})
    assert str(tmp_path / "rec" / "identities.txt") in result["files"]
    table = (tmp_path / "rec" / "identities.txt").read_text(encoding="utf-8")
    assert table == "".join(f"{label}\t{name}\n" for label, name in enumerate(PEOPLE))
    assert names(tmp_path / "rec") == EXPECTED
    run(capsys, "pack", tmp_path / "rec", tmp_path / "folder", "--format", "folder")
    assert names(tmp_path / "folder") == EXPECTED
    run(capsys, "pack", tmp_path / "folder", tmp_path / "again")
    assert names(tmp_path / "again") == EXPECTED


def test_splitting_and_merging_keep_the_names(photographs: Path, tmp_path: Path, capsys):
    run(capsys, "split", photographs, tmp_path / "s", "--fraction", "0.25")
    sides = [names(tmp_path / "s" / side) for side in ("train", "eval")]
    assert sides[0] | sides[1] == EXPECTED and len(sides[1]) == 2
    paths = [tmp_path / "s" / "train", tmp_path / "s" / "eval"]
    run(capsys, "merge", tmp_path / "m", "--paths", *paths)
    assert names(tmp_path / "m") == EXPECTED


def test_numbers_that_change_are_the_names_of_the_new_ones(tmp_path: Path, capsys):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(JPEGS[number])
    (tmp_path / "a.csv").write_text("0.jpg,7\n1.jpg,3\n")
    run(capsys, "pack", tmp_path / "a.csv", tmp_path / "kept")
    assert open_source(DataConfig(path=str(tmp_path / "kept")), seed=0).names is None
    run(capsys, "pack", tmp_path / "a.csv", tmp_path / "new", "--renumber")
    assert names(tmp_path / "new") == {JPEGS[0]: "7", JPEGS[1]: "3"}


def test_tfds_keeps_the_names_in_its_own_file(photographs: Path, tmp_path: Path, capsys):
    pytest.importorskip("tensorflow_datasets")
    run(capsys, "to-tfds", photographs, tmp_path / "t")
    folder = tmp_path / "t" / "faces" / "1.0.0"
    assert names(folder) == EXPECTED
    assert (folder / "label.labels.txt").read_text(encoding="utf-8").split() == PEOPLE
    assert (folder / "identities.txt").is_file()


def test_aligning_keeps_the_names_of_those_that_have_a_face(photographs: Path, tmp_path: Path):
    found = aligning.Faces(faces.TEMPLATE[None], np.ones(1))
    none = aligning.Faces(np.zeros((0, 5, 2)), np.zeros(0))
    done = aligning.align_folder(
        photographs, tmp_path / "out", lambda name, _: none if name.startswith("adam") else found
    )
    assert (done.written, done.identities, done.ignored) == (6, 3, {".txt": 1})
    table = (tmp_path / "out" / "identities.txt").read_text(encoding="utf-8")
    assert table == "0\tZoë\n1\tbob_2\n2\t李\n"
    assert set(names(tmp_path / "out").values()) == {"Zoë", "bob_2", "李"}


def test_aligning_a_packed_folder_keeps_the_names_that_its_table_has(photographs, tmp_path, capsys):
    run(capsys, "pack", photographs, tmp_path / "folder", "--format", "folder")
    found = aligning.Faces(faces.TEMPLATE[None], np.ones(1))
    none = aligning.Faces(np.zeros((0, 5, 2)), np.zeros(0))
    aligning.align_folder(
        tmp_path / "folder",
        tmp_path / "out",
        lambda name, _: none if name.startswith("0000001") else found,
    )
    source = open_source(DataConfig(path=str(tmp_path / "out")), seed=0)
    assert source.names is not None and list(source.names) == ["Zoë", "bob_2", "李"]


def test_samples_show_the_names(photographs: Path, tmp_path: Path):
    source = open_source(DataConfig(path=str(photographs)), seed=0)
    pictures.sheet(source, tmp_path / "a.png", seed=0)
    with PIL.Image.open(tmp_path / "a.png") as image:
        shown = np.asarray(image)
    captions = shown[:, : shown.shape[1] - 896]
    assert shown.shape[0] == 896 and captions.shape[1] > 100
    written = (captions < 128).any(-1).reshape(8, 112, -1).any((1, 2))
    assert written.tolist() == [True] * 4 + [False] * 4


def test_inspect_counts_what_is_used_ignored_and_unreadable(photographs, tmp_path, capsys):
    (photographs / "adam" / "2.jpg").write_bytes(JPEGS[0][:300])
    (photographs / "adam" / "3.png").write_bytes(b"")
    (photographs / ".hidden").mkdir()
    result, lines = run(capsys, "inspect", photographs, "--output", tmp_path / "i")
    assert (result["images"], result["identities"]) == (10, 4)
    assert (result["ignored"], result["ignored_by_kind"]) == (2, {".txt": 1, "hidden": 1})
    assert result["unreadable"] == sum(result["unreadable_by_kind"].values()) == 2
    used = "12 files: 8 images used of 4 identities, 2 ignored (.txt 1, hidden 1), 2 unreadable"
    assert lines[0].startswith(used)


def test_options_of_reading_are_those_of_every_tool(tmp_path: Path, capsys):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(JPEGS[number])
    rows = "".join(f"{i}.jpg,{i // 2},{i % 2}\n" for i in range(4))
    (tmp_path / "a.csv").write_text("file,session,who\n" + rows)
    with pytest.raises(SystemExit):
        command.main(["pack", str(tmp_path / "a.csv"), str(tmp_path / "no")])
    assert "which column is the identity (session or who)" in capsys.readouterr().err
    words = [tmp_path / "a.csv", tmp_path / "out", "--columns", "label=who"]
    _, lines = run(capsys, "pack", *words)
    assert lines[1] == "columns: path=file, label=who (--columns names others)"
    assert open_source(DataConfig(path=str(tmp_path / "out")), seed=0).labels().tolist() == [
        *(0, 0),
        *(1, 1),
    ]
