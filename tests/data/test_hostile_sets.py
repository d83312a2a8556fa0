"""Training and verification sets made to run code, or to cost far more than their size."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.config import DataConfig
from arcface_jax.data import columnar, images
from arcface_jax.data.opening import open_source
from arcface_jax.data.pairs import bins, lists
from arcface_jax.errors import DataError, ImageError
from tests.faults import samples
from tests.faults.samples import IMAGES, LABELS


def opened(path: Path):
    return open_source(DataConfig(path=str(path)), seed=0)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("field", ["pythonClassName", "python_class_name", "type"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_tfds_folder_imports_nothing(tmp_path: Path, field: str, inner: bool):
    pytest.importorskip("tensorflow_datasets")
    wrong: object = {field: "this.Foo"}
    content = {"featuresDict": {"features": {"label": [wrong]}}} if inner else wrong
    (tmp_path / "features.json").write_text(json.dumps(content))
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"names the class 'this\.Foo'") as error:
        opened(tmp_path)
    one_line(error)
    assert "this" not in sys.modules


@pytest.mark.parametrize("side", [0, 1])
def test_pairs_that_repeat_a_few_images_are_bounded(tmp_path: Path, side: int):
    few = samples.SAMPLES["pair list"](tmp_path)
    if side:
        few.write_text("set/p0/0.jpg,set/p0/1.jpg,1\n" * 20_000)
        with pytest.raises(DataError, match="40,000 images of pairs, of which 2 are different"):
            lists.read(few, tmp_path)
        return
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(([IMAGES[0]] * 60_000, [True] * 30_000)))
    with pytest.raises(DataError, match="60,000 images of pairs, of which 1 are") as error:
        bins.read_bin(path)
    one_line(error)
    path.write_bytes(pickle.dumps(([IMAGES[0]] * 400, [True] * 200)))
    found = bins.read_bin(path)
    assert len(found.images) == 400 and (found.images == found.images[0]).all()


def test_parquet_that_expands_is_refused_and_one_image_of_many_rows_is_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    many = samples.columns(IMAGES[:1] * 50, [0] * 50)
    parquet.write_table(many, tmp_path / "many.parquet")
    source = opened(tmp_path / "many.parquet")
    assert source.read(49).data == IMAGES[0]
    assert source._images(0).nbytes < 3 * len(IMAGES[0])  # type: ignore[attr-defined]
    monkeypatch.setattr(columnar, "_LARGE", 1 << 20)
    giant = pyarrow.table({"image": [bytes(1 << 22)], "label": [0]})
    for options in ({"compression": "zstd"}, {"compression": "gzip", "use_dictionary": False}):
        parquet.write_table(giant, tmp_path / "a.parquet", **options)
        with pytest.raises(ImageError, match="expands to 4,") as error:
            opened(tmp_path / "a.parquet").read(0)
        one_line(error)
    with pytest.raises(DataError, match="expands to 4,") as error:
        opened(samples.saved_to_disk(tmp_path, giant, compression="zstd"))
    one_line(error)
    assert len(opened(samples.saved_to_disk(tmp_path, giant))) == 1  # as large as it claims


@pytest.mark.parametrize("form", ["Parquet", "Arrow"])
def test_columns_of_one_name_are_named(tmp_path: Path, form: str):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array(IMAGES), pyarrow.array(LABELS), pyarrow.array(LABELS)]
    table = pyarrow.Table.from_arrays(columns, names=["image", "label", "label"])
    path = tmp_path / "a.parquet"
    if form == "Arrow":
        path = samples.saved_to_disk(tmp_path, table)
    else:
        parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"several columns of one name \(label\)"):
        opened(path)


def test_links_do_not_multiply_folders(tmp_path: Path):
    for number in range(30):
        (tmp_path / f"l{number}").mkdir()
        (tmp_path / f"l{number}" / "0.jpg").write_bytes(IMAGES[0])
        for name in ("a", "b"):
            (tmp_path / f"l{number}" / name).symlink_to(tmp_path / f"l{number + 1}")
    (tmp_path / "l30").mkdir()
    with pytest.raises(DataError, match=r"links lead to the same 16 folders [0-9,]+ times"):
        opened(tmp_path)


def test_folders_beyond_the_deepest_are_counted(tmp_path: Path):
    deep = tmp_path / "ann"
    for _ in range(images._DEEPEST + 3):
        deep = deep / "d"
    deep.mkdir(parents=True)
    for folder in (tmp_path / "ann", tmp_path / "ann" / "d", deep):
        (folder / "0.jpg").write_bytes(IMAGES[0])
    walk = images.Walk(tmp_path)
    assert sorted(walk.files()) == ["ann/0.jpg", "ann/d/0.jpg"]
    assert walk.ignored == {f"folders more than {images._DEEPEST} deep": 1}


def test_labels_of_thousands_of_digits_are_names(tmp_path: Path):
    path = samples.SAMPLES["list"](tmp_path)
    text = path.read_text().replace(",2\n", f",{'9' * 5000}\n")
    path.write_text(text)
    source = opened(path)
    assert source.num_classes == 3
    np.testing.assert_array_equal(source.labels(), LABELS)
