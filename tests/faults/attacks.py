"""Hostile files of every format: each a change of an honest example that `samples` makes.

An attack takes the path of the example, in a folder of its own, and returns the path to read.
"""

import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tests.faults import samples
from tests.faults.samples import IMAGES, LABELS

Attack = Callable[[Path], Path]

HUGE = 2_147_483_646  # the largest label that a 32-bit number counts classes of


# ---- Images ----------------------------------------------------------------------------------


def _jpeg(width: int, height: int) -> bytes:
    """822 bytes or so that announce a size."""
    data = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(1 << 24), 9)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _tiff(width: int, height: int) -> bytes:
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 5),  # LZW
        (262, 3, 1),
        (273, 4, 200),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, 16),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(216, b"\0")


def _encoded(suffix: str, old: bytes, new: bytes) -> bytes:
    """An image whose size, written as `old`, is replaced."""
    lossy = [cv2.IMWRITE_WEBP_QUALITY, 80] if suffix == ".webp" else []
    data = cv2.imencode(suffix, np.zeros((113, 119, 3), np.uint8), lossy)[1].tobytes()
    assert old in data[:64], suffix
    return data.replace(old, new, 1)


def bombs() -> dict[str, bytes]:
    """Small files that announce 30,000 x 30,000 pixels, or the most that their format can."""
    side = 30_000
    return {
        "JPEG": _jpeg(side, side),
        "PNG": _png(side, side),
        "TIFF": _tiff(side, side),
        "BMP": _encoded(".bmp", struct.pack("<ii", 119, 113), struct.pack("<ii", side, side)),
        "GIF": b"GIF89a"
        + struct.pack("<HHBBB", side, side, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, side, side, 0)
        + b"\x02\x02\x44\x01\x00;",
        "WebP": _encoded(".webp", struct.pack("<HH", 119, 113), struct.pack("<HH", 16383, 16383)),
        "PNM": b"P6\n%d %d\n255\n" % (side, side) + bytes(64),
        "JPEG 2000": _encoded(".jp2", struct.pack(">II", 113, 119), struct.pack(">II", side, side)),
        "Sun raster": struct.pack(">8I", 0x59A66A95, side, side, 24, 0, 1, 0, 0) + bytes(64),
        "HDR": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y %d +X %d\n" % (side, side) + bytes(64),
    }


def _bombs(put: Callable[[Path, bytes], Path]) -> Iterator[Attack]:
    for data in bombs().values():
        yield lambda path, data=data: put(path, data)


def _among_files(path: Path, data: bytes) -> Path:
    (path / "p0" / "0.jpg").write_bytes(data)
    return path


def _beside_list(path: Path, data: bytes) -> Path:
    (path.parent / "set" / "p0" / "0.jpg").write_bytes(data)
    return path


def records(path: Path, images: list[bytes], labels: list[Any], header: Any = (7, 10)) -> Path:
    """Writes the record file again."""
    from arcface_jax.data.recordio.reader import RecordWriter

    with RecordWriter(path) as writer:
        if header is not None:
            writer.write(0, b"", label=list(header))
        for key, (data, label) in enumerate(zip(images, labels, strict=True), start=1):
            writer.write(key, data, label=label)
        for identity in range(3 if header == (7, 10) else 0):
            writer.write(7 + identity, b"", label=[1, 2])
    return path


def _first(data: bytes) -> list[bytes]:
    return [data, *IMAGES[1:]]


def parquet(path: Path, table: Any, **options: Any) -> Path:
    """Writes the file again."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path, **options)
    return path


def arrow(path: Path, table: Any, **options: Any) -> Path:
    """Writes the folder again."""
    return samples.saved_to_disk(path.parent, table, **options)


def _tfds_with(path: Path, data: bytes) -> Path:
    """Another image in the first shard."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tfds.features.FeatureConnector.from_config(str(path))
    (shard, *_) = sorted(path.glob("*.array_record*"))
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for image in [data, *IMAGES[1:4]]:
        writer.write(features.serialize_example({"image": image, "label": 0}))
    writer.close()
    return path


def _lmdb_with(path: Path, data: bytes) -> Path:
    return samples.database(path, [(b"00000000", pickle.dumps((data, 0)))])


def _tar_with(path: Path, data: bytes) -> Path:
    return samples.tar(path, [("0.jpg", data), ("0.cls", b"0"), ("1.jpg", IMAGES[1])])


def _bin_with(path: Path, data: bytes) -> Path:
    path.write_bytes(pickle.dumps((_first(data), [True, False, True])))
    return path


# ---- Everything else, format by format ---------------------------------------------------------


def _json(path: Path, **changed: Any) -> Path:
    """Replaces fields, `a__b` for a field of a field, of a JSON file."""
    content = json.loads(path.read_text())
    for name, value in changed.items():
        place = content
        *parents, last = name.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))
    return path


def _inside(name: str, change: Callable[[Path], object]) -> Attack:
    """A change of a file in the example's folder."""

    def attack(path: Path) -> Path:
        change(path / name)
        return path

    return attack


def _text(text: str) -> Attack:
    def attack(path: Path) -> Path:
        path.write_text(text)
        return path

    return attack


def _bytes(data: bytes) -> Attack:
    def attack(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return attack


DEEP = 200_000
NESTED_JSON = '{"a":' * DEEP + "1" + "}" * DEEP
NESTED_PICKLE = b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."
CODE = b"cposix\nsystem\n(S'touch CODE_RAN'\ntR."
LONG_NUMBER = "9" * 10_000


class Call:
    """Pickled, it asks for a call."""

    def __reduce__(self):
        return os.system, ("touch CODE_RAN",)


def _tfds_json(**changed: Any) -> Attack:
    return _inside("features.json", lambda file: _json(file, **changed))


_LABEL = "featuresDict__features__label"


def _label_row(label: Any) -> list[Any]:
    return [*LABELS[:-1], label]


def _npy_claiming(shape: tuple[int, ...]) -> bytes:
    head = repr({"descr": "<f4", "fortran_order": False, "shape": shape}) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head.encode() + bytes(64)


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
    return _bytes(struct.pack("<Q", len(head)) + head + data)


def _model(make: Callable[[], Any]) -> Attack:
    def attack(path: Path) -> Path:
        path.write_bytes(make().SerializeToString())
        return path

    return attack


def _loop(trips: int, *, hidden: bool = False) -> Any:
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


def _tiled(shape: list[int], *, kind: str = "Tile") -> Any:
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
        _json(path / "config.json", **changed)
        shutil.rmtree(path / "checksums", ignore_errors=True)
        return path

    return attack


def _negative_size(path: Path) -> Path:
    """A tar member of -512 bytes, after which the reader would be where it was."""
    data = bytearray(path.read_bytes())
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    return path


def _pax_claim(path: Path) -> Path:
    """An extended header of 8 GiB."""
    head = bytearray(512)
    head[:8] = b"././@Pax"
    head[124:136] = b"77777777777\0"
    head[156:157] = b"x"
    head[257:265] = b"ustar\x0000"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    path.write_bytes(bytes(head) + path.read_bytes())
    return path


Variants = Callable[[], Iterator[Attack]]
SPECIAL: dict[tuple[str, str], Variants] = {}
"""By format and attack, beside what `GENERAL` has for all formats."""


def _of(kind: str, attack: str) -> Callable[[Variants], Variants]:
    def register(make: Variants) -> Variants:
        SPECIAL[kind, attack] = make
        return make

    return register


for _format, _put in {
    "folder": _among_files,
    "photos": _among_files,
    "list": _beside_list,
    "pair list": _beside_list,
    "RecordIO": lambda path, data: records(path, _first(data), LABELS),
    "Parquet": lambda path, data: parquet(path, samples.columns(_first(data), LABELS)),
    "Arrow": lambda path, data: arrow(path, samples.columns(_first(data), LABELS)),
    "TFDS": _tfds_with,
    "LMDB": _lmdb_with,
    "WebDataset": _tar_with,
    "pairs .bin": _bin_with,
}.items():
    SPECIAL[_format, "image bomb"] = lambda put=_put: _bombs(put)


@_of("TFDS", "code")
def _() -> Iterator[Attack]:
    for name in (
        "this.Foo",
        "this",
        "antigravity.x",
        "tensorflow_datasets.core.features.os.system",
    ):
        yield _tfds_json(pythonClassName=name)
        yield _tfds_json(**{f"{_LABEL}__pythonClassName": name})
        yield _inside("dataset_info.json", lambda file, n=name: _json(file, moduleName=n))


@_of("workdir", "code")
def _() -> Iterator[Attack]:
    for name in ("this:Foo", "os:system", "subprocess:run", "json.tool:main"):
        yield _run_json(model__network=name)
        yield _run_json(evaluation__targets=[name])
        yield _run_json(data__path=f"{name}:touch CODE_RAN", evaluation__targets=["synthetic"])


@_of("hub folder", "code")
def _() -> Iterator[Attack]:
    yield _inside("config.json", lambda file: _json(file, network="this:Foo"))

    def cvlface(path: Path) -> Path:
        (path / "pretrained_model").mkdir()
        text = "color_space: !!python/object/apply:os.system ['touch CODE_RAN']\n"
        (path / "pretrained_model" / "model.yaml").write_text(text)
        return path

    yield cvlface


@_of("torch .pth", "code")
def _() -> Iterator[Attack]:
    yield _torch(lambda: {"state_dict": Call(), **samples.weights()})
    yield _torch(lambda: Call())


@_of("LMDB", "code")
def _() -> Iterator[Attack]:
    yield lambda path: samples.database(path, [(b"0", pickle.dumps(Call()))])
    yield lambda path: samples.database(path, [(b"__keys__", CODE)])


@_of("pairs .bin", "code")
def _() -> Iterator[Attack]:
    yield _bytes(pickle.dumps((IMAGES, Call())))


@_of("Parquet", "code")
def _() -> Iterator[Attack]:
    named = {"huggingface": json.dumps({"info": {"features": {"label": {"_type": "this.Foo"}}}})}
    yield lambda path: parquet(path, samples.columns(IMAGES, LABELS).replace_schema_metadata(named))


@_of("list", "claims")
def _() -> Iterator[Attack]:
    lines = [f"set/p{label}/{number}.jpg,{label}\n" for number, label in enumerate(LABELS)]
    for label in (HUGE, 20_000_000, LONG_NUMBER, f"0{LONG_NUMBER}", "1e400", "-1", "nan"):
        yield _text("".join(lines[:-1]) + f"set/p2/5.jpg,{label}\n")
    for name in (LONG_NUMBER, str(HUGE), "17000000"):
        yield lambda path, name=name: _beside(path, f"{name}\tx\n")


def _beside(path: Path, text: str) -> Path:
    (path.parent / "identities.txt").write_text(text)
    return path


@_of("RecordIO", "claims")
def _() -> Iterator[Attack]:
    yield lambda path: records(path, IMAGES, LABELS, header=(7, 16_777_215))
    yield lambda path: records(path, IMAGES, LABELS, header=(7, float("inf")))
    yield lambda path: records(path, IMAGES, LABELS, header=(float("nan"), 9))
    for label in (HUGE, 20_000_000, 1e38, float("nan"), -1):
        yield lambda path, label=label: records(path, IMAGES, _label_row(label), header=None)
    for line in (f"{2**62}\t0\n", f"0\t{2**62}\n", f"{LONG_NUMBER}\t0\n", "0\t-8\n", "1\t3\n"):
        yield lambda path, line=line: _index_line(path, line)
    yield lambda path: _patched(path, 4, struct.pack("<I", 2**29 - 1))
    yield lambda path: _patched(path, 8, struct.pack("<I", 2**32 - 1))


def _index_line(path: Path, line: str) -> Path:
    index = path.with_suffix(".idx")
    index.write_text(index.read_text() + line)
    return path


def _patched(path: Path, at: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)
    return path


@_of("RecordIO", "expansion")
def _() -> Iterator[Attack]:
    def same_record(path: Path) -> Path:
        """An index whose hundred thousand keys point to one record."""
        path.with_suffix(".idx").write_text("".join(f"{key}\t72\n" for key in range(100_000)))
        return path

    yield same_record


def _rows(count: int, size: int) -> Any:
    import pyarrow

    data = bytes(size)
    images = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.zeros(count, np.int32)), pyarrow.array([data], pyarrow.binary())
    )
    return images, pyarrow.array(np.zeros(count, np.int64))


def _repeated(path: Path, count: int, size: int, **options: Any) -> Path:
    """One image in many rows of a column that is stored as a dictionary."""
    import pyarrow

    images, labels = _rows(count, size)
    table = pyarrow.table({"image": images.cast(pyarrow.binary()), "label": labels})
    return parquet(path, table, **options)


@_of("Parquet", "expansion")
def _() -> Iterator[Attack]:
    yield lambda path: _repeated(path, 300, 1 << 20, compression="zstd")
    yield lambda path: _repeated(path, 1 << 21, 4, compression="zstd")
    yield lambda path: _wide(path)


def _wide(path: Path) -> Path:
    """Few rows of 300 MB of zeros each, no dictionary."""
    import pyarrow

    table = pyarrow.table(
        {"image": pyarrow.array([bytes(300_000_000)] * 5, pyarrow.binary()), "label": [0] * 5}
    )
    return parquet(path, table, compression="zstd", use_dictionary=False)


@_of("Parquet", "claims")
def _() -> Iterator[Attack]:
    for label in (HUGE, 20_000_000, 2**62):
        yield lambda path, label=label: parquet(path, samples.columns(IMAGES, _label_row(label)))
    yield lambda path: _duplicate_columns(path)


def _duplicate_columns(path: Path) -> Path:
    import pyarrow

    images = pyarrow.array(IMAGES, pyarrow.binary())
    labels = pyarrow.array(LABELS)
    table = pyarrow.Table.from_arrays(
        [images, labels, labels, images], names=["image", "label", "label", "image"]
    )
    return parquet(path, table)


@_of("Arrow", "claims")
def _() -> Iterator[Attack]:
    for label in (HUGE, 20_000_000, 2**62):
        yield lambda path, label=label: arrow(path, samples.columns(IMAGES, _label_row(label)))

    def duplicate(path: Path) -> Path:
        import pyarrow

        labels = pyarrow.array(LABELS)
        images = pyarrow.array(IMAGES, pyarrow.binary())
        table = pyarrow.Table.from_arrays(
            [images, labels, labels], names=["image", "label", "label"]
        )
        return arrow(path, table)

    yield duplicate
    for content in ({"_data_files": 3}, {"_data_files": [{"filename": 3}]}, {"_data_files": [1]}):
        yield _inside("state.json", lambda file, x=content: file.write_text(json.dumps(x)))
    for content in ({"splits": 3}, {"splits": [3]}, {"splits": {"a": 1}}, []):
        yield _inside("dataset_dict.json", lambda file, x=content: file.write_text(json.dumps(x)))


@_of("Arrow", "expansion")
def _() -> Iterator[Attack]:
    def compressed(path: Path) -> Path:
        import pyarrow

        table = pyarrow.table(
            {"image": pyarrow.array([bytes(300_000_000)] * 5, pyarrow.binary()), "label": [0] * 5}
        )
        return arrow(path, table, compression="zstd")

    def run_ends(path: Path) -> Path:
        import pyarrow

        count = 1 << 30
        labels = pyarrow.RunEndEncodedArray.from_arrays([count], pyarrow.array([1]))
        nulls = pyarrow.nulls(count)
        return arrow(path, pyarrow.table({"image": nulls, "label": labels}))

    yield compressed
    yield run_ends


@_of("TFDS", "claims")
def _() -> Iterator[Attack]:
    counts = (f"{HUGE}", "20000000", "-1", LONG_NUMBER)
    for count in counts:
        yield _tfds_json(**{f"{_LABEL}__classLabel": {"numClasses": count}})
        yield _inside(
            "dataset_info.json",
            lambda file, n=count: file.write_text(
                file.read_text().replace('"shardLengths"', '"x"').replace('"4"', f'"{n}"')
            ),
        )
    yield _tfds_json(**{f"{_LABEL}__classLabel": {}})


@_of("LMDB", "claims")
def _() -> Iterator[Attack]:
    for label in (HUGE, 20_000_000, 2**62, 10**400):
        yield lambda path, label=label: samples.database(
            path, [(b"0", pickle.dumps((IMAGES[0], 0))), (b"1", pickle.dumps((IMAGES[1], label)))]
        )
    for count in (b"16777215", b"9" * 5000, pickle.dumps(2**70)):
        yield lambda path, count=count: samples.database(
            path, [(b"0", pickle.dumps((IMAGES[0], 0))), (b"__classnum__", count)]
        )
    yield lambda path: samples.database(path, [(b"0", b"\xdd\xff\xff\xff\xff")])
    yield lambda path: samples.database(
        path, [(b"0", b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b".")]
    )


@_of("WebDataset", "claims")
def _() -> Iterator[Attack]:
    for label in (str(HUGE), "20000000", LONG_NUMBER, "[1]", "{}", "nan", "1e999"):
        for suffix in ("cls", "json"):
            files = [("0.jpg", IMAGES[0]), (f"0.{suffix}", b"0")]
            files += [("1.jpg", IMAGES[1]), (f"1.{suffix}", label.encode())]
            yield lambda path, files=files: samples.tar(path, files)
    yield _negative_size
    yield _pax_claim
    yield lambda path: _patched(path, 124, b"77777777777\0")


@_of("pairs .bin", "expansion")
def _() -> Iterator[Attack]:
    def shared(path: Path) -> Path:
        """One image that all pairs refer to."""
        path.write_bytes(pickle.dumps(([IMAGES[0]] * 120_000, [True] * 60_000)))
        return path

    yield shared


@_of("pairs .bin", "claims")
def _() -> Iterator[Attack]:
    for data in (
        b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**34) + b"x.",
        b"\x80\x02cbuiltins\nbytes\nI9999999999\n\x85R]I01\na\x86.",
        b"cnumpy\nndarray\n(I9999999999\ntR.",
        b"I" + LONG_NUMBER.encode() + b"\n.",
        pickle.dumps(([IMAGES[0]] * 2, [10**400])),
        pickle.dumps(np.zeros((4, 4))),
    ):
        yield _bytes(data)


@_of("pair list", "expansion")
def _() -> Iterator[Attack]:
    yield _text("set/p0/0.jpg,set/p0/1.jpg,1\n" * 100_000)


@_of("pair list", "claims")
def _() -> Iterator[Attack]:
    yield _text(f"{LONG_NUMBER}\nset/p0/0 1 2\n")
    yield _text(f"10 {LONG_NUMBER}\np0 1 2\np0 1 p1 2\n")
    yield _text(f"p0 {LONG_NUMBER} 2\n")


@_of("list", "expansion")
def _() -> Iterator[Attack]:
    yield _text("set/p0/0.jpg,0\n" * 200_000)


@_of("five points", "claims")
def _() -> Iterator[Attack]:
    number = [[LONG_NUMBER, 1]] * 5
    yield _text(json.dumps({"a.jpg": number}))
    yield _text(f'{{"a.jpg": [[{LONG_NUMBER}, 1]]}}')
    yield _text(json.dumps({"a.jpg": [[[1]] * 3, {}]}))


@_of("torch .pth", "claims")
def _() -> Iterator[Attack]:
    for content in (_sparse, _quantized, _meta, _integer_keys, _empty_and_huge):
        yield _torch(content)
    yield _torch(lambda: {"state_dict": {1: samples.weights()}})
    yield _torch(lambda: samples.weights()["bn1.weight"])


@_of("torch .pth", "expansion")
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


@_of("class centers", "expansion")
def _() -> Iterator[Attack]:
    import torch

    wide = torch.ones(1).expand(3, 10**9)
    yield _torch(lambda: {"weight": wide}, "softmax_fc_gpu_0.pt")


@_of("class centers", "claims")
def _() -> Iterator[Attack]:
    for content in (_sparse, _quantized, _meta, _empty_and_huge):
        yield _torch(lambda make=content: {"weight": make()["fc.weight"]}, "softmax_fc_gpu_0.pt")
    yield _torch(_integer_keys, "softmax_fc_gpu_0.pt")

    def array(path: Path, shape: tuple[int, ...]) -> Path:
        (path / "centers.npy").write_bytes(_npy_claiming(shape))
        return path / "centers.npy"

    for shape in ((10**10, 512), (2**62, 4), (-1, 4), (0, 10**12)):
        yield lambda path, shape=shape: array(path, shape)
    yield _inside("softmax_fc_gpu_99999999.pt", lambda file: file.write_bytes(b"x"))
    yield _inside(f"softmax_fc_gpu_{'9' * 200}.pt", lambda file: file.write_bytes(b"x"))


@_of("safetensors", "claims")
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
    yield _bytes(struct.pack("<Q", 1 << 62) + b"{}")


@_of("safetensors", "nesting")
def _() -> Iterator[Attack]:
    yield _bytes(struct.pack("<Q", len(NESTED_JSON)) + NESTED_JSON.encode())


@_of("ONNX", "claims")
def _() -> Iterator[Attack]:
    for batch in (100_000, 2**31 - 1, 2**62, -5):
        yield _model(lambda batch=batch: samples.graph(batch=batch))
    yield _model(_tensor_claiming)
    yield _model(_outside)


@_of("ONNX", "expansion")
def _() -> Iterator[Attack]:
    for hidden in (False, True):
        yield _model(lambda hidden=hidden: _loop(2**62, hidden=hidden))
    yield _model(lambda: _tiled([1, 1, 1000, 1000]))
    yield _model(lambda: _tiled([40_000, 40_000], kind="ConstantOfShape"))
    yield _model(lambda: _tiled([1, 3, 40_000, 40_000], kind="Resize"))


@_of("ONNX", "nesting")
def _() -> Iterator[Attack]:
    yield _bytes(_onnx_deep())


@_of("workdir", "claims")
def _() -> Iterator[Attack]:
    yield _run_json(data__synthetic__pairs=2_000_000)
    yield _run_json(data__synthetic__pair_identities=2_000_000_000)
    yield _run_json(model__embedding_size=2_000_000_000)
    yield _run_json(model__network="r2060", model__embedding_size=512)
    yield _run_json(evaluation__targets=["synthetic"] * 1000)
    yield _run_json(devices=10**9)
    yield _inside("config.json", lambda file: file.write_text(f'{{"seed": {LONG_NUMBER}}}'))


@_of("calibration", "claims")
def _() -> Iterator[Attack]:
    yield lambda path: _json(path, threshold_cosine=10**400)
    yield lambda path: _json(path, threshold_cosine="0.3", model=3)
    yield _text(f'{{"far": {LONG_NUMBER}}}')
    yield _text("[]")


@_of("embeddings", "claims")
def _() -> Iterator[Attack]:
    for shape in ((10**10, 512), (2**62, 8), (-1, 8), (0, 10**12)):
        yield lambda path, shape=shape: _sealed_store(
            path, "embeddings-00000.npy", _npy_claiming(shape)
        )
    for text in ('{"ids": 3}', "[]", '{"ids": [1], "skipped": []}', f"[{LONG_NUMBER}]"):
        yield lambda path, text=text: _sealed_store(path, "ids-00000.json", text.encode())


@_of("gallery", "claims")
def _() -> Iterator[Attack]:
    for shape in ((10**10, 512), (2**62, 8), (-1, 8)):
        yield _inside(
            "embeddings.npy", lambda file, shape=shape: file.write_bytes(_npy_claiming(shape))
        )
    for rows in (10**12, -4, 0):
        yield _inside("gallery.json", lambda file, rows=rows: _json(file, rows=rows))
    for text in ("3", "[1, 2, 3, 4]", "{}", "null"):
        yield _inside("names.json", lambda file, text=text: file.write_text(text))


@_of("hub folder", "claims")
def _() -> Iterator[Attack]:
    yield _inside("config.json", lambda file: _json(file, embedding_size=10**12))
    yield _inside("config.json", lambda file: _json(file, network="r2060"))


@_of("hub folder", "expansion")
def _() -> Iterator[Attack]:
    def laughs(path: Path) -> Path:
        lines = ["a0: &a0 [x, x]"]
        lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
        lines += ["input_size: *a59", "color_space: *a59"]
        (path / "pretrained_model").mkdir()
        (path / "pretrained_model" / "model.yaml").write_text("\n".join(lines))
        return path

    yield laughs


@_of("hub folder", "nesting")
def _() -> Iterator[Attack]:
    def deep(path: Path) -> Path:
        (path / "pretrained_model").mkdir()
        (path / "pretrained_model" / "model.yaml").write_text("[" * 100_000)
        return path

    yield deep
    yield _inside("config.json", lambda file: file.write_text(NESTED_JSON))


@_of("torch .pth", "nesting")
def _() -> Iterator[Attack]:
    def pickled(path: Path) -> Path:
        import zipfile

        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", NESTED_PICKLE)
        return path

    yield pickled
    yield _bytes(b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03." + NESTED_PICKLE)


@_of("pairs .bin", "nesting")
def _() -> Iterator[Attack]:
    yield _bytes(NESTED_PICKLE)
    yield _bytes(b"\x80\x02" + b"(" * DEEP + b"t" * DEEP + b".")


@_of("LMDB", "nesting")
def _() -> Iterator[Attack]:
    yield lambda path: samples.database(path, [(b"0", NESTED_PICKLE), (b"1", IMAGES[0])])
    yield lambda path: samples.database(path, [(b"0", b"\x91" * 100_000)])


@_of("WebDataset", "nesting")
def _() -> Iterator[Attack]:
    yield lambda path: samples.tar(path, [("0.jpg", IMAGES[0]), ("0.json", NESTED_JSON.encode())])
    yield lambda path: samples.tar(path, [("a/" * 20_000 + "0.jpg", IMAGES[0])])


@_of("Parquet", "nesting")
def _() -> Iterator[Attack]:
    deep = {"huggingface": NESTED_JSON}
    yield lambda path: parquet(path, samples.columns(IMAGES, LABELS).replace_schema_metadata(deep))


@_of("Arrow", "nesting")
def _() -> Iterator[Attack]:
    deep = {"huggingface": NESTED_JSON}
    yield lambda path: arrow(path, samples.columns(IMAGES, LABELS).replace_schema_metadata(deep))


def _nested_folders(path: Path, *, name: str, depth: int) -> Path:
    """Sub-folders nested so deep that Python's stack, or the length of a path, does not suffice."""
    os.chdir(path / "p0")  # a path to them all would be too long for the system
    for _ in range(depth):
        os.mkdir(name)
        os.chdir(name)
    Path("0.jpg").write_bytes(IMAGES[0])
    return path


@_of("folder", "nesting")
@_of("photos", "nesting")
def _() -> Iterator[Attack]:
    yield lambda path: _nested_folders(path, name="d", depth=1800)
    yield lambda path: _nested_folders(path, name="d" * 9, depth=700)


@_of("folder", "expansion")
@_of("photos", "expansion")
def _() -> Iterator[Attack]:
    def links(path: Path) -> Path:
        """Folders each with two links to the next: 2^40 ways to the last."""
        for number in range(40):
            inner = path / f"p0/l{number}"
            inner.mkdir()
            (inner / "0.jpg").write_bytes(IMAGES[0])
            for name in ("a", "b"):
                (inner / name).symlink_to(path / f"p0/l{number + 1}")
        (path / "p0/l40").mkdir()
        return path

    yield links


LONG_NAME = "n" * 5000
_NAMES = ("a\0b.jpg", f"{LONG_NAME}.jpg", "/dev/zero", "../" * 2000 + "x.jpg", "\udcff.jpg")


@_of("list", "names")
def _() -> Iterator[Attack]:
    line = "set/p0/0.jpg,0\nset/p1/3.jpg,1\n"
    for name in _NAMES:
        yield lambda path, name=name: _raw(path, f"{line}{name},1\n")
    yield _text(line + "set/p2/4.jpg," + "x" * 200_000 + "\n")
    yield _text(line + "x" * 200_000 + ".jpg,2\n")
    yield _text(line + '"' + "x" * 200_000 + '.jpg",2\n')


def _raw(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


@_of("pair list", "names")
def _() -> Iterator[Attack]:
    line = "set/p0/0.jpg,set/p0/1.jpg,1\n"
    for name in _NAMES:
        yield lambda path, name=name: _raw(path, f"{line}{name},set/p0/1.jpg,0\n")
    yield _text(line + "x" * 200_000 + ".jpg,set/p0/0.jpg,0\n")
    yield _text("p0\t1\t2\n" + "x" * 5000 + "\t1\t2\n")


@_of("five points", "names")
def _() -> Iterator[Attack]:
    def csv(path: Path) -> Path:
        other = path.with_suffix(".csv")
        other.write_text("x" * 200_000 + ".jpg" + ",1" * 10 + "\n")
        return other

    yield csv


@_of("Parquet", "names")
def _() -> Iterator[Attack]:
    import pyarrow

    for name in _NAMES[:4]:
        rows = [{"bytes": None, "path": name}, {"bytes": IMAGES[0], "path": None}]
        table = pyarrow.table({"image": rows, "label": [0, 1]})
        yield lambda path, table=table: parquet(path, table)


@_of("Arrow", "names")
def _() -> Iterator[Attack]:
    import pyarrow

    for name in _NAMES[:4]:
        rows = [{"bytes": None, "path": name}, {"bytes": IMAGES[0], "path": None}]
        table = pyarrow.table({"image": rows, "label": [0, 1]})
        yield lambda path, table=table: arrow(path, table)
        content = json.dumps({"_data_files": [{"filename": name}]})
        yield _inside("state.json", lambda file, x=content: file.write_text(x))
        content = json.dumps({"splits": [name]})
        yield _inside("dataset_dict.json", lambda file, x=content: file.write_text(x))


@_of("LMDB", "names")
def _() -> Iterator[Attack]:
    key = b"\0\xff\n" + b"k" * 500
    yield lambda path: samples.database(path, [(key, IMAGES[0]), (b"a/b\0", IMAGES[1])])


@_of("WebDataset", "names")
def _() -> Iterator[Attack]:
    for name in (f"{LONG_NAME}.jpg", "a\nb.jpg", "\x1b[31m.jpg", "/etc/passwd.jpg"):
        yield lambda path, name=name: samples.tar(path, [(name, IMAGES[0])])


@_of("RecordIO", "names")
def _() -> Iterator[Attack]:
    yield lambda path: _beside(path, "0\ta\0b\n1\t" + LONG_NAME + "\n2\t\x1b[31m\n")


@_of("workdir", "names")
def _() -> Iterator[Attack]:
    for name in ("a\0b.bin", f"{LONG_NAME}.bin", "a\0b.txt:x", f"{LONG_NAME}.csv"):
        yield _run_json(evaluation__targets=[name])
        yield _run_json(data__path=name, evaluation__targets=["x.bin"])


# ---- What every format can be given ----------------------------------------------------------


def _files(path: Path) -> list[Path]:
    """The example's files, relative to the folder that it lies in; of many alike the first."""
    top = path.parent
    found = sorted(file for file in top.rglob("*") if file.is_file())
    kinds = {
        (file.parent.name if file.parent.name == "d" else "", file.suffix, file.name[:9]): file
        for file in found
    }
    images = [file for file in kinds.values() if file.suffix == ".jpg"][:1]
    return [file for file in kinds.values() if file.suffix != ".jpg"] + images


def _each_file(change: Callable[[Path], object]) -> Callable[[Path], Iterator[Attack]]:
    def make(example: Path) -> Iterator[Attack]:
        for file in _files(example):
            name = file.relative_to(example.parent)

            def attack(path: Path, name: Path = name) -> Path:
                change(path.parent / name)
                return path

            yield attack

    return make


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _bad_paths(example: Path) -> Iterator[Attack]:
    for name in ("a\0b", LONG_NAME, "n" * 252):
        yield lambda path, name=name: path.with_name(f"{name}{example.suffix}")


def _nested_json(file: Path) -> None:
    if file.suffix in (".json", ".yaml"):
        file.write_text(NESTED_JSON)


GENERAL: dict[str, Callable[[Path], Iterator[Attack]]] = {
    "code": _each_file(lambda file: file.write_bytes(CODE)),
    "names": _bad_paths,
    "nesting": _each_file(_nested_json),
    "pipe": _each_file(_pipe),
    "device": _each_file(_device),
    "empty": _each_file(lambda file: file.write_bytes(b"")),
    "cut": _each_file(_cut),
}

NAMES = (
    *("code", "image bomb", "claims", "expansion", "nesting", "names", "pipe", "device"),
    *("empty", "cut"),
)
"""Of all attacks, in the order of the table."""


def variants(kind: str, attack: str, example: Path) -> Iterator[Attack]:
    """The hostile files of a format and an attack; none where the format has no place for it."""
    if attack in GENERAL:
        yield from GENERAL[attack](example)
    if (kind, attack) in SPECIAL:
        yield from SPECIAL[kind, attack]()
