"""Training sets: record files as people have them, drawn faces, and what is refused."""

import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from arcface_jax.config import DataConfig, SyntheticConfig
from arcface_jax.data.images import decode, decode_any_size
from arcface_jax.data.opening import open_source
from arcface_jax.data.recordio import reader
from arcface_jax.data.recordio.reader import RecordReader, RecordWriter
from arcface_jax.data.recordio.source import RecordSource
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.data.synthetic.source import SyntheticSource
from arcface_jax.errors import DataError, ImageError

LFW = os.environ.get("ARCFACE_JAX_LFW", "")
needs_lfw = pytest.mark.skipif(
    not LFW, reason="set ARCFACE_JAX_LFW to the folder of LFW's train.rec"
)


def encode(image: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def face(number: int, *, height: int = 112, width: int = 112) -> np.ndarray:
    shape = (height, width, 3)
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path: Path):
    """Writes (label, image) records under the keys 1, 2 .., and, with a header, the identities'."""

    def write(records: list, *, identities: int | None = None) -> str:
        with RecordWriter(tmp_path / "train.rec") as writer:
            end = len(records) + 1
            if identities is not None:
                writer.write(0, b"", label=[end, end + identities])
            for key, (label, data) in enumerate(records, start=1):
                writer.write(key, data, label=label)
            for identity in range(identities or 0):
                keys = [key for key, (label, _) in enumerate(records, 1) if label == identity]
                first, last = (keys[0], keys[-1] + 1) if keys else (0, 0)
                writer.write(end + identity, b"", label=[first, last])
        return str(tmp_path)

    return write


def opened(path: str):
    return open_source(DataConfig(path=path), seed=0)


PLAIN = [(0, encode(face(0))), (0, encode(face(1))), (2, encode(face(2))), (1, encode(face(3)))]


@pytest.mark.parametrize("identities", [3, None])
def test_images_and_labels_with_an_identity_header_and_without(folder, identities):
    source = opened(folder(PLAIN, identities=identities))
    assert isinstance(source, RecordSource)
    assert (len(source), source.num_classes) == (4, 3)
    for index, label in enumerate([0, 0, 2, 1]):
        image, number = source[index]
        np.testing.assert_array_equal(image, face(index))
        assert (image.shape, image.dtype) == ((112, 112, 3), np.uint8)
        assert number == label and type(number) is int


def test_many_images_at_once_are_those_read_one_by_one(folder, tmp_path):
    """Usual records, one with several labels, one in parts, and four that cannot be read."""
    noisy = encode(face(6), "BMP")
    noisy += bytes(-(len(noisy) + 24) % 4) + struct.pack("<I", 0xCED7230A) * 2
    records: list = [
        *PLAIN,
        ([2.0, 7.0, 8.0], encode(face(4))),
        (1, noisy),
        (1, b"no image"),
        (1, b""),
        (3, encode(face(5))),
        (0.5, encode(face(5))),
        (1, encode(face(5, height=90))),
        (2, encode(face(7), "JPEG")),
    ]
    path = folder(records, identities=3)
    (tmp_path / "other").mkdir()
    with RecordWriter(tmp_path / "other" / "train.rec") as writer:
        for key, (label, data) in enumerate(PLAIN):
            writer.write(key, data, label=label)
    for source in (opened(path), opened(f"{path},{tmp_path / 'other'}")):
        numbers = np.random.default_rng(0).permutation(len(source))
        rows = np.random.default_rng(1).permutation(len(source) + 3)[: len(source)]
        images = np.full((len(source) + 3, 112, 112, 3), 7, np.uint8)
        labels = np.full(len(source) + 3, -7, np.int32)
        failed = dict(source.load(numbers, rows, images, labels))
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True):
            try:
                image, label = source[number]
            except ImageError as error:
                assert str(failed.pop(row)) == str(error)
                continue
            np.testing.assert_array_equal(images[row], image)
            assert labels[row] == label
        assert not failed
        others = np.setdiff1d(np.arange(len(images)), rows)
        assert (images[others] == 7).all() and (labels[others] == -7).all()
    numbers = np.arange(12)
    failed = opened(path).load(numbers, numbers, images, labels)
    assert sorted(row for row, _ in failed) == [6, 7, 8, 9, 10]


def test_a_file_that_is_cut_while_it_is_read_is_named(folder, tmp_path):
    source = opened(folder(PLAIN))
    rec = tmp_path / "train.rec"
    size = rec.stat().st_size
    os.truncate(rec, size // 2)
    images, labels = np.zeros((4, 112, 112, 3), np.uint8), np.zeros(4, np.int32)
    with pytest.raises(DataError, match=rf"train\.rec was cut from {size} to {size // 2} bytes"):
        source.load(np.arange(4), np.arange(4), images, labels)
    os.truncate(rec, size)  # of the same length again: zeros are no records
    assert [row for row, _ in source.load(np.arange(4), np.arange(4), images, labels)] == [2, 3]


def test_a_slow_disk_is_asked_for_all_images_of_a_batch_at_once(folder, monkeypatch):
    source = opened(folder(PLAIN))
    asked = []
    monkeypatch.setattr(RecordReader, "will_need", lambda _, *span: asked.append(span))
    images, labels = np.zeros((4, 112, 112, 3), np.uint8), np.zeros(4, np.int32)
    numbers = np.array([3, 0, 1, 2])

    def load(seconds: float) -> None:
        now = iter((0.0, seconds))
        monkeypatch.setattr(reader.time, "perf_counter", lambda: next(now))
        assert not source.load(numbers, numbers, images, labels)

    load(4 * 10e-6)
    load(4 * 30e-6)  # a disk was waited for, by whatever reads next
    assert not asked
    load(4 * 10e-6)
    ((first, last),) = asked
    np.testing.assert_array_equal((first, last), (numbers, numbers + 1))


def test_the_header_counts_identities_that_have_no_image(folder):
    assert opened(folder(PLAIN, identities=9)).num_classes == 9


def test_without_a_header_keys_may_begin_at_0_and_have_gaps(tmp_path: Path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        for key, label in ((0, 1), (5, 0), (17, 4)):
            writer.write(key, encode(face(key)), label=label)
    source = opened(str(tmp_path))
    assert (len(source), source.num_classes) == (3, 5)
    assert [source[i][1] for i in range(3)] == [1, 0, 4]
    np.testing.assert_array_equal(source[2][0], face(17))


@pytest.mark.parametrize("identities", [3, None])
def test_of_several_labels_the_first_is_the_identity(folder, identities):
    records = [([2.0, 0.25, 7.5], encode(face(0))), ([1.0], encode(face(1)))]
    source = opened(folder(records, identities=identities))
    assert (len(source), source.num_classes) == (2, 3)
    assert [source[i][1] for i in range(2)] == [2, 1]


@pytest.mark.parametrize(
    "label",
    [-1.0, 0.5, 1e-3, float("nan"), float("inf"), [-1.0, 0.0], [0.5, 0.0], [float("nan"), 1.0]],
)
@pytest.mark.parametrize("identities", [3, None])
def test_a_label_that_is_no_identity_is_named_with_its_record(folder, label, identities):
    path = folder([PLAIN[0], (label, encode(face(1)))], identities=identities)
    number = label[0] if isinstance(label, list) else label
    expected = rf"train\.rec, record 2: label {np.float32(number):.5g}.* whole numbers from 0"
    with pytest.raises(DataError, match=expected):
        opened(path)[1]


def test_a_label_outside_the_header_is_named_with_its_record(folder):
    source = opened(folder(PLAIN, identities=2))
    assert source[3][1] == 1
    with pytest.raises(
        DataError, match=r"record 3: label 2 is outside the 2 identities \(0 \.\. 1"
    ):
        source[2]


NAN, INF = float("nan"), float("inf")
WRONG_HEADERS = {
    "no identities": [[5, 5], [5, 4]],
    "no images": [[1, 4], [0, 0], [-3, 2]],
    "not whole": [[2.5, 5], [2, 5.5]],
    "not finite": [[NAN, 5], [INF, 5], [2, NAN], [2, INF], [-INF, 5], [INF, INF]],
}


@pytest.mark.parametrize("what", WRONG_HEADERS)
def test_a_wrong_header_is_refused(tmp_path: Path, what: str):
    for header in WRONG_HEADERS[what]:
        with RecordWriter(tmp_path / "train.rec") as writer:
            writer.write(0, b"", label=header)
            writer.write(1, PLAIN[0][1], label=0)
        shown = ", ".join(str(float(number)) for number in header)
        with pytest.raises(DataError) as error:
            opened(str(tmp_path))
        assert f"train.rec, record 0: the header [{shown}] is not" in str(error.value)
        assert "recreate the file" in str(error.value)


@pytest.mark.parametrize(("height", "width"), [(112, 96), (96, 112), (224, 224), (1, 1)])
def test_an_image_of_another_size_is_refused_with_its_size(folder, height: int, width: int):
    data = encode(face(0, height=height, width=width))
    source = opened(folder([(0, data)]))
    with pytest.raises(DataError, match=f"record 1: .*{width} x {height} pixels.*112 x 112.*align"):
        source[0]


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"not an image", encode(face(0))[:30], png(2**20, 2**20, b"")],
    ids=["empty", "a zero", "text", "cut short", "a million pixels wide and high"],
)
def test_bytes_that_are_no_image_are_refused_with_their_number(folder, data: bytes):
    source = opened(folder([(0, data)]))
    with pytest.raises(DataError, match=f"record 1: {len(data)} bytes that are not an image"):
        source[0]


def test_flipped_bytes_give_an_image_or_a_data_error():
    rng = np.random.default_rng(0)
    good = encode(face(0), "JPEG")
    outcomes = {"error": 0, "image": 0}
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(60)] ^= 1 << int(rng.integers(8))
        try:
            image = decode_any_size(bytes(data), where="x")
            assert image.dtype == np.uint8 and image.shape[2:] == (3,)
            outcomes["image"] += 1
        except DataError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 30


def test_red_is_the_first_channel():
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [250, 120, 10]], np.uint8)
    image = np.repeat(colors, 28, axis=0)[:, None].repeat(112, axis=1)
    rows = b"".join(b"\x00" + row.tobytes() for row in image)
    np.testing.assert_array_equal(decode(png(112, 112, rows), where=lambda: "x"), image)
    jpeg = decode(encode(image, "JPEG", quality=95, subsampling=0), where=lambda: "x")
    np.testing.assert_allclose(jpeg[14::28, 56].astype(int), colors, atol=6)


def test_gray_images_have_three_equal_channels():
    gray = face(0)[..., 0]
    np.testing.assert_array_equal(
        decode(encode(gray), where=lambda: "x"), gray[..., None].repeat(3, axis=2)
    )


def test_threads_read_what_one_reads(folder):
    records = [(i % 5, encode(face(i))) for i in range(40)]
    source = opened(folder(records, identities=5))
    with ThreadPoolExecutor(8) as pool:
        for index, (image, label) in enumerate(pool.map(source.__getitem__, range(40))):
            np.testing.assert_array_equal(image, face(index))
            assert label == index % 5


def test_a_missing_path_an_empty_folder_and_a_file_are_told_apart(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere does not exist: set --data\.path"):
        opened(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no training set \(it holds: nothing\).*train\.rec"):
        opened(str(tmp_path))
    for name in ("lfw.bin", "property"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"it holds: lfw\.bin, property\): set --data\.path"):
        opened(str(tmp_path))
    with pytest.raises(DataError, match=r"property is not a supported training set"):
        opened(str(tmp_path / "property"))
    (tmp_path / "train.idx").write_text("1\t0\n")
    with pytest.raises(DataError, match=r"train\.rec is missing \(train\.idx is there"):
        opened(str(tmp_path))


def test_drawn_faces_are_numbered_by_identity():
    source = open_source(
        DataConfig(
            path="synthetic",
            synthetic=SyntheticConfig(identities=3, images_per_identity=4),
        ),
        seed=7,
    )
    assert isinstance(source, SyntheticSource)
    assert (len(source), source.num_classes) == (12, 3)
    items = [source[i] for i in range(12)]
    assert [label for _, label in items] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({image.tobytes() for image, _ in items}) == 12
    np.testing.assert_array_equal(items[6][0], draw_face(seed=7, identity=1, index=2))
    other = SyntheticSource(seed=8, identities=3, images_per_identity=4)
    assert not np.array_equal(other[6][0], items[6][0])


@needs_lfw
def test_lfw_has_the_identities_and_images_that_its_page_names():
    source = opened(LFW)
    assert (source.num_classes, len(source)) == (4038, 9525)
    labels = source.labels()
    np.testing.assert_array_equal(np.unique(labels), np.arange(4038))
    counts = np.bincount(labels)
    assert np.sum(counts == 1) == 2854
    for index in range(0, 9525, 97):
        image, label = source[index]
        assert image.shape == (112, 112, 3)
        assert label == labels[index]


@needs_lfw
def test_lfw_faces_are_redder_than_blue():
    source = opened(LFW)
    center = [source[i][0][40:80, 40:72].mean((0, 1)) for i in range(0, 9525, 95)]
    red, _, blue = np.mean(center, axis=0)
    assert red > blue + 20
