"""Hostile training sets, verification sets and lists."""

import json
import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import samples
from tests.faults.attack_images import with_each_bomb
from tests.faults.attack_parts import (
    CODE,
    DEEP,
    HUGE,
    LONG_NAME,
    LONG_NUMBER,
    NESTED_JSON,
    NESTED_PICKLE,
    SPECIAL,
    Attack,
    Call,
    bytes_file,
    changed_json,
    hostile,
    inside,
    patched,
    text_file,
)
from tests.faults.samples import IMAGES, LABELS


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


def _tfds_json(**changed: Any) -> Attack:
    return inside("features.json", lambda file: changed_json(file, **changed))


_LABEL = "featuresDict__features__label"


def _label_row(label: Any) -> list[Any]:
    return [*LABELS[:-1], label]


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
    SPECIAL[_format, "image bomb"] = lambda put=_put: with_each_bomb(put)


@hostile("TFDS", "code")
def _() -> Iterator[Attack]:
    for name in (
        "this.Foo",
        "this",
        "antigravity.x",
        "tensorflow_datasets.core.features.os.system",
    ):
        yield _tfds_json(pythonClassName=name)
        yield _tfds_json(**{f"{_LABEL}__pythonClassName": name})
        yield inside("dataset_info.json", lambda file, n=name: changed_json(file, moduleName=n))


@hostile("LMDB", "code")
def _() -> Iterator[Attack]:
    yield lambda path: samples.database(path, [(b"0", pickle.dumps(Call()))])
    yield lambda path: samples.database(path, [(b"__keys__", CODE)])


@hostile("pairs .bin", "code")
def _() -> Iterator[Attack]:
    yield bytes_file(pickle.dumps((IMAGES, Call())))


@hostile("Parquet", "code")
def _() -> Iterator[Attack]:
    named = {"huggingface": json.dumps({"info": {"features": {"label": {"_type": "this.Foo"}}}})}
    yield lambda path: parquet(path, samples.columns(IMAGES, LABELS).replace_schema_metadata(named))


@hostile("list", "claims")
def _() -> Iterator[Attack]:
    lines = [f"set/p{label}/{number}.jpg,{label}\n" for number, label in enumerate(LABELS)]
    for label in (HUGE, 20_000_000, LONG_NUMBER, f"0{LONG_NUMBER}", "1e400", "-1", "nan"):
        yield text_file("".join(lines[:-1]) + f"set/p2/5.jpg,{label}\n")
    for name in (LONG_NUMBER, str(HUGE), "17000000"):
        yield lambda path, name=name: _beside(path, f"{name}\tx\n")


def _beside(path: Path, text: str) -> Path:
    (path.parent / "identities.txt").write_text(text)
    return path


@hostile("RecordIO", "claims")
def _() -> Iterator[Attack]:
    yield lambda path: records(path, IMAGES, LABELS, header=(7, 16_777_215))
    yield lambda path: records(path, IMAGES, LABELS, header=(7, float("inf")))
    yield lambda path: records(path, IMAGES, LABELS, header=(float("nan"), 9))
    for label in (HUGE, 20_000_000, 1e38, float("nan"), -1):
        yield lambda path, label=label: records(path, IMAGES, _label_row(label), header=None)
    for line in (f"{2**62}\t0\n", f"0\t{2**62}\n", f"{LONG_NUMBER}\t0\n", "0\t-8\n", "1\t3\n"):
        yield lambda path, line=line: _index_line(path, line)
    yield lambda path: patched(path, 4, struct.pack("<I", 2**29 - 1))
    yield lambda path: patched(path, 8, struct.pack("<I", 2**32 - 1))


def _index_line(path: Path, line: str) -> Path:
    index = path.with_suffix(".idx")
    index.write_text(index.read_text() + line)
    return path


@hostile("RecordIO", "expansion")
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


@hostile("Parquet", "expansion")
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


@hostile("Parquet", "claims")
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


@hostile("Arrow", "claims")
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
        yield inside("state.json", lambda file, x=content: file.write_text(json.dumps(x)))
    for content in ({"splits": 3}, {"splits": [3]}, {"splits": {"a": 1}}, []):
        yield inside("dataset_dict.json", lambda file, x=content: file.write_text(json.dumps(x)))


@hostile("Arrow", "expansion")
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


@hostile("TFDS", "claims")
def _() -> Iterator[Attack]:
    counts = (f"{HUGE}", "20000000", "-1", LONG_NUMBER)
    for count in counts:
        yield _tfds_json(**{f"{_LABEL}__classLabel": {"numClasses": count}})
        yield inside(
            "dataset_info.json",
            lambda file, n=count: file.write_text(
                file.read_text().replace('"shardLengths"', '"x"').replace('"4"', f'"{n}"')
            ),
        )
    yield _tfds_json(**{f"{_LABEL}__classLabel": {}})


@hostile("LMDB", "claims")
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


@hostile("WebDataset", "claims")
def _() -> Iterator[Attack]:
    for label in (str(HUGE), "20000000", LONG_NUMBER, "[1]", "{}", "nan", "1e999"):
        for suffix in ("cls", "json"):
            files = [("0.jpg", IMAGES[0]), (f"0.{suffix}", b"0")]
            files += [("1.jpg", IMAGES[1]), (f"1.{suffix}", label.encode())]
            yield lambda path, files=files: samples.tar(path, files)
    yield _negative_size
    yield _pax_claim
    yield lambda path: patched(path, 124, b"77777777777\0")


@hostile("pairs .bin", "expansion")
def _() -> Iterator[Attack]:
    def shared(path: Path) -> Path:
        """One image that all pairs refer to."""
        path.write_bytes(pickle.dumps(([IMAGES[0]] * 120_000, [True] * 60_000)))
        return path

    yield shared


@hostile("pairs .bin", "claims")
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
        yield bytes_file(data)


@hostile("pair list", "expansion")
def _() -> Iterator[Attack]:
    yield text_file("set/p0/0.jpg,set/p0/1.jpg,1\n" * 100_000)


@hostile("pair list", "claims")
def _() -> Iterator[Attack]:
    yield text_file(f"{LONG_NUMBER}\nset/p0/0 1 2\n")
    yield text_file(f"10 {LONG_NUMBER}\np0 1 2\np0 1 p1 2\n")
    yield text_file(f"p0 {LONG_NUMBER} 2\n")


@hostile("list", "expansion")
def _() -> Iterator[Attack]:
    yield text_file("set/p0/0.jpg,0\n" * 200_000)


@hostile("five points", "claims")
def _() -> Iterator[Attack]:
    number = [[LONG_NUMBER, 1]] * 5
    yield text_file(json.dumps({"a.jpg": number}))
    yield text_file(f'{{"a.jpg": [[{LONG_NUMBER}, 1]]}}')
    yield text_file(json.dumps({"a.jpg": [[[1]] * 3, {}]}))


@hostile("pairs .bin", "nesting")
def _() -> Iterator[Attack]:
    yield bytes_file(NESTED_PICKLE)
    yield bytes_file(b"\x80\x02" + b"(" * DEEP + b"t" * DEEP + b".")


@hostile("LMDB", "nesting")
def _() -> Iterator[Attack]:
    yield lambda path: samples.database(path, [(b"0", NESTED_PICKLE), (b"1", IMAGES[0])])
    yield lambda path: samples.database(path, [(b"0", b"\x91" * 100_000)])


@hostile("WebDataset", "nesting")
def _() -> Iterator[Attack]:
    yield lambda path: samples.tar(path, [("0.jpg", IMAGES[0]), ("0.json", NESTED_JSON.encode())])
    yield lambda path: samples.tar(path, [("a/" * 20_000 + "0.jpg", IMAGES[0])])


@hostile("Parquet", "nesting")
def _() -> Iterator[Attack]:
    deep = {"huggingface": NESTED_JSON}
    yield lambda path: parquet(path, samples.columns(IMAGES, LABELS).replace_schema_metadata(deep))


@hostile("Arrow", "nesting")
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


@hostile("folder", "nesting")
@hostile("photos", "nesting")
def _() -> Iterator[Attack]:
    yield lambda path: _nested_folders(path, name="d", depth=1800)
    yield lambda path: _nested_folders(path, name="d" * 9, depth=700)


@hostile("folder", "expansion")
@hostile("photos", "expansion")
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


_NAMES = ("a\0b.jpg", f"{LONG_NAME}.jpg", "/dev/zero", "../" * 2000 + "x.jpg", "\udcff.jpg")


@hostile("list", "names")
def _() -> Iterator[Attack]:
    line = "set/p0/0.jpg,0\nset/p1/3.jpg,1\n"
    for name in _NAMES:
        yield lambda path, name=name: _raw(path, f"{line}{name},1\n")
    yield text_file(line + "set/p2/4.jpg," + "x" * 200_000 + "\n")
    yield text_file(line + "x" * 200_000 + ".jpg,2\n")
    yield text_file(line + '"' + "x" * 200_000 + '.jpg",2\n')


def _raw(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


@hostile("pair list", "names")
def _() -> Iterator[Attack]:
    line = "set/p0/0.jpg,set/p0/1.jpg,1\n"
    for name in _NAMES:
        yield lambda path, name=name: _raw(path, f"{line}{name},set/p0/1.jpg,0\n")
    yield text_file(line + "x" * 200_000 + ".jpg,set/p0/0.jpg,0\n")
    yield text_file("p0\t1\t2\n" + "x" * 5000 + "\t1\t2\n")


@hostile("five points", "names")
def _() -> Iterator[Attack]:
    def csv(path: Path) -> Path:
        other = path.with_suffix(".csv")
        other.write_text("x" * 200_000 + ".jpg" + ",1" * 10 + "\n")
        return other

    yield csv


@hostile("Parquet", "names")
def _() -> Iterator[Attack]:
    import pyarrow

    for name in _NAMES[:4]:
        rows = [{"bytes": None, "path": name}, {"bytes": IMAGES[0], "path": None}]
        table = pyarrow.table({"image": rows, "label": [0, 1]})
        yield lambda path, table=table: parquet(path, table)


@hostile("Arrow", "names")
def _() -> Iterator[Attack]:
    import pyarrow

    for name in _NAMES[:4]:
        rows = [{"bytes": None, "path": name}, {"bytes": IMAGES[0], "path": None}]
        table = pyarrow.table({"image": rows, "label": [0, 1]})
        yield lambda path, table=table: arrow(path, table)
        content = json.dumps({"_data_files": [{"filename": name}]})
        yield inside("state.json", lambda file, x=content: file.write_text(x))
        content = json.dumps({"splits": [name]})
        yield inside("dataset_dict.json", lambda file, x=content: file.write_text(x))


@hostile("LMDB", "names")
def _() -> Iterator[Attack]:
    key = b"\0\xff\n" + b"k" * 500
    yield lambda path: samples.database(path, [(key, IMAGES[0]), (b"a/b\0", IMAGES[1])])


@hostile("WebDataset", "names")
def _() -> Iterator[Attack]:
    for name in (f"{LONG_NAME}.jpg", "a\nb.jpg", "\x1b[31m.jpg", "/etc/passwd.jpg"):
        yield lambda path, name=name: samples.tar(path, [(name, IMAGES[0])])


@hostile("RecordIO", "names")
def _() -> Iterator[Attack]:
    yield lambda path: _beside(path, "0\ta\0b\n1\t" + LONG_NAME + "\n2\t\x1b[31m\n")
