"""One set packed into each form: training sees the batches of the record file, bit for bit."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from witness import encode, smooth

from arcface_jax.commands import data as command
from arcface_jax.config import DataConfig
from arcface_jax.data import pipeline
from arcface_jax.data.opening import open_source
from arcface_jax.data.source import Source
from arcface_jax.data.tools import webdataset_writing
from arcface_jax.errors import UserError

IMAGES = [encode(smooth(i), "PNG" if i % 3 else "JPEG") for i in range(24)]
PEOPLE = ["adam", "Zoë", "李", "bob 2"]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """A record file of images of several formats."""
    folder = tmp_path_factory.mktemp("set")
    lines = [f"{i}.bin,{PEOPLE[7 * i // 3 % 4]}\n" for i in range(24)]
    for number, data in enumerate(IMAGES):
        (folder / f"{number}.bin").write_bytes(data)
    (folder / "all.csv").write_text("path,label\n" + "".join(lines), encoding="utf-8")
    command.main(["pack", str(folder / "all.csv"), str(folder / "records")])
    return folder / "records"


def opened(path) -> Source:
    return open_source(DataConfig(path=str(path)), seed=0)


def packed(kind: str, records: Path, folder: Path) -> Path:
    if kind in ("webdataset", "lmdb", "folder"):
        command.main(["pack", str(records), str(folder), "--format", kind])
        return folder
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source = opened(records)
    samples = [source.read(i) for i in range(len(source))]
    info = {"info": {"features": {"label": {"names": list(source.names or ())}}}}
    table = pa.table({"image": [{"bytes": x, "path": None} for x, _ in samples]})
    table = table.append_column("label", [[label for _, label in samples]])
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    folder.mkdir()
    if kind == "parquet":
        parquet.write_table(table, folder / "x.parquet", row_group_size=5)
    else:
        with pa.ipc.new_stream(str(folder / "x.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return folder


def batches(path: Path) -> list[str]:
    data = DataConfig(path=str(path), global_batch_size=8)
    found = pipeline.batches(open_source(data, seed=0), data, seed=3, start=0, stop=5)
    return [
        hashlib.md5(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(b))).hexdigest()
        for b in found
    ]


@pytest.mark.parametrize("kind", ["folder", "webdataset", "lmdb", "parquet", "arrow"])
def test_batches_and_names_are_those_of_the_records(
    tmp_path: Path, records: Path, kind: str, monkeypatch
):
    if kind == "lmdb":
        pytest.importorskip("lmdb")
    monkeypatch.setattr(webdataset_writing, "SHARD_IMAGES", 10)
    path = packed(kind, records, tmp_path / "out")
    first, other = opened(records), opened(path)
    assert list(other.names or ()) == list(first.names or ()) == sorted(PEOPLE)
    assert [other.read(i) for i in range(24)] == [first.read(i) for i in range(24)]
    assert batches(path) == batches(records)


def test_packing_tars_resumes_and_refuses_a_finished_folder(
    tmp_path: Path, records: Path, monkeypatch
):
    monkeypatch.setattr(webdataset_writing, "SHARD_IMAGES", 10)
    words = ["pack", str(records), str(tmp_path / "out"), "--format", "webdataset"]
    written = []
    write = webdataset_writing._write_shard

    def write_two(path: Path, found) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, found)

    monkeypatch.setattr(webdataset_writing, "_write_shard", write_two)
    with pytest.raises(SystemExit):
        command.main(words)
    written.clear()
    command.main(words)
    assert written == ["train-000002.tar"]
    assert len(opened(tmp_path / "out")) == 24
    with pytest.raises(SystemExit):
        command.main(words)
    with pytest.raises(UserError, match=r"has a train-000000\.tar already"):
        source = opened(records)
        selection = webdataset_writing.packing.select(source)
        webdataset_writing.write(source, selection, tmp_path / "out")
