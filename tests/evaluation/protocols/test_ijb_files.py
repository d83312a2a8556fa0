"""IJB files with one thing wrong: the error names the file, the line and the fix."""

from pathlib import Path

import numpy as np
import pytest

from arcface_jax.errors import DataError
from arcface_jax.evaluation.protocols import ijb_files

FILES = {
    "ijbc_name_5pts_score.txt": [
        "1.jpg 46.1 62 87.8 60.3 68.9 77.7 52.2 99.9 86.5 98.6 0.999",
        "2.jpg 45.1 61 87.8 60.3 68.9 77.7 52.2 99.9 86.5 98.6 0.5",
        "3.jpg 44.1 60 87.8 60.3 68.9 77.7 52.2 99.9 86.5 98.6 0.25",
    ],
    "ijbc_face_tid_mid.txt": ["1.jpg 1 69544", "2.jpg 7 69544", "3.jpg 7 5"],
    "ijbc_template_pair_label.txt": ["1 7 1", "7 1 0"],
    "ijbc_1N_gallery_G1.csv": ["TEMPLATE_ID,SUBJECT_ID,FILENAME", "1,100,a,b", "1,100,c,d"],
    "ijbc_1N_gallery_G2.csv": ["TEMPLATE_ID,SUBJECT_ID,FILENAME", "7,200,x"],
    "ijbc_1N_probe_mixed.csv": ["TEMPLATE_ID,SUBJECT_ID,FILENAME", "7,200,x", "1,100,x"],
}


def write(folder: Path, files: dict[str, list[str]]) -> Path:
    (folder / "meta").mkdir()
    for name, lines in files.items():
        (folder / "meta" / name).write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_what_the_lines_say(tmp_path: Path):
    found = ijb_files.read(write(tmp_path, FILES), "ijbc")
    assert found.images == tuple(tmp_path / "loose_crop" / f"{k}.jpg" for k in (1, 2, 3))
    assert found.landmarks.shape == (3, 5, 2)
    assert found.landmarks[1, 0].tolist() == pytest.approx([45.1, 61])
    assert found.detector.tolist() == pytest.approx([0.999, 0.5, 0.25])
    assert (found.templates.tolist(), found.media.tolist()) == ([1, 7, 7], [69544, 69544, 5])
    assert (found.first.tolist(), found.second.tolist()) == ([1, 7], [7, 1])
    assert found.same.tolist() == [True, False]
    assert [g.name for g in found.galleries] == ["G1", "G2"]
    assert found.probes is not None
    assert found.probes.templates.tolist() == [1, 7]
    assert found.probes.subjects.tolist() == [100, 200]


POINTS = "ijbc_name_5pts_score.txt"
MEDIA = "ijbc_face_tid_mid.txt"
PAIRS = "ijbc_template_pair_label.txt"
G1 = "ijbc_1N_gallery_G1.csv"


@pytest.mark.parametrize(
    ("name", "line", "text", "expected"),
    [
        (POINTS, 2, "2.jpg 1 2 3", ["line 2", "'2.jpg 1 2 3'", "score"]),
        (POINTS, 1, FILES[POINTS][0].replace("62", "x"), ["line 1", "x1 y1"]),
        (POINTS, 3, FILES[POINTS][2].replace("60 ", "nan "), ["line 3", "finite"]),
        (MEDIA, 2, "2.jpg 7", ["line 2", "file template media"]),
        (MEDIA, 2, "2.jpg seven 1", ["line 2", "file template media"]),
        (MEDIA, 2, "9.jpg 7 1", ["line 2", "9.jpg", "2.jpg", "same order"]),
        (PAIRS, 2, "7 1", ["line 2", "template template 0|1"]),
        (PAIRS, 1, "7 1 2", ["line 1", "template template 0|1"]),
        (PAIRS, 2, "7 1.5 1", ["line 2", "template template 0|1"]),
        (PAIRS, 2, "7 3 1", ["line 2", "template 3", MEDIA]),
        (G1, 1, "1,100,a", ["line 1", "heading"]),
        (G1, 3, "1,x", ["line 3", "TEMPLATE_ID"]),
        (G1, 3, "1,101", ["line 3", "subject 101", "100"]),
        (G1, 3, "8,101", ["line 3", "template 8", MEDIA]),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, name: str, line: int, text: str, expected):
    lines = list(FILES[name])
    lines[line - 1] = text
    write(tmp_path, FILES | {name: lines})
    with pytest.raises(DataError) as error:
        ijb_files.read(tmp_path, "ijbc")
    for word in [name, *expected]:
        assert word in str(error.value)


@pytest.mark.parametrize("name", [POINTS, MEDIA, PAIRS, G1])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    write(tmp_path, {other: lines for other, lines in FILES.items() if other != name})
    with pytest.raises(DataError, match=name):
        ijb_files.read(tmp_path, "ijbc")
    with pytest.raises(DataError, match=r"ijbb_name_5pts_score\.txt is missing"):
        ijb_files.read(tmp_path, "ijbb")


@pytest.mark.parametrize("name", list(FILES))
def test_an_empty_file_is_named(tmp_path: Path, name: str):
    write(tmp_path, FILES | {name: []})
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        ijb_files.read(tmp_path, "ijbc")


def test_a_list_that_is_cut_short_is_named(tmp_path: Path):
    write(tmp_path, FILES | {MEDIA: FILES[MEDIA][:2]})
    with pytest.raises(DataError, match=r"lists 2 images, the file with the landmarks 3"):
        ijb_files.read(tmp_path, "ijbc")


@pytest.mark.parametrize("name", [MEDIA, PAIRS, G1])
def test_a_file_that_is_not_text_is_named(tmp_path: Path, name: str):
    write(tmp_path, FILES)
    (tmp_path / "meta" / name).write_bytes(b"1.jpg 1 1\n\xff\x81 2\0\x01\n")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        ijb_files.read(tmp_path, "ijbc")


def test_names_in_latin_1_are_read(tmp_path: Path):
    files = {
        name: [line.replace("2.jpg", "é.jpg") for line in lines] for name, lines in FILES.items()
    }
    (tmp_path / "meta").mkdir()
    for name, lines in files.items():
        (tmp_path / "meta" / name).write_text("\n".join(lines), encoding="latin-1")
    assert ijb_files.read(tmp_path, "ijbc").images[1].name == "é.jpg"


@pytest.mark.parametrize(("name", "text"), [(MEDIA, "2.jpg 7 {}"), (PAIRS, "7 {} 1"), (G1, "7,{}")])
def test_a_number_of_more_than_64_bits_is_named(tmp_path: Path, name: str, text: str):
    lines = [*FILES[name][:1], text.format(10**30), *FILES[name][2:]]
    write(tmp_path, FILES | {name: lines})
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        ijb_files.read(tmp_path, "ijbc")


def test_large_numbers_and_blank_lines_are_read(tmp_path: Path):
    write(tmp_path, FILES | {PAIRS: ["1 7 1", "", "7 7 0"]})
    assert np.array_equal(ijb_files.read(tmp_path, "ijbc").second, [7, 7])
