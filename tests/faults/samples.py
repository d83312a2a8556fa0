"""A small honest example of every format that `readers` reads."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

LABELS = [0, 0, 0, 1, 2, 2]


def image(number: int) -> bytes:
    """A JPEG of 112 x 112 pixels, 2 kB."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(small, (112, 112)))[1].tobytes()


IMAGES = [image(number) for number in range(len(LABELS))]


def _folder(folder: Path) -> Path:
    for number, (data, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (folder / "set" / f"p{label}").mkdir(parents=True, exist_ok=True)
        (folder / "set" / f"p{label}" / f"{number}.jpg").write_bytes(data)
    return folder / "set"


def _list(folder: Path) -> Path:
    _folder(folder)
    lines = [f"set/p{label}/{number}.jpg,{label}\n" for number, label in enumerate(LABELS)]
    (folder / "list.csv").write_text("".join(lines))
    return folder / "list.csv"


def _recordio(folder: Path) -> Path:
    from arcface_jax.data.recordio.reader import RecordWriter

    with RecordWriter(folder / "train.rec") as writer:
        writer.write(0, b"", label=[7, 10])
        for key, (data, label) in enumerate(zip(IMAGES, LABELS, strict=True), start=1):
            writer.write(key, data, label=float(label))
        for identity in range(3):
            writer.write(7 + identity, b"", label=[1, 2])
    return folder / "train.rec"


def columns(images: list[bytes], labels: list[int]) -> Any:
    """A table as Hugging Face has it."""
    import pyarrow

    return pyarrow.table(
        {"image": [{"bytes": data, "path": None} for data in images], "label": labels}
    )


def _parquet(folder: Path) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(columns(IMAGES, LABELS), folder / "train.parquet")
    return folder / "train.parquet"


def saved_to_disk(folder: Path, table: Any, **options: Any) -> Path:
    """The folder that `save_to_disk` writes of a table."""
    import pyarrow

    target = folder / "saved"
    target.mkdir(exist_ok=True)
    written = pyarrow.ipc.IpcWriteOptions(**options)
    file = str(target / "data-00000-of-00001.arrow")
    with pyarrow.ipc.new_stream(file, table.schema, options=written) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    (target / "state.json").write_text(json.dumps(state))
    (target / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return target


def _arrow(folder: Path) -> Path:
    return saved_to_disk(folder, columns(IMAGES, LABELS))


def _tfds(folder: Path) -> Path:
    from arcface_jax.data.files import try_folder
    from arcface_jax.data.tools import packing, tfds_writing

    source = try_folder(_folder(folder))
    assert source is not None
    tfds_writing.write(source, packing.select(source), folder, name="faces", shard_images=4)
    return folder / "faces" / "1.0.0"


def database(path: Path, entries: list[tuple[bytes, bytes]]) -> Path:
    """An LMDB of some entries."""
    import lmdb

    environment = lmdb.open(str(path), subdir=False, map_size=1 << 22, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for key, value in entries:
            transaction.put(key, value)
    return path


def _lmdb(folder: Path) -> Path:
    entries = [
        (b"%08d" % number, pickle.dumps((data, label)))
        for number, (data, label) in enumerate(zip(IMAGES, LABELS, strict=True))
    ]
    return database(folder / "faces.lmdb", entries)


def tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    """A tar of some files."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def _webdataset(folder: Path) -> Path:
    files = []
    for number, (data, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        files += [
            (f"{number}.jpg", data),
            (f"{number}.json", json.dumps({"label": label}).encode()),
        ]
    return tar(folder / "train.tar", files)


def _bin(folder: Path) -> Path:
    (folder / "set.bin").write_bytes(pickle.dumps((IMAGES, [True, False, True])))
    return folder / "set.bin"


def _pair_list(folder: Path) -> Path:
    _folder(folder)
    lines = ["set/p0/0.jpg,set/p0/1.jpg,1", "set/p0/2.jpg,set/p1/3.jpg,0"]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def _points(folder: Path) -> Path:
    faces = {f"{number}.jpg": [[number, x] for x in range(5)] for number in range(3)}
    (folder / "points.json").write_text(json.dumps(faces))
    return folder / "points.json"


def weights() -> dict[str, Any]:
    """The state dict of a fresh r_tiny."""
    import torch

    from arcface_jax.convert import twins

    torch.manual_seed(0)
    return twins.build("r_tiny", embedding_size=32).state_dict()


def _torch(folder: Path) -> Path:
    import torch

    torch.save({"epoch": 3, "state_dict": weights()}, folder / "weights.pth")
    return folder / "weights.pth"


def _safetensors(folder: Path) -> Path:
    import safetensors.torch

    safetensors.torch.save_file(weights(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def graph(*, batch: int | str = "batch", nodes: Any = (), weights: Any = ()) -> Any:
    """An ONNX model that takes faces: some nodes, then a product of the pooled image.

    Args:
      batch: the first axis of the input.
      nodes: that take `faces` and give `x`; by default one that changes nothing.
      weights: initializers of these nodes.
    """
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 32)).astype(np.float32)
    made = [
        *(nodes or [helper.make_node("Identity", ["faces"], ["x"])]),
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "kernel"], ["embedding"]),
    ]
    number = onnx.TensorProto.FLOAT
    taken = helper.make_tensor_value_info("faces", number, [batch, 3, 112, 112])
    given = helper.make_tensor_value_info("embedding", number, [batch, 32])
    stored = [numpy_helper.from_array(kernel, "kernel"), *weights]
    whole = helper.make_graph(made, "faces", [taken], [given], stored)
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _onnx(folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(graph().SerializeToString())
    return folder / "model.onnx"


def _network() -> Any:
    import jax

    from arcface_jax.models import registry
    from arcface_jax.training.network import Network

    params, batch_stats = registry.build("r_tiny", embedding_size=32).init(0)
    arrays = jax.tree.map(np.asarray, (params, batch_stats))
    return Network("r_tiny", *arrays, batch_size=2, devices=1)


def _hub(folder: Path) -> Path:
    from arcface_jax.convert import hub, weight_files
    from arcface_jax.convert import weights as converting

    model = _network()
    target = folder / "hub"
    target.mkdir()
    state = converting.to_state_dict(model.params, model.batch_stats)
    weight_files.write(target / hub.WEIGHTS, state)
    described = {
        "library_name": "arcface_jax",
        "network": "r_tiny",
        "embedding_size": 32,
        "input": json.loads(model.input.to_json()),
    }
    (target / hub.CONFIG).write_text(json.dumps(described))
    return target


def _workdir(folder: Path) -> Path:
    from arcface_jax import config as c
    from arcface_jax.training import checkpoint

    model = _network()
    drawn = c.SyntheticConfig(identities=4, images_per_identity=4, pairs=20, pair_identities=4)
    run = c.Config(
        workdir=str(folder / "run"),
        data=c.DataConfig(path="synthetic", synthetic=drawn),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32),
        evaluation=c.EvaluationConfig(targets=("synthetic",)),
    )
    checkpoint.save_weights(run, model.params, model.batch_stats)
    return folder / "run"


def _calibration(folder: Path) -> Path:
    from arcface_jax.evaluation import calibration

    found = calibration.Calibration(
        **{"threshold_cosine": 0.3, "threshold_squared_distance": 1.4, "far_target": 1e-3},
        **{"far": 1e-3, "far_low": 1e-4, "far_high": 2e-3, "tar": 0.9, "tar_low": 0.8},
        **{"tar_high": 0.95, "same_pairs": 10, "different_pairs": 10, "enough_pairs": False},
        **{"flip": False, "model": "a" * 64, "set_name": "x", "set_digest": "b" * 64},
        date="2026-01-01",
    )
    calibration.write(found, folder / "threshold.json")
    return folder / "threshold.json"


def _embeddings(folder: Path) -> Path:
    from arcface_jax.evaluation.shards import Store

    store = Store(folder / "out", "embeddings-{:05d}.npy", beside="ids-{:05d}.json")
    store.agree({"model": "a" * 64, "images": 4})
    for number in range(2):
        ids = [f"{number}-{i}.jpg" for i in range(2)]
        rows = np.ones((2, 8), np.float32)
        store.write(number, rows, beside={"ids": ids, "skipped": {}})
    return folder / "out"


def _gallery(folder: Path) -> Path:
    from arcface_jax.inference import gallery

    rows = np.eye(4, 8, dtype=np.float32)
    gallery.build(folder / "g", rows, [f"n{i}" for i in range(4)], model="a" * 64, form="int8")
    return folder / "g"


def _centers(folder: Path) -> Path:
    import torch

    (folder / "head").mkdir()
    for rank in range(2):
        rows = torch.ones(3, 8)
        torch.save({"weight": rows}, folder / "head" / f"softmax_fc_gpu_{rank}.pt")
    return folder / "head"


SAMPLES: dict[str, Callable[[Path], Path]] = {
    "folder": _folder,
    "list": _list,
    "RecordIO": _recordio,
    "Parquet": _parquet,
    "Arrow": _arrow,
    "TFDS": _tfds,
    "LMDB": _lmdb,
    "WebDataset": _webdataset,
    "photos": _folder,
    "pairs .bin": _bin,
    "pair list": _pair_list,
    "five points": _points,
    "torch .pth": _torch,
    "safetensors": _safetensors,
    "ONNX": _onnx,
    "hub folder": _hub,
    "class centers": _centers,
    "workdir": _workdir,
    "calibration": _calibration,
    "embeddings": _embeddings,
    "gallery": _gallery,
}
"""By the name of the format: writes the example into a folder and returns its path."""
