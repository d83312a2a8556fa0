"""Folders of faces to shards: complete, in order, and whole after a kill at any time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import wait_until
from damage import DAMAGES, extra_file, folder_in_place, symlink_away
from damage import name as damage_name

from arcface_jax.commands import gallery as gallery_command
from arcface_jax.data.faces import TEMPLATE
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.inference import bulk
from arcface_jax.inference.embedder import Embedder
from arcface_jax.inference.gallery import Gallery

COUNT = 45

# A real model of its own, that computes in no time what a plain line below computes too; it
# stops after some batches on demand, so that the process is killed in the middle.
MODEL = """
import sys, threading
from pathlib import Path
import numpy as np
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.inference.embedder import Embedder

class Model:
    input = ModelInput(embedding_size=16, digest="blocks")
    def __init__(self, batches=None):
        self.batches = batches
    def __call__(self, images):
        if self.batches == 0:
            threading.Event().wait()  # for ever
        if self.batches is not None:
            self.batches -= 1
        return images.reshape(len(images), 16, -1).mean(2).astype(np.float32)
    def digest(self):
        return self.input.digest

if __name__ == "__main__":
    embedder = Embedder(Model(8), batch_size=4)
    embedder.embed_folder(Path(sys.argv[1]), Path(sys.argv[2]), shard_size=10)
"""
_space: dict = {"__name__": "model"}
exec(MODEL, _space)  # the same class here as in the process
Model = _space["Model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """45 images in two folders, two more that are none, and a note."""
    path = tmp_path_factory.mktemp("images")
    (path / "more").mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        image = rng.integers(0, 256, (112, 112, 3), np.uint8)
        cv2.imwrite(str(path / ("more" if i % 3 else ".") / f"{i:02d}.png"), image)
    (path / "more" / "07b.jpg").write_bytes(b"\xff\xd8 not a picture")
    (path / "08b.png").write_bytes(b"")
    (path / "notes.txt").write_text("no image")
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[list[str], np.ndarray]:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    names.remove("08b.png")
    images = np.stack([cv2.imread(str(folder / name))[..., ::-1] for name in names])
    raw = images.reshape(COUNT, 16, -1).astype(np.float64).mean(2)
    return names, raw / np.linalg.norm(raw, axis=1, keepdims=True)


def check(output: Path, expected: tuple[list[str], np.ndarray]) -> None:
    ids, embeddings = bulk.read(output)
    assert ids == expected[0]
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected[1], rtol=1e-5)


def test_a_killed_run_goes_on(folder, expected, tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    output = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "model.py"), str(folder), str(output)], env=environment
    )
    wait_until(lambda: len(bulk.shards(output)) >= 2, process)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in bulk.shards(output)}
    assert 2 <= len(done) < 5
    (output / "embeddings-00002.part").write_bytes(b"half a shard")

    summary = Embedder(Model(), batch_size=4).embed_folder(folder, output, shard_size=10)
    assert (summary.embedded, summary.shards, summary.kept) == (COUNT, 5, len(done))
    assert set(summary.skipped) == {"more/07b.jpg", "08b.png"}
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())
    check(output, expected)
    assert not list(output.glob("*.part"))
    shard = json.loads((output / "ids-00000.json").read_text())
    assert len(shard["ids"]) + len(shard["skipped"]) == 10


def test_other_settings_or_images_are_refused(folder, expected, tmp_path):
    embedder = Embedder(Model(), batch_size=32)
    output = tmp_path / "out"
    assert embedder.embed_folder(folder, output).shards == 1
    check(output, expected)
    with pytest.raises(UserError, match="shard_size was 10000 and is 5"):
        embedder.embed_folder(folder, output, shard_size=5)
    with pytest.raises(UserError, match="flip was False and is True"):
        Embedder(Model(), flip=True).embed_folder(folder, output)
    (folder / "new.png").write_bytes((folder / "00.png").read_bytes())
    try:
        with pytest.raises(UserError, match="images was 47 and is 48"):
            embedder.embed_folder(folder, output)
    finally:
        (folder / "new.png").unlink()
    (output / "settings.json").unlink()
    with pytest.raises(UserError, match=r"no settings\.json"):
        embedder.embed_folder(folder, output)


def test_the_gallery_of_an_exports_embeddings_serves_its_run(folder, tmp_path):
    """The shards are resumed by the export only; the gallery also serves run and other exports."""

    class Export(Model):
        input = ModelInput(embedding_size=16, digest="blocks")

        def digest(self) -> str:
            return "file"

    Embedder(Export(), batch_size=32).embed_folder(folder, tmp_path / "out")
    with pytest.raises(UserError, match="model was 'file' and is 'blocks'"):
        Embedder(Model()).embed_folder(folder, tmp_path / "out")
    words = [str(tmp_path / "out"), "--output", str(tmp_path / "gallery")]
    assert gallery_command.build(words) == 0
    for model in (Model(), Export()):
        found = Embedder(model).search(tmp_path / "gallery", folder / "00.png", k=1)
        assert found.name == [["00.png"]]
    assert Gallery(tmp_path / "gallery").model == "blocks"


def test_a_shard_without_any_image_has_no_rows(folder, tmp_path):
    points = {"00.png": TEMPLATE + 3}
    summary = Embedder(Model()).embed_folder(folder, tmp_path / "out", shard_size=40, points=points)
    assert (summary.embedded, summary.shards, len(summary.skipped)) == (1, 2, COUNT + 1)
    assert summary.skipped["more/01.png"] == "its five points are not in the list"
    ids, embeddings = bulk.read(tmp_path / "out")
    image = cv2.imread(str(folder / "00.png"))[..., ::-1]
    moved = np.zeros_like(image)
    moved[:-3, :-3] = image[3:, 3:]
    raw = moved.reshape(16, -1).astype(np.float64).mean(1)
    assert ids == ["00.png"]
    np.testing.assert_allclose(embeddings, [raw / np.linalg.norm(raw)], rtol=1e-3)


@pytest.mark.parametrize("name", ["embeddings-00001.npy", "ids-00001.json", "settings.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=damage_name)
def test_damaged_output_is_refused_by_readers_and_made_again(
    folder, expected, tmp_path, capsys, name, damage
):
    embedder, output = Embedder(Model(), batch_size=32), tmp_path / "out"
    embedder.embed_folder(folder, output, shard_size=20)
    damage(output / name)
    if damage in (extra_file, symlink_away):
        check(output, expected)
        return
    if name == "settings.json" or damage is folder_in_place:
        with pytest.raises(UserError) as caught:
            embedder.embed_folder(folder, output, shard_size=20)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        return
    with pytest.raises(DataError, match="embedded the images again"):
        bulk.read(output)
    summary = embedder.embed_folder(folder, output, shard_size=20)
    assert summary.kept == summary.shards - 1
    assert f"{name} missing or damaged" in capsys.readouterr().err
    check(output, expected)


def test_one_odd_name_does_not_end_a_run(folder: Path, tmp_path: Path):
    odd = [b"[red]\xff.png", b"\x1b[2J.png", b"=cmd().png", b"1\n2.png", b"\xe9/a$b_{.png"]
    names = [os.fsdecode(name) for name in odd]
    for name in names:
        (tmp_path / "odd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "odd" / name).write_bytes((folder / "00.png").read_bytes())
    (tmp_path / "odd" / os.fsdecode(b"\xe8.png")).write_bytes(b"no image")
    embedder = Embedder(Model(), batch_size=4)
    for _ in range(2):  # the second resumes
        done = embedder.embed_folder(tmp_path / "odd", tmp_path / "out", shard_size=2)
        assert done.embedded == len(names) and list(done.skipped) == [os.fsdecode(b"\xe8.png")]
    assert sorted(bulk.read(tmp_path / "out")[0]) == sorted(names)
