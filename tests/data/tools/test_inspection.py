"""`data.py inspect` finds what is planted: damage, copies, wrong sizes, gaps."""

import itertools
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from witness import encode, face

from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.tools import inspection, pictures


def planted(folder: Path):
    """Identity 0 has a copy, 2 is missing, 3 has one image, which is one of 1's too."""
    images = {
        "a.png": (0, encode(face(1))),
        "b.png": (0, encode(face(1))),
        "c.png": (0, encode(face(2))),
        "d.png": (1, encode(face(3))),
        "e.png": (1, encode(face(4, height=90, width=80))),
        "f.png": (1, b"damaged"),
        "g.png": (3, encode(face(3))),
    }
    for name, (_, data) in images.items():
        (folder / name).write_bytes(data)
    lines = [f"{name},{label}\n" for name, (label, _) in images.items()]
    (folder / "all.csv").write_text("".join(lines))
    return open_source(DataConfig(path=str(folder / "all.csv")), seed=0)


def test_everything_planted_is_found_counted_and_named(tmp_path: Path):
    source = planted(tmp_path)
    report = inspection.inspect(source)
    assert report.summary() == {
        "identities": 4,
        "images": 7,
        "looked_at": 7,
        "images_per_identity_mean": 1.75,
        "images_per_identity_median": 3.0,
        "identities_without_images": 1,
        "identities_with_one_image": 1,
        "unreadable": 1,
        "bad_labels": 0,
        "other_sizes": 1,
        "duplicates": 1,
        "label_conflicts": 1,
        "gray": 0,
        "looks_bgr": False,
    }
    text = "\n".join(inspection.in_words(report))
    for part in (
        "7 images of 4 identities",
        "warning: 1.75 images an identity, fewer than 10",
        "1 identities have a single image",
        "1 labels have no image",
        "f.png: 7 bytes that are not an image",
        "1 images are not 112 x 112",
        f"{tmp_path / 'a.png'} = {tmp_path / 'b.png'}",
        f"{tmp_path / 'd.png'} = {tmp_path / 'g.png'}",
    ):
        assert part in text, part


def test_a_line_break_in_a_name_does_not_break_a_line(tmp_path: Path):
    for name in ("a\nb", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encode(face(0)))
    source = open_source(DataConfig(path=str(tmp_path)), seed=0)
    lines = inspection.in_words(inspection.inspect(source))
    assert any(r"a\nb/0.png = " in line for line in lines)
    assert not any("\n" in line for line in lines if line.startswith("warning"))


def test_the_histogram_counts_every_identity(tmp_path: Path):
    labels = np.repeat([0, 1, 2, 3], [1, 2, 3, 20])
    (tmp_path / "x.csv").write_text("".join(f"{i}.png,{y}\n" for i, y in enumerate(labels)))
    for number in range(26):
        (tmp_path / f"{number}.png").write_bytes(encode(face(number)))
    report = inspection.inspect(open_source(DataConfig(path=str(tmp_path / "x.csv")), seed=0))
    lines = [line.split() for line in inspection.in_words(report)]
    rows = [line for line in lines if line[-1].startswith("#")]
    assert [(row[:-2], row[-2]) for row in rows] == [
        (["1"], "1"),
        (["2", "-", "3"], "2"),
        (["16", "-", "31"], "1"),
    ]


def test_files_and_pictures_are_written(tmp_path: Path):
    source = planted(tmp_path)
    report = inspection.inspect(source, most=4, seed=1)
    assert report.looked_at == 4 and report.images == 7
    files = inspection.write(report, source, tmp_path / "out")
    assert [f.name for f in files] == ["inspect.json", "images_per_identity.png", "samples.png"]
    assert json.loads(files[0].read_text())["images"] == 7
    with PIL.Image.open(files[2]) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (896, 896, 3)
    tiles = pixels.reshape(8, 112, 8, 112, 3).swapaxes(1, 2).reshape(64, 112, 112, 3)
    for number in (1, 2, 3):
        assert any(np.array_equal(tile, face(number)) for tile in tiles)
    assert sum(np.all(tile == (200, 0, 0)) for tile in tiles) == 1  # the damaged one


def colored(folder: Path, *, kind: str) -> Path:
    """Two people of ten faces each, in colors of skin: as they are, gray, or blue for red."""
    for number in range(20):
        image = np.full((112, 112, 3), (170, 110, 80), np.uint8)
        image[number : number + 20, 30:60] = (120, 90, 60)
        if kind == "gray":
            image = np.repeat(image[..., :1], 3, axis=2)
        path = folder / f"person {number // 10}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image[..., ::-1] if kind == "BGR" else image))
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [("RGB", ""), ("gray", "20 of 20 images are gray"), ("BGR", "as if they were stored as BGR")],
)
def test_gray_sets_and_exchanged_colors_are_told(tmp_path: Path, kind: str, said: str):
    source = open_source(DataConfig(path=str(colored(tmp_path, kind=kind))), seed=0)
    report = inspection.inspect(source)
    assert (report.gray, report.is_bgr) == (20 * (kind == "gray"), kind == "BGR")
    told = "; ".join(inspection.warnings(report))
    assert said in told if said else told == ""


@pytest.mark.parametrize(
    ("counts", "labels"),
    [
        ([3, 3, 4], ["3", "4"]),
        ([0, 1, 1, 3], ["0", "1", "2", "3"]),
        (range(40, 90), [f"{low}–{min(low + 2, 89)}" for low in range(40, 90, 3)]),  # noqa: RUF001
        ([], []),
    ],
)
def test_bins_are_of_whole_numbers(counts, labels: list[str]):
    counts = np.array(counts, np.int64)
    found = pictures.bins(counts)
    assert [one.label for one in found] == labels
    assert sum(one.identities for one in found) == len(counts)


def test_many_numbers_of_images_share_few_bins_that_touch(tmp_path: Path):
    counts = np.random.default_rng(0).lognormal(3.6, 1.0, 100_000).astype(int)
    found = pictures.bins(counts)
    assert (found[0].low, found[0].high, found[-1].high) == (0, 0, counts.max())
    assert 10 < len(found) <= 22
    for one, after in itertools.pairwise(found):
        assert after.low == one.high + 1
    for one in found:
        assert one.identities == np.count_nonzero((counts >= one.low) & (counts <= one.high))
    assert pictures.needs_log([one.identities for one in found])
    pictures.histogram(counts, tmp_path / "h.png")
    with PIL.Image.open(tmp_path / "h.png") as image:
        assert image.size == (960, 480)
