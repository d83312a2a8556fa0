"""Arrow files as `save_to_disk` of Hugging Face's datasets writes them."""

import json
import pickle
from pathlib import Path

import pytest
from witness import encode, smooth

from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.errors import DataError, ImageError

pa = pytest.importorskip("pyarrow")

JPEGS = [encode(smooth(i), "JPEG", quality=90) for i in range(6)]
LABELS = [0, 0, 0, 1, 2, 2]
TABLE = ["ada", "bob", "eve"]
PEOPLE = [TABLE[label] for label in LABELS]
STRUCT = [{"bytes": data, "path": None} for data in JPEGS]


def opened(path, columns: str = ""):
    return open_source(DataConfig(path=str(path), columns=columns), seed=0)


def save(folder: Path, columns: dict, *, names: list[str] | None = None, shards: int = 1) -> Path:
    """What `Dataset.save_to_disk` writes: streams of record batches, and two JSON files."""
    table = pa.table(columns)
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    folder.mkdir(parents=True)
    files = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    rows = len(table) // shards
    for number, name in enumerate(files):
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table.slice(number * rows, rows), max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in files], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


# The columns, the names of a ClassLabel, and the names of the identities.
FORMS = {
    "numbers": ({"image": STRUCT, "label": LABELS}, None, None),
    "ClassLabel": ({"image": STRUCT, "label": LABELS}, TABLE, TABLE),
    "text": ({"img": JPEGS, "identity": PEOPLE}, None, TABLE),
    "dictionary": ({"face": JPEGS, "label": pa.array(PEOPLE).dictionary_encode()}, None, TABLE),
    "other columns": ({"n": [9] * 6, "image": STRUCT, "label": LABELS, "x": JPEGS}, None, None),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shards", [1, 2])
def test_columns_and_labels_of_every_form(tmp_path: Path, form: str, shards: int):
    columns, names, table = FORMS[form]
    source = opened(save(tmp_path / "d", columns, names=names, shards=shards))
    assert source.labels().tolist() == LABELS and source.num_classes == 3
    assert [source.read(i) for i in range(6)] == list(zip(JPEGS, LABELS, strict=True))
    assert (source.names and list(source.names)) == table
    again = pickle.loads(pickle.dumps(source))
    assert again.read(5) == (JPEGS[5], 2) and again.where(5) == source.where(5)


def test_a_split_is_chosen_by_name(tmp_path: Path):
    save(tmp_path / "d" / "train", {"image": STRUCT, "label": LABELS})
    save(tmp_path / "d" / "test", {"image": STRUCT[:3], "label": LABELS[:3]})
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert len(opened(tmp_path / "d")) == 6
    assert len(opened(f"{tmp_path / 'd'}#test")) == 3 == len(opened(tmp_path / "d" / "test"))
    with pytest.raises(DataError, match="has the splits test, train, not dev: name one as"):
        opened(f"{tmp_path / 'd'}#dev")


def test_images_that_are_named_by_their_path_are_read(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(JPEGS[4])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = [str(tmp_path / "a.jpg"), "no.jpg", None]
    images = pa.array([{"bytes": None, "path": path} for path in paths], kind)
    source = opened(save(tmp_path / "d", {"image": images, "label": [0, 1, 0]}))
    assert source.read(0).data == JPEGS[4]
    with pytest.raises(ImageError, match=r"no\.jpg: cannot be read"):
        source.read(1)
    with pytest.raises(ImageError, match=r"arrow, row 2: has no bytes in its image"):
        source.read(2)


def test_labels_that_are_none_are_unreadable(tmp_path: Path):
    source = opened(save(tmp_path / "d", {"image": JPEGS[:3], "label": [0, -1, 1]}))
    assert source.labels().tolist() == [0, -1, 1]
    with pytest.raises(ImageError, match="row 1: has no label"):
        source.read(1)


def test_the_hubs_cache_and_single_files_are_read(tmp_path: Path):
    folder = save(tmp_path / "d", {"image": STRUCT, "label": LABELS})
    file = folder / "data-00000-of-00001.arrow"
    (folder / "state.json").unlink()
    file.rename(folder / "faces-train.arrow")
    (folder / "faces-test.arrow").write_bytes(b"")
    (folder / "cache-1f.arrow").write_bytes(b"")
    assert len(opened(folder)) == 6 == len(opened(folder / "faces-train.arrow"))
    table = pa.table({"image": JPEGS, "label": LABELS})
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert opened(tmp_path / "x.arrow").read(5) == (JPEGS[5], 2)


def test_damage_and_selected_rows_are_refused(tmp_path: Path):
    folder = save(tmp_path / "d", {"image": STRUCT, "label": LABELS})
    file = folder / "data-00000-of-00001.arrow"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"arrow is not an Arrow file that can be read"):
        opened(folder)
    state = json.loads((folder / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="selects rows by indices: save it again with"):
        opened(folder)
    (folder / "state.json").write_text("[")
    with pytest.raises(DataError, match=r"state\.json cannot be read"):
        opened(folder)


@pytest.mark.slow
def test_what_the_library_writes_is_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=TABLE)}
    rows = {"image": STRUCT, "label": LABELS}
    whole = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    splits = datasets.DatasetDict(train=whole.select([5, 0]), test=whole)
    splits.save_to_disk(str(tmp_path / "d"), num_shards={"train": 2, "test": 1})
    source = opened(tmp_path / "d")
    assert source.names is not None and list(source.names) == TABLE
    assert [source.read(i) for i in range(2)] == [(JPEGS[5], 2), (JPEGS[0], 0)]
