"""Embeddings in shards: order, resuming, and what is refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import wait_until
from damage import DAMAGES, extra_file, folder_in_place, symlink_away
from damage import name as damage_name

from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation import embed as embeds
from arcface_jax.evaluation import shards
from arcface_jax.runtime import devices as meshes


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 8)


def load(number: int) -> np.ndarray:
    """An image that shows its number, left and right of it differently."""
    image = np.zeros((112, 112, 3), np.uint8)
    image[:, :56], image[0, 60] = number, 200
    return image


def embed(images: np.ndarray) -> np.ndarray:
    """(n, 2): the number, twice as large from the left side."""
    return images[:, 5, [0, 111], 0].astype(np.float32) * np.array([2, 1], np.float32)


def extract(folder: Path, *, count: int = 21, load=load, embed=embed, flip=True, model="a", **more):
    return shards.extract(
        embed,
        load,
        names=[f"{i}.jpg" for i in range(count)],
        folder=folder,
        settings={"model": model},
        flip=flip,
        **more,
    )


def test_a_folder_that_cannot_be_written_and_no_threads_are_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder, expected in (
        (tmp_path / "file", "Not a directory"),
        (Path("/proc/features"), "cannot write to /proc/features: "),
    ):
        with pytest.raises(UserError, match=expected) as error:
            extract(folder)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--threads 0 must be at least 1"):
        extract(tmp_path / "out", threads=0)


@pytest.mark.parametrize("count", [1, 8, 21])
def test_features_come_in_order_with_and_without_flip(tmp_path: Path, count: int):
    found = extract(tmp_path, count=count)
    numbers = np.arange(count, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(found.read(flip=False), numbers * [2, 0])
    np.testing.assert_array_equal(found.read(flip=True), numbers * [2, 1])
    assert found.read(flip=True).dtype == np.float32
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_stopped_goes_on_and_reads_nothing_twice(tmp_path: Path):
    def stops(number: int) -> np.ndarray:
        if number == 13:
            raise DataError("image 13 is damaged")
        return load(number)

    with pytest.raises(DataError, match="image 13"):
        extract(tmp_path, load=stops)
    assert [path.name for path in sorted(tmp_path.glob("*.npy"))] == ["00000.npy"]
    again = []
    found = extract(tmp_path, load=lambda i: again.append(i) or load(i))
    assert sorted(again) == list(range(8, 21))
    np.testing.assert_array_equal(found.read(flip=False)[:, 0], 2 * np.arange(21))
    extract(tmp_path, load=stops)  # all is there: nothing is read


def test_a_folder_of_an_earlier_version_is_resumed(tmp_path: Path):
    """Its settings end without a line feed, and a killed process left parts under old names."""
    settings = {"model": "a", "images": 21, "shard": 8, "views": 2}
    (tmp_path / "settings.json").write_text(json.dumps(settings, indent=2))
    np.save(tmp_path / "00000.npy", np.full((8, 2, 2), 7, np.float32))
    for suffix in (".tmp", ".part"):
        (tmp_path / f"00001{suffix}").write_bytes(b"half a shard")
    read = extract(tmp_path).read(flip=False)
    assert read[:8].tolist() == [[7, 7]] * 8 and read[8:, 0].tolist() == list(range(16, 42, 2))
    left = ["00000.npy", "00001.npy", "00002.npy", "settings.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_shards_without_settings_are_refused(tmp_path: Path):
    np.save(tmp_path / "00000.npy", np.zeros((8, 2, 2), np.float32))
    with pytest.raises(DataError, match=r"no settings\.json"):
        extract(tmp_path)


KILLED = """
import sys, threading
sys.path[:0] = {path!r}
from pathlib import Path
from arcface_jax.evaluation import shards
import test_shards
shards.ROWS = 8
def stuck(number):
    if number >= 24:  # in the fourth shard
        threading.Event().wait()
    return test_shards.load(number)
test_shards.extract(Path(sys.argv[1]), count=200, load=stuck)
"""


def test_a_killed_process_leaves_whole_shards(tmp_path: Path):
    script = KILLED.format(path=[str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    wait_until((tmp_path / "00001.npy").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(tmp_path.glob("*.npy")))
    assert 2 <= done <= 3
    again = []
    found = extract(tmp_path, count=200, load=lambda i: again.append(i) or load(i))
    assert sorted(again) == list(range(8 * done, 200))
    np.testing.assert_array_equal(found.read(flip=False)[:, 0], 2 * np.arange(200) % 512)


def test_embeddings_of_something_else_are_refused(tmp_path: Path):
    extract(tmp_path, flip=False)
    extract(tmp_path, flip=False)
    with pytest.raises(DataError, match="model was 'a' and is 'b'"):
        extract(tmp_path, flip=False, model="b")
    with pytest.raises(DataError, match="images was 21 and is 22"):
        extract(tmp_path, flip=False, count=22)
    with pytest.raises(DataError, match="without flipped images"):
        extract(tmp_path, flip=True)
    assert json.loads((tmp_path / "settings.json").read_text())["views"] == 1


def test_embeddings_with_flip_serve_without(tmp_path: Path):
    extract(tmp_path, flip=True)
    np.testing.assert_array_equal(extract(tmp_path, flip=False).read(flip=False)[:, 1], 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_name_an_image(tmp_path: Path, value: float):
    def broken(images: np.ndarray) -> np.ndarray:
        out = embed(images)
        out[out[:, 0] == 2 * 11] = value
        return out

    with pytest.raises(DataError, match=r"1 of 8 images are not finite, the first of 11\.jpg"):
        extract(tmp_path, embed=broken)
    assert not (tmp_path / "00001.npy").exists()


def test_images_that_are_missing_or_damaged_are_named(tmp_path: Path):
    points = np.array([[30.0, 50], [70, 50], [50, 70], [35, 90], [65, 90]])
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read \(No such file"):
        shards.aligned_image(tmp_path / "gone.jpg", points)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.jpg"):
        shards.aligned_image(tmp_path / "bad.jpg", points)
    cv2.imwrite(str(tmp_path / "good.png"), np.full((90, 120, 3), (1, 2, 3), np.uint8))
    image = shards.aligned_image(tmp_path / "good.png", points)
    assert image.shape == (112, 112, 3)
    assert image[56, 56].tolist() == [3, 2, 1]


def test_a_host_reads_the_rows_of_its_devices_alone(tmp_path: Path):
    """A host whose devices hold the first half of each batch; two real ones are in
    test_protocol_commands.py."""
    mesh = meshes.make(8)
    rows = embeds.rows_of_this_host(21, batch_size=16, mesh=mesh)
    assert rows.shape == (21,)
    assert rows.all()

    def first_half(count: int) -> np.ndarray:
        return np.arange(count) % 8 < 4

    seen = []
    shards.extract(
        embed,
        lambda i: seen.append(i) or load(i),
        names=[str(i) for i in range(16)],
        folder=tmp_path,
        settings={},
        flip=False,
        host_rows=first_half,
    )
    assert sorted(seen) == [0, 1, 2, 3, 8, 9, 10, 11]


def whole(folder: Path) -> list[float]:
    return extract(folder).read(flip=False)[:, 0].tolist()


@pytest.mark.parametrize("damage", DAMAGES, ids=damage_name)
def test_a_damaged_shard_is_computed_again(tmp_path: Path, capsys, damage):
    folder = tmp_path / "store"
    expected = whole(folder)
    damage(folder / "00001.npy")
    if damage is folder_in_place:
        with pytest.raises(DataError, match=r"00001\.npy is a folder where embeddings belong"):
            whole(folder)
        return
    read = []
    found = extract(folder, load=lambda number: read.append(number) or load(number))
    assert found.read(flip=False)[:, 0].tolist() == expected
    harmless = damage in (extra_file, symlink_away)
    assert sorted(read) == ([] if harmless else list(range(8, 16)))
    printed = capsys.readouterr().err
    assert printed.count("00001.npy missing or damaged") == (not harmless), printed
    assert whole(folder) == expected and capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", DAMAGES, ids=damage_name)
def test_damaged_settings_refuse_in_one_line(tmp_path: Path, damage):
    folder = tmp_path / "store"
    expected = whole(folder)
    damage(folder / "settings.json")
    if damage in (extra_file, symlink_away):
        assert whole(folder) == expected
        return
    with pytest.raises(DataError) as caught:
        whole(folder)
    message = str(caught.value)
    assert "settings.json" in message and "\n" not in message and "another" in message


def test_a_cut_shard_of_an_earlier_version_is_computed_again(tmp_path: Path):
    settings = {"model": "a", "images": 21, "shard": 8, "views": 2}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    np.save(tmp_path / "00000.npy", np.full((8, 2, 2), 7, np.float32))
    (tmp_path / "00001.npy").write_bytes((tmp_path / "00000.npy").read_bytes()[:150])
    assert whole(tmp_path) == [7.0] * 8 + list(range(16, 42, 2))


def test_a_shard_that_no_digest_answers_for_is_computed_again(tmp_path: Path):
    """As one of another run, put there by hand."""
    expected = whole(tmp_path / "a")
    extract(tmp_path / "b", load=lambda number: load(number + 1))
    (tmp_path / "b" / "00002.npy").replace(tmp_path / "a" / "00002.npy")
    assert whole(tmp_path / "a") == expected
