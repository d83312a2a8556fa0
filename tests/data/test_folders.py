"""Image folders as people have them: what is an image, what is skipped, and who is whom."""

import os
import socket
import struct
import sys
import types
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_jax.config import DataConfig
from arcface_jax.data import formats, images
from arcface_jax.data.opening import open_source
from arcface_jax.data.source import account
from arcface_jax.errors import DataError, ImageError

PIXELS = np.full((112, 112, 3), (10, 120, 200), np.uint8)


def encoded(suffix: str) -> bytes:
    pixels = PIXELS[..., 0] if suffix == ".pgm" else PIXELS
    return cv2.imencode(suffix, pixels)[1].tobytes()


JPEG = encoded(".jpg")


def opened(folder: Path, *, level: int = 0):
    return open_source(DataConfig(path=str(folder), identity_level=level), seed=0)


def put(folder: Path, *names: str, data: bytes = JPEG) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


# Suffix of the name: suffix of the content.
CONTENT = {
    **{suffix: suffix for suffix in (".png", ".bmp", ".webp", ".tif", ".pgm", ".ppm", ".jp2")},
    **{".JPG": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", "": ".jpg", ".scan": ".png", ".1": ".bmp"},
    **{suffix: suffix for suffix in (".gif", ".avif") if cv2.haveImageWriter(f"x{suffix}")},
}


@pytest.mark.parametrize("suffix", CONTENT)
def test_whatever_opencv_reads_is_an_image_by_its_content(tmp_path: Path, suffix: str):
    put(tmp_path, f"ada/0{suffix}", data=encoded(CONTENT[suffix]))
    put(tmp_path, "ada/1.jpg", "ada/notes.txt", f"bob/0{suffix}")
    source = opened(tmp_path)
    assert (len(source), source.num_classes) == (3, 2)
    assert source.ignored == {".txt": 1}
    first = 1 if source.where(0).endswith("1.jpg") else 0
    image, label = source[first]
    assert image.shape == (112, 112, 3) and label == 0
    assert images.is_image_by_content(source.where(first))


def test_every_sniffed_format_is_told_from_text_and_from_others():
    suffixes = (".jpg", ".png", ".bmp", ".webp", ".tiff", ".ppm", ".jp2")
    heads = [encoded(suffix)[: formats.HEAD] for suffix in suffixes]
    expected = ["JPEG", "PNG", "BMP", "WebP", "TIFF", "PNM", "JPEG 2000"]
    assert [formats.sniff(head) for head in heads] == expected
    for text in (b"", b"BMW is a car maker of Munich, Bavaria", b"P5 is a name", b"GIF", b"RIFF"):
        assert formats.sniff(text) is None, text
    for suffix, head in zip(suffixes, heads, strict=True):
        if suffix not in (".tiff", ".jp2"):
            assert formats.announced(encoded(suffix)) == (112, 112), suffix
        assert formats.announced(head[:5]) is None


def test_an_identity_has_all_images_below_its_folder(tmp_path: Path):
    put(tmp_path, "ada/0.jpg", "ada/2020/0.jpg", "ada/2020/may/1.jpg", "bob/x/0.jpg", "cy/0.jpg")
    source = opened(tmp_path)
    assert source.labels().tolist() == [0, 0, 0, 1, 2]
    assert list(source.names) == ["ada", "bob", "cy"]
    assert source.where(2) == str(tmp_path / "ada/2020/may/1.jpg")


SKIPPED = {
    "hidden": [".ipynb_checkpoints/0.jpg", "ada/._0.jpg", "ada/.DS_Store", ".git/x/y.png"],
    "of systems": ["__MACOSX/ada/0.jpg", "ada/Thumbs.db", "@eaDir/0.jpg", "bob/desktop.ini"],
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_hidden_and_system_entries_are_skipped_and_counted(tmp_path: Path, kind: str):
    put(tmp_path, "ada/0.jpg", "bob/0.jpg", *SKIPPED[kind])
    source = opened(tmp_path)
    assert (len(source), list(source.names)) == (2, ["ada", "bob"])
    assert source.ignored == {"hidden": 4}
    assert account(source) == "6 files: 2 images used of 2 identities, 4 ignored (hidden 4)"


def test_other_files_are_counted_once_by_kind(tmp_path: Path):
    put(tmp_path, "ada/0.jpg", "bob/0.jpg", "loose.jpg", "2.png")
    put(tmp_path, "list.csv", "ada/a.txt", "bob/b.txt", "README", "bob/x.dat", data=b"no image")
    (tmp_path / "ada" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source = opened(tmp_path)
    assert len(source) == 2
    others = {".csv": 1, ".txt": 2, "no suffix": 1, ".dat": 1}
    assert source.ignored == others | {"broken links": 1, "loose images": 2}
    assert "8 ignored (.txt 2, loose images 2, .csv 1" in account(source, unreadable={})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_sockets_are_never_opened(tmp_path: Path, monkeypatch):
    put(tmp_path, "ada/0.jpg", "bob/0.jpg")
    os.mkfifo(tmp_path / "ada" / "pipe.jpg")
    os.mkfifo(tmp_path / "ada" / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path / "bob")  # a socket's path is short
        server.bind("s.jpg")
    source = opened(tmp_path)
    assert len(source) == 2 and source.ignored == {"special files": 3}
    listed = tmp_path / "a.csv"
    listed.write_text("ada/pipe.jpg,0\nada,1\n")
    source = opened(listed)
    for number, why in ((0, "Not a regular file"), (1, "Is a (folder|directory)")):
        with pytest.raises(ImageError, match=rf"cannot be read \({why}\)") as raised:
            source.read(number)
        assert raised.value.kind == "missing"


def test_links_are_followed_and_loops_are_not(tmp_path: Path):
    put(tmp_path / "set", "ada/0.jpg", "bob/0.jpg")
    put(tmp_path / "else", "1.jpg")
    (tmp_path / "set" / "ada" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "bob" / "more").symlink_to(tmp_path / "else")
    for place in ("loop", "ada/loop", "ada/loop.jpg"):
        (tmp_path / "set" / place).symlink_to(Path(place).name)
    source = opened(tmp_path / "set")
    assert source.labels().tolist() == [0, 1, 1]
    assert source.ignored == {"links to a folder above": 1, "broken links": 3}


def test_the_question_about_the_level_skips_images_of_the_first_level(tmp_path: Path):
    for group in "AB":
        put(tmp_path, f"{group}/0.jpg")
        put(tmp_path, *(f"{group}/{group}{p}/{i}.jpg" for p in range(5) for i in range(10)))
    with pytest.raises(DataError, match=r"as A/A0/0\.jpg: is the identity A \(2 of them\) or A0"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["one#two", "a,b#c", "#", "x#train"])
def test_names_with_a_number_sign_or_comma(tmp_path: Path, name: str):
    put(tmp_path / name, "ada/0.jpg", "bob#2/0.jpg")
    assert list(opened(tmp_path / name).names) == ["ada", "bob#2"]


def test_a_folder_without_any_folder_of_images_says_what_it_holds(tmp_path: Path):
    put(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(DataError, match=r"2 loose images \(a\.jpg\) and no folder"):
        opened(tmp_path)


GROUPS = {
    "train and test": ["train/ada", "train/bob", "test/cy", "test/dan"],
    "one folder inside": ["images/ada", "images/bob"],
    "groups of people": ["Asian/m.1", "Asian/m.2", "African/m.3", "African/m.4"],
    "videos, which may be either": ["id1/x1", "id1/x2", "id2/x3", "id2/x4"],
}


@pytest.mark.parametrize("layout", GROUPS)
def test_one_level_more_is_asked_about_and_can_be_answered(tmp_path: Path, layout: str):
    folders = GROUPS[layout]
    put(tmp_path, *(f"{folder}/{number}.jpg" for folder in folders for number in range(2)))
    first = {folder.partition("/")[0] for folder in folders}
    with pytest.raises(DataError, match=rf"\({len(first)} of them\).*identity-level 1 or 2"):
        opened(tmp_path)
    assert opened(tmp_path, level=1).num_classes == len(first)
    source = opened(tmp_path, level=2)
    assert list(source.names) == sorted(folders) and len(source) == 2 * len(folders)


def test_sessions_that_repeat_are_not_asked_about(tmp_path: Path):
    people = [f"{name}/{year}/0.jpg" for name in ("a", "b", "c") for year in (2020, 2021)]
    assert opened(put(tmp_path, *people)).num_classes == 3


def test_names_of_known_suffixes_are_not_opened_and_others_a_few_times(tmp_path: Path, monkeypatch):
    put(tmp_path, *(f"ada/{i}.jpg" for i in range(9)), *(f"bob/{i}" for i in range(9)))
    put(
        tmp_path, *(f"bob/{i}.pts" for i in range(9)), *(f"bob/{i}.dat" for i in range(9)), data=b""
    )
    opened_files = []
    by_content = images.is_image_by_content
    monkeypatch.setattr(images, "_ALIKE", 4)
    monkeypatch.setattr(
        images, "is_image_by_content", lambda path: (opened_files.append(path), by_content(path))[1]
    )
    assert len(opened(tmp_path)) == 18
    suffixes = [Path(path).suffix for path in opened_files]
    assert (suffixes.count(""), suffixes.count(".dat"), len(suffixes)) == (4, 4, 8)


# ---- Images that claim more than they are --------------------------------------------------------


def claimed(suffix: str, width: int, height: int) -> bytes:
    """A small image whose header announces another size."""
    data = bytearray(encoded(suffix))
    if suffix == ".jpg":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif suffix == ".png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif suffix == ".bmp":
        data[18:26] = struct.pack("<ii", width, -height)
    elif suffix == ".gif":
        data[6:10] = struct.pack("<HH", width, height)
    else:
        data = bytearray(b"P5\n# by hand\n%d %d\n255\n" % (width, height))
    return bytes(data)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".pgm"])
def test_a_huge_image_is_refused_by_its_header(tmp_path: Path, suffix: str, monkeypatch):
    if suffix == ".gif" and not cv2.haveImageWriter("x.gif"):
        pytest.skip("OpenCV without GIF")
    put(tmp_path, f"ada/0{suffix}", data=claimed(suffix, 30_000, 20_000))
    for limited in (images.OPENCV_IS_LIMITED, False):
        monkeypatch.setattr(images, "OPENCV_IS_LIMITED", limited)
        with pytest.raises(ImageError, match="announces 30000 x 20000 pixels") as raised:
            opened(tmp_path)[0]
        assert raised.value.kind == "too large"
        # Without OpenCV's own limit nothing is decoded.
        monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("was decoded"))


def heic() -> bytes:
    return struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(40)


def test_heic_is_named_with_how_to_read_it(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    source = opened(put(tmp_path, "ada/0.HEIC", "ada/photo", data=heic()))
    assert len(source) == 2
    with pytest.raises(
        ImageError, match=r"HEIC photograph.*arcface-jax\[heic\].*convert"
    ) as raised:
        source[1]
    assert raised.value.kind == "HEIC"


def test_heic_is_read_by_pillow_heif_where_it_is_installed(tmp_path: Path, monkeypatch):
    import PIL.Image

    rgb = PIL.Image.fromarray(PIXELS)
    file = types.SimpleNamespace(size=(112, 112), to_pillow=lambda: rgb)
    fake = types.SimpleNamespace(open_heif=lambda data, convert_hdr_to_8bit: file)
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    image, _ = opened(put(tmp_path, "ada/0.heic", data=heic()))[0]
    np.testing.assert_array_equal(image, PIXELS)
