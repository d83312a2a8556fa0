"""Which files are images: the same for training, inference, pair lists, align and labeled sets."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_jax.data import faces, images
from arcface_jax.data import files as training_files
from arcface_jax.data.pairs import lists
from arcface_jax.data.tools import aligning
from arcface_jax.errors import DataError
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.evaluation.protocols import labeled

SUFFIXES = [".jpg", ".JPG", ".jpeg", ".png", ".Png", ".bmp", ".webp", ".tif", ".TIFF"]
OTHERS = ["notes.txt", "list.csv", "jpg", "a.jpg.part", "features.npy"]


def face(number: int) -> np.ndarray:
    """A smooth picture, which every format keeps to a few gray levels."""
    rows = np.linspace(20, 200, 112)[:, None, None]
    return np.broadcast_to(rows + 5 * number, (112, 112, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ada/ada_0001.jpg, ada/ada_0002.JPG and so on, beside files that are no images."""
    person = tmp_path / "in" / "ada"
    person.mkdir(parents=True)
    for number, suffix in enumerate(SUFFIXES, start=1):
        data = cv2.imencode(suffix.lower(), face(number)[:, :, ::-1])[1].tobytes()
        (person / f"ada_{number:04d}{suffix}").write_bytes(data)
    for name in OTHERS:
        (person / name).write_text("no image")
    return tmp_path / "in"


def expected(folder: Path) -> list[str]:
    found = [f"ada/ada_{n:04d}{suffix}" for n, suffix in enumerate(SUFFIXES, start=1)]
    assert all((folder / name).is_file() for name in found)
    return found


def test_every_reader_of_a_folder_finds_the_same_images(folder: Path, tmp_path: Path):
    wanted = expected(folder)
    assert faces.find(folder) == wanted
    source = training_files.try_folder(folder)
    assert source is not None
    assert [source.where(i) for i in range(len(source))] == [str(folder / n) for n in wanted]

    class Mean:
        input = ModelInput(embedding_size=3, digest="mean")

        def __call__(self, batch: np.ndarray) -> np.ndarray:
            return batch.mean(axis=(1, 2))

        def digest(self) -> str:
            return self.input.digest

    found = labeled.read(folder, Mean, output=tmp_path / "features", flip=False)
    assert found.people.tolist() == ["ada"] * len(wanted)
    done = aligning.align_folder(
        folder, tmp_path / "out", lambda *_: aligning.Faces(faces.TEMPLATE[None], np.ones(1))
    )
    assert (done.written, done.rejected) == (len(wanted), {})
    assert len(faces.find(tmp_path / "out")) == len(wanted)


def test_a_pair_list_finds_images_of_every_suffix(folder: Path, tmp_path: Path):
    count = len(SUFFIXES)
    (tmp_path / "pairs.txt").write_text("".join(f"ada 1 {n}\n" for n in range(1, count + 1)))
    pairs = lists.listed(tmp_path / "pairs.txt", folder).pairs
    assert [pair.right.name for pair in pairs] == [Path(name).name for name in expected(folder)]
    read = lists.read(tmp_path / "pairs.txt", folder).images
    for number, image in enumerate(read[1::2], start=1):
        np.testing.assert_allclose(image.astype(int), face(number), atol=6)


def test_a_name_without_an_image_has_none(folder: Path):
    assert images.find_named(folder / "ada" / "ada_0001") == folder / "ada" / "ada_0001.jpg"
    assert images.find_named(folder / "ada" / "notes") is None
    assert images.find_named(folder / "ada" / "ada_000") is None


def test_a_folder_without_images_names_the_suffixes(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no image \(\.jpg, .*\.tiff\)"):
        images.find_below(tmp_path)
    with pytest.raises(DataError, match="no folder at"):
        images.find_below(tmp_path / "gone")


def test_pictures_are_squares_of_their_middle():
    wide = np.zeros((60, 100, 3), np.uint8)
    wide[:, 20:80] = (10, 200, 30)
    square = images.square(images.encode(wide), where="x")
    assert square.shape == (112, 112, 3)
    assert (square == (10, 200, 30)).all()
    same = face(1)
    assert images.resize(same) is same


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm", ".pgm", ".jp2"])
def test_twelve_bits_in_a_file_of_sixteen_are_scaled(suffix: str):
    full = np.random.default_rng(0).integers(0, 2**16, (96, 64, 3)).astype(np.uint16)
    full[:40, :, 0] = 2**16 - 1
    full = full[..., 0] if suffix == ".pgm" else full
    how = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000] if suffix == ".jp2" else []
    sixteen, twelve = (
        cv2.imencode(suffix, values, how)[1].tobytes() for values in (full, np.right_shift(full, 4))
    )
    expected = np.right_shift(full, 8).astype(int)
    expected = np.stack([expected] * 3, -1) if suffix == ".pgm" else expected[..., ::-1]
    for data in (sixteen, twelve):  # TIFF's own conversion rounds
        np.testing.assert_allclose(images.pixels(data), expected, atol=1)
