"""Hostile weights, models, runs, and what is kept beside them."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import samples
from tests.faults.attack_parts import (
    LONG_NAME,
    LONG_NUMBER,
    NESTED_JSON,
    NESTED_PICKLE,
    Attack,
    Call,
    bytes_file,
    changed_json,
    hostile,
    inside,
    npy_claiming,
    text_file,
)


def _sealed_store(path: Path, name: str, data: bytes) -> Path:
    """Replaces a file of an embeddings store, and its digest too."""
    from arcface_jax.runtime import sealed

    (path / name).write_bytes(data)
    stored = sealed.read(path / "settings.json")
    stored["digests"][name] = sealed.digest(data)
    (path / "settings.json").write_text(sealed.seal(stored))
    return path


def _torch(content: Callable[[], Any], name: str = "") -> Attack:
    def attack(path: Path) -> Path:
        import torch

        torch.save(content(), path / name if name else path)
        return path

    return attack


def _state(**changed: Any) -> dict[Any, Any]:
    return {**samples.weights(), **changed}


def _expanded() -> Any:
    import torch

    return _state(**{"fc.weight": torch.ones(1).expand(32, 10**9)})


def _views() -> Any:
    import torch

    whole = torch.zeros(1 << 20)
    return {f"layer{n}.weight": whole[n:] for n in range(5000)}


def _sparse() -> Any:
    import torch

    return _state(**{"fc.weight": torch.eye(32).to_sparse()})


def _quantized() -> Any:
    import torch

    return _state(
        **{"fc.weight": torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.quint8)}
    )


def _meta() -> Any:
    import torch

    return _state(**{"fc.weight": torch.ones(4, 4, device="meta")})


def _integer_keys() -> Any:
    import torch

    return {0: torch.ones(2), 1: {2: torch.ones(3)}, (1, 2): 3, None: torch.ones(1)}


def _empty_and_huge() -> Any:
    import torch

    return _state(**{"fc.weight": torch.ones(0, 1 << 40)})


def _zip_bomb(path: Path) -> Path:
    """A torch archive whose members are compressed."""
    import zipfile

    members = {}
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, bytes(1 << 28) if name.endswith("data/0") else data)
    return path


def _safetensors(header: dict[str, Any], data: bytes = b"") -> Attack:
    head = json.dumps(header).encode()
    return bytes_file(struct.pack("<Q", len(head)) + head + data)


def _model(make: Callable[[], Any]) -> Attack:
    def attack(path: Path) -> Path:
        path.write_bytes(make().SerializeToString())
        return path

    return attack


def loop(trips: int, *, hidden: bool = False) -> Any:
    """A graph with a loop that does not end, at the top or in a branch."""
    import onnx
    from onnx import helper, numpy_helper

    number, boolean = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["goes"]),
            helper.make_node("Identity", ["y"], ["z"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("go", boolean, []),
            helper.make_tensor_value_info("y", number, None),
        ],
        [
            helper.make_tensor_value_info("goes", boolean, []),
            helper.make_tensor_value_info("z", number, None),
        ],
    )
    node = helper.make_node("Loop", ["trips", "true", "faces"], ["x"], body=body)
    if hidden:
        branch = helper.make_graph(
            [node], "branch", [], [helper.make_tensor_value_info("x", number, None)]
        )
        node = helper.make_node("If", ["true"], ["x"], then_branch=branch, else_branch=branch)
    constants = [
        numpy_helper.from_array(np.array(trips), "trips"),
        numpy_helper.from_array(np.array(True), "true"),
    ]
    return samples.graph(nodes=[node], weights=constants)


def tiled(shape: list[int], *, kind: str = "Tile") -> Any:
    """A graph that makes a giant of a face, or of nothing."""
    from onnx import helper, numpy_helper

    wanted = numpy_helper.from_array(np.array(shape, np.int64), "shape")
    if kind == "Tile":
        nodes = [helper.make_node("Tile", ["faces", "shape"], ["x"])]
    elif kind == "Resize":
        nodes = [helper.make_node("Resize", ["faces", "", "", "shape"], ["x"])]
    else:
        nodes = [
            helper.make_node("ConstantOfShape", ["shape"], ["much"]),
            helper.make_node("ReduceSum", ["much"], ["little"], keepdims=0),
            helper.make_node("Add", ["faces", "little"], ["x"]),
        ]
    return samples.graph(nodes=nodes, weights=[wanted])


def _tensor_claiming() -> Any:
    """An initializer whose dimensions are beyond its data."""
    model = samples.graph()
    model.graph.initializer[0].dims[:] = [1 << 31, 1 << 20]
    return model


def _outside() -> Any:
    """Weights in a file that is no weight file."""
    import onnx
    from onnx.external_data_helper import set_external_data

    model = samples.graph()
    tensor = model.graph.initializer[0]
    set_external_data(tensor, "../../../../../../../../etc/passwd", 0, 384)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    return model


def _onnx_deep() -> bytes:
    """Graphs in the attributes of graphs, which protobuf's own writer refuses."""

    def message(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(3000):
        graph = message(1, message(4, b"If") + message(5, message(6, graph)))
    return b"\x08\x08" + message(7, graph)


def _run_json(**changed: Any) -> Attack:
    def attack(path: Path) -> Path:
        changed_json(path / "config.json", **changed)
        shutil.rmtree(path / "checksums", ignore_errors=True)
        return path

    return attack


@hostile("workdir", "code")
def _() -> Iterator[Attack]:
    for name in ("this:Foo", "os:system", "subprocess:run", "json.tool:main"):
        yield _run_json(model__network=name)
        yield _run_json(evaluation__targets=[name])
        yield _run_json(data__path=f"{name}:touch CODE_RAN", evaluation__targets=["synthetic"])


@hostile("hub folder", "code")
def _() -> Iterator[Attack]:
    yield inside("config.json", lambda file: changed_json(file, network="this:Foo"))

    def cvlface(path: Path) -> Path:
        (path / "pretrained_model").mkdir()
        text = "color_space: !!python/object/apply:os.system ['touch CODE_RAN']\n"
        (path / "pretrained_model" / "model.yaml").write_text(text)
        return path

    yield cvlface


@hostile("torch .pth", "code")
def _() -> Iterator[Attack]:
    yield _torch(lambda: {"state_dict": Call(), **samples.weights()})
    yield _torch(lambda: Call())


@hostile("torch .pth", "claims")
def _() -> Iterator[Attack]:
    for content in (_sparse, _quantized, _meta, _integer_keys, _empty_and_huge):
        yield _torch(content)
    yield _torch(lambda: {"state_dict": {1: samples.weights()}})
    yield _torch(lambda: samples.weights()["bn1.weight"])


@hostile("torch .pth", "expansion")
def _() -> Iterator[Attack]:
    yield _torch(_expanded)
    yield _torch(_views)
    yield _zip_bomb

    def doubled(path: Path) -> Path:
        """Lists of two references to the list before."""
        inner: Any = []
        for _ in range(60):
            inner = [inner, inner]
        return _torch(lambda: {"a": inner, **samples.weights()})(path)

    yield doubled


@hostile("class centers", "expansion")
def _() -> Iterator[Attack]:
    import torch

    wide = torch.ones(1).expand(3, 10**9)
    yield _torch(lambda: {"weight": wide}, "softmax_fc_gpu_0.pt")


@hostile("class centers", "claims")
def _() -> Iterator[Attack]:
    for content in (_sparse, _quantized, _meta, _empty_and_huge):
        yield _torch(lambda make=content: {"weight": make()["fc.weight"]}, "softmax_fc_gpu_0.pt")
    yield _torch(_integer_keys, "softmax_fc_gpu_0.pt")

    def array(path: Path, shape: tuple[int, ...]) -> Path:
        (path / "centers.npy").write_bytes(npy_claiming(shape))
        return path / "centers.npy"

    for shape in ((10**10, 512), (2**62, 4), (-1, 4), (0, 10**12)):
        yield lambda path, shape=shape: array(path, shape)
    yield inside("softmax_fc_gpu_99999999.pt", lambda file: file.write_bytes(b"x"))
    yield inside(f"softmax_fc_gpu_{'9' * 200}.pt", lambda file: file.write_bytes(b"x"))


@hostile("safetensors", "claims")
def _() -> Iterator[Attack]:
    for shape, ends in (
        ([1 << 40, 1 << 20], [0, 8]),
        ([0, 1 << 62], [0, 0]),
        ([2], [0, 1 << 60]),
        ([2, 1], [8, 0]),
    ):
        header = {"fc.weight": {"dtype": "F32", "shape": shape, "data_offsets": ends}}
        yield _safetensors(header, bytes(8))
    for kind in ("F8_E4M3", "F64", "U64", "C64", "NONE"):
        header = {"fc.weight": {"dtype": kind, "shape": [1], "data_offsets": [0, 8]}}
        yield _safetensors(header, bytes(8))
    yield bytes_file(struct.pack("<Q", 1 << 62) + b"{}")


@hostile("safetensors", "nesting")
def _() -> Iterator[Attack]:
    yield bytes_file(struct.pack("<Q", len(NESTED_JSON)) + NESTED_JSON.encode())


@hostile("ONNX", "claims")
def _() -> Iterator[Attack]:
    for batch in (100_000, 2**31 - 1, 2**62, -5):
        yield _model(lambda batch=batch: samples.graph(batch=batch))
    yield _model(_tensor_claiming)
    yield _model(_outside)


@hostile("ONNX", "expansion")
def _() -> Iterator[Attack]:
    for hidden in (False, True):
        yield _model(lambda hidden=hidden: loop(2**62, hidden=hidden))
    yield _model(lambda: tiled([1, 1, 1000, 1000]))
    yield _model(lambda: tiled([40_000, 40_000], kind="ConstantOfShape"))
    yield _model(lambda: tiled([1, 3, 40_000, 40_000], kind="Resize"))


@hostile("ONNX", "nesting")
def _() -> Iterator[Attack]:
    yield bytes_file(_onnx_deep())


@hostile("workdir", "claims")
def _() -> Iterator[Attack]:
    yield _run_json(data__synthetic__pairs=2_000_000)
    yield _run_json(data__synthetic__pair_identities=2_000_000_000)
    yield _run_json(model__embedding_size=2_000_000_000)
    yield _run_json(model__network="r2060", model__embedding_size=512)
    yield _run_json(evaluation__targets=["synthetic"] * 1000)
    yield _run_json(devices=10**9)
    yield inside("config.json", lambda file: file.write_text(f'{{"seed": {LONG_NUMBER}}}'))


@hostile("calibration", "claims")
def _() -> Iterator[Attack]:
    yield lambda path: changed_json(path, threshold_cosine=10**400)
    yield lambda path: changed_json(path, threshold_cosine="0.3", model=3)
    yield text_file(f'{{"far": {LONG_NUMBER}}}')
    yield text_file("[]")


@hostile("embeddings", "claims")
def _() -> Iterator[Attack]:
    for shape in ((10**10, 512), (2**62, 8), (-1, 8), (0, 10**12)):
        yield lambda path, shape=shape: _sealed_store(
            path, "embeddings-00000.npy", npy_claiming(shape)
        )
    for text in ('{"ids": 3}', "[]", '{"ids": [1], "skipped": []}', f"[{LONG_NUMBER}]"):
        yield lambda path, text=text: _sealed_store(path, "ids-00000.json", text.encode())


@hostile("gallery", "claims")
def _() -> Iterator[Attack]:
    for shape in ((10**10, 512), (2**62, 8), (-1, 8)):
        yield inside(
            "embeddings.npy", lambda file, shape=shape: file.write_bytes(npy_claiming(shape))
        )
    for rows in (10**12, -4, 0):
        yield inside("gallery.json", lambda file, rows=rows: changed_json(file, rows=rows))
    for text in ("3", "[1, 2, 3, 4]", "{}", "null"):
        yield inside("names.json", lambda file, text=text: file.write_text(text))


@hostile("hub folder", "claims")
def _() -> Iterator[Attack]:
    yield inside("config.json", lambda file: changed_json(file, embedding_size=10**12))
    yield inside("config.json", lambda file: changed_json(file, network="r2060"))


@hostile("hub folder", "expansion")
def _() -> Iterator[Attack]:
    def laughs(path: Path) -> Path:
        lines = ["a0: &a0 [x, x]"]
        lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
        lines += ["input_size: *a59", "color_space: *a59"]
        (path / "pretrained_model").mkdir()
        (path / "pretrained_model" / "model.yaml").write_text("\n".join(lines))
        return path

    yield laughs


@hostile("hub folder", "nesting")
def _() -> Iterator[Attack]:
    def deep(path: Path) -> Path:
        (path / "pretrained_model").mkdir()
        (path / "pretrained_model" / "model.yaml").write_text("[" * 100_000)
        return path

    yield deep
    yield inside("config.json", lambda file: file.write_text(NESTED_JSON))


@hostile("torch .pth", "nesting")
def _() -> Iterator[Attack]:
    def pickled(path: Path) -> Path:
        import zipfile

        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", NESTED_PICKLE)
        return path

    yield pickled
    yield bytes_file(b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03." + NESTED_PICKLE)


@hostile("workdir", "names")
def _() -> Iterator[Attack]:
    for name in ("a\0b.bin", f"{LONG_NAME}.bin", "a\0b.txt:x", f"{LONG_NAME}.csv"):
        yield _run_json(evaluation__targets=[name])
        yield _run_json(data__path=name, evaluation__targets=["x.bin"])
