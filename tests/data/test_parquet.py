"""Parquet files of images: columns of any name, labels as numbers, text, dictionary, ClassLabel."""

import json
from pathlib import Path

import pytest

from arcface_jax.config import DataConfig
from arcface_jax.data import columnar
from arcface_jax.data.opening import open_source
from arcface_jax.errors import DataError, ImageError

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet as pq  # noqa: E402  # only where pyarrow is installed

IMAGES = [b"image 0", b"image 1", b"image 2", b"image 3"]
NAMES = ["zoe", "adam", "zoe", "zoe"]


def write(path: Path, columns: dict, *, metadata: dict | None = None) -> Path:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


def opened(path: Path, columns: str = ""):
    return open_source(DataConfig(path=str(path), columns=columns), seed=0)


def features(label: str) -> dict:
    return {"info": {"features": {label: {"names": ["adam", "bob", "zoe"], "_type": "ClassLabel"}}}}


STRUCT = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(IMAGES)]
# The columns, the metadata, the labels, and the identities' names.
FORMS = {
    "text": ({"image": STRUCT, "label": NAMES}, None, [1, 0, 1, 1], ["adam", "zoe"]),
    "dictionary": (
        {"image": STRUCT, "label": pa.array(NAMES).dictionary_encode()},
        None,
        [1, 0, 1, 1],
        ["adam", "zoe"],
    ),
    "ClassLabel": (
        {"image": STRUCT, "label": [2, 0, 2, 2]},
        features("label"),
        [2, 0, 2, 2],
        ["adam", "bob", "zoe"],
    ),
    "text of numbers": ({"image": IMAGES, "label": ["0", "1", "1", "0"]}, None, [0, 1, 1, 0], None),
    "sparse numbers": (
        {"image": IMAGES, "label": [9000, 100, 9000, 9000]},
        None,
        [1, 0, 1, 1],
        ["100", "9000"],
    ),
    "other names": (
        {"id": [5, 6, 7, 8], "face": IMAGES, "identity": NAMES},
        None,
        [1, 0, 1, 1],
        ["adam", "zoe"],
    ),
    "a width beside": (
        {"width": [112] * 4, "img": STRUCT, "label": [0, 1, 0, 0]},
        None,
        [0, 1, 0, 0],
        None,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_and_labels_of_every_form(tmp_path: Path, form: str):
    columns, metadata, labels, names = FORMS[form]
    source = opened(write(tmp_path / "x.parquet", columns, metadata=metadata))
    assert source.labels().tolist() == labels
    assert [source.read(i).data for i in range(4)] == IMAGES
    assert (None if source.names is None else list(source.names)) == names
    assert source.num_classes == (len(names) if names else max(labels) + 1)


def class_label(names: list[str]) -> dict:
    return {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}


@pytest.mark.parametrize(
    ("tables", "labels", "expected", "names"),
    [
        ((["al", "bo"], ["ca", "di"]), [0, 1], [0, 1, 2, 3], ["al", "bo", "ca", "di"]),
        ((["al", "bo"], ["bo", "al", "ca"]), [0, 1], [0, 1, 1, 0], ["al", "bo", "ca"]),
        ((["al", "bo"], ["bo", "al"]), [0, -1], [0, -1, 1, -1], ["al", "bo"]),
        ((["al", "bo"], ["al", "bo"]), [0, 1], [0, 1, 0, 1], ["al", "bo"]),
        # All names count, and the labels are numbers, however far apart.
        (([f"p{i}" for i in range(1000)],) * 2, [0, 995], [0, 995] * 2, 1000),
        (([str(i) for i in range(1000)],) * 2, [0, 995], [0, 995] * 2, None),
    ],
)
def test_files_share_the_identities_whose_names_they_share(
    tmp_path: Path, tables, labels, expected, names
):
    for number, table in enumerate(tables):
        columns = {"image": IMAGES[2 * number : 2 * number + 2], "label": labels}
        write(tmp_path / f"train-{number}.parquet", columns, metadata=class_label(table))
    source = opened(tmp_path)
    assert source.labels().tolist() == expected
    assert source.num_classes == len(set().union(*tables))
    found = None if source.names is None else list(source.names)
    assert found == (names if isinstance(names, list | None) else tables[0])


@pytest.mark.parametrize(
    ("table", "labels", "message"),
    [
        (None, [0, 1], r"train-1\.parquet has no ClassLabel with names, and .*train-0.* has"),
        (["ca", "ca"], [0, 1], r"train-1\.parquet and .*train-0.* have different ClassLabels"),
        (["ca", "di"], [0, 2], r"names that occur twice, or labels without a name"),
    ],
)
def test_class_labels_that_cannot_be_joined_are_refused(tmp_path: Path, table, labels, message):
    columns = {"image": IMAGES[:2], "label": [0, 1]}
    write(tmp_path / "train-0.parquet", columns, metadata=class_label(["al", "bo"]))
    metadata = None if table is None else class_label(table)
    columns = {"image": IMAGES[2:], "label": labels}
    write(tmp_path / "train-1.parquet", columns, metadata=metadata)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_columns_that_are_not_clear_are_asked_about(tmp_path: Path):
    columns = {"image": IMAGES, "who": NAMES, "where": ["x", "x", "y", "y"]}
    path = write(tmp_path / "x.parquet", columns)
    with pytest.raises(DataError, match=r"which is it, who or where\?.*--data\.columns"):
        opened(path)
    assert list(opened(path, "label=who").names) == ["adam", "zoe"]
    with pytest.raises(DataError, match="no clear label"):
        opened(path, "label=nothing")


def test_the_hubs_folders_are_found_by_their_training_split(tmp_path: Path):
    columns = {"image": IMAGES, "label": NAMES}
    for name in ("default/train/0000", "default/train/0001", "default/test/0000"):
        write(tmp_path / "hub" / f"{name}.parquet", columns)
    assert len(opened(tmp_path / "hub")) == 8
    assert len(opened(tmp_path / "hub" / "default")) == 8
    write(tmp_path / "hub" / "small" / "train" / "0000.parquet", columns)
    assert len(opened(tmp_path / "hub")) == 8
    for name in ("big", "small"):
        write(tmp_path / "two" / name / "train" / "0000.parquet", columns)
    with pytest.raises(DataError, match=r"several sets: name one of .*big/train, .*small/train"):
        opened(tmp_path / "two")


def test_a_row_without_a_name_and_a_number_far_beyond_are_named(tmp_path: Path):
    path = write(tmp_path / "x.parquet", {"image": IMAGES, "label": ["a", None, "b", "b"]})
    with pytest.raises(DataError, match=r"x\.parquet, group 0, row 1: has no label"):
        opened(path)
    many = {"image": IMAGES * 2, "label": [0, 1, 2, 3, 4, 5, 6, 2_000_000]}
    with pytest.raises(DataError, match=r"group 2, row 1: label 2000000 is far beyond"):
        opened(write(tmp_path / "y.parquet", many))


@pytest.mark.parametrize("names", [None, 5, "ab", {"0": "a"}])
def test_class_names_that_are_no_list_are_not_used(tmp_path: Path, names):
    metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    columns = {"image": IMAGES, "label": [0, 1, 1, 0]}
    source = opened(write(tmp_path / "x.parquet", columns, metadata=metadata))
    assert source.num_classes == 2 and source.names is None


def test_an_image_path_that_is_no_text_is_no_image(tmp_path: Path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.int64())])
    images = pa.array([{"bytes": None, "path": 5}], kind)
    source = opened(write(tmp_path / "x.parquet", {"image": images, "label": [0]}))
    with pytest.raises(ImageError, match="row 0: has no bytes in its image"):
        source.read(0)


@pytest.mark.parametrize("name", ["face", "face.jpg"])
def test_a_column_that_expands_is_refused_whatever_its_name(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setattr(columnar, "_LARGE", 1 << 16)
    columns = {name: [bytes(1 << 20)], "label": [0]}
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    source = opened(tmp_path / "x.parquet")
    with pytest.raises(ImageError, match=r"group 0: cannot be read: expands to 1,0"):
        source.read(0)
