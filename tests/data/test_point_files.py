"""Five points from a file: every form gives the same to inference, align and IJB."""

import json
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.commands import embed
from arcface_jax.data import point_files
from arcface_jax.data.tools import aligning
from arcface_jax.errors import DataError

POINTS = {
    "a.jpg": np.arange(10).reshape(5, 2) + 0.5,
    "sub/b.png": np.arange(10)[::-1].reshape(5, 2) * -1.25,
}


def lines(separator: str, *, end: str = "") -> str:
    rows = ([name, *map(str, p.ravel().tolist())] for name, p in POINTS.items())
    return "".join(separator.join(row) + end + "\n" for row in rows)


FORMS = {
    "p.txt": lines(" "),
    "p_5pts_score.txt": lines(" ", end=" 0.99"),
    "tabs.lst": lines("\t"),
    "p.csv": lines(","),
    "semicolons.txt": "# found by hand\n" + lines(";"),
    "score.csv": "path,x1,y1\n" + lines(",", end=",0.99"),
    "p.json": json.dumps({name: p.tolist() for name, p in POINTS.items()}),
    "flat.json": json.dumps({name: p.ravel().tolist() for name, p in POINTS.items()}),
}


@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_is_read_by_every_reader(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_text(FORMS[name], encoding="utf-8-sig" if name == "p.csv" else "utf-8")
    found = point_files.one_by_name(path)
    assert list(found) == list(POINTS)
    look_up = aligning.listed(path)
    for image, points in POINTS.items():
        np.testing.assert_array_equal(found[image], points)
        np.testing.assert_array_equal(look_up(image, points).points, points[None])
    np.testing.assert_array_equal(embed.points_of([str(path)], Path("x/a.jpg")), POINTS["a.jpg"])


def test_several_faces_of_an_image_stay_in_order(tmp_path: Path):
    path = tmp_path / "p.csv"
    path.write_text("a.jpg,0,1,2,3,4,5,6,7,8,9\na.jpg,9,8,7,6,5,4,3,2,1,0\n")
    both = point_files.by_name(path)["a.jpg"]
    assert both.shape == (2, 5, 2)
    assert both[:, 0].tolist() == [[0, 1], [9, 8]]


def test_a_missing_file_and_one_that_is_no_text_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="no list of points at"):
        point_files.by_name(tmp_path / "gone.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"cannot read the list of points .*p\.txt"):
        point_files.by_name(tmp_path / "p.txt")
