"""The teacher's cache: what it holds, how it resumes, and what it refuses."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import HANG, ROOT

from arcface_jax.config import DataConfig, DistillConfig
from arcface_jax.data.pipeline import batches
from arcface_jax.data.source import Source
from arcface_jax.errors import CheckpointError, ConfigError, DataError, ImageError, UserError
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import teacher, teacher_record

SIZE, IMAGES, CLASSES = 6, 30, 4
BROKEN = 11


class Drawn(Source):
    """Random images, one of which cannot be read."""

    num_classes = CLASSES

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == BROKEN:
            raise ImageError(f"image {index}", "damaged")
        image = np.random.default_rng(index).integers(0, 256, (112, 112, 3), np.uint8)
        return image, index % (CLASSES - 1)

    def read(self, index: int):
        return SimpleNamespace(data=b"", label=index)  # not used

    def labels(self) -> np.ndarray:
        return np.arange(IMAGES, dtype=np.int32) % (CLASSES - 1)

    def facts(self):
        return {"form": "drawn"}

    generated = True


class Model:
    """Means of six parts of an image, of which three are mirrored to one another."""

    def __init__(self, digest: str = "a"):
        self.input = ModelInput(embedding_size=SIZE, digest=digest)
        self.seen = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.seen += len(images)
        parts = images[:, :, :112].reshape(len(images), 112, 2, 56, 3).astype(np.float64)
        return (parts.mean(axis=(1, 3)).reshape(len(images), SIZE) - 127).astype(np.float32)

    def digest(self) -> str:
        return self.input.digest


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher, "SHARD", 8)
    monkeypatch.setattr(teacher, "_PIECE", 4)


def opened(folder: Path, model: Model | None = None, *, views="mean", size=SIZE, between=None):
    return teacher.open_cache(
        model or Model(),
        Drawn(),
        distill=DistillConfig(views=views),
        data=DataConfig(threads=2),
        folder=folder,
        embedding_size=size,
        between=between or (lambda: None),
    )


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected(number: int, views: str) -> np.ndarray:
    """(V, Dt) of an image, by itself."""
    image = Drawn()[number][0][None]
    each = [unit(Model()(image)[0]), unit(Model()(image[:, :, ::-1])[0])]
    return np.stack(each if views == "both" else [unit(each[0] + each[1])])


@pytest.mark.parametrize("views", ["mean", "both"])
def test_it_has_each_images_embedding_and_zeros_for_a_damaged_one(tmp_path, views):
    cache = opened(tmp_path / "cache", views=views)
    numbers = np.array([29, 0, 8, 7, 0])
    found = cache(numbers)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, [expected(n, views) for n in numbers], atol=1e-3)
    assert not cache(np.array([BROKEN])).any()


class Stopped(Exception):
    pass


def test_an_interrupted_cache_resumes_where_it_was(tmp_path):
    calls = []

    def between():
        calls.append(1)
        if len(calls) == 4:  # in the second shard
            raise Stopped

    with pytest.raises(Stopped):
        opened(tmp_path, between=between)
    model = Model()
    found = opened(tmp_path, model)(np.arange(IMAGES))
    assert model.seen == 2 * (IMAGES - 8)  # image and mirror image of what the first shard lacks
    others = opened(tmp_path / "whole")(np.arange(IMAGES))
    np.testing.assert_array_equal(found, others)
    again = Model()
    opened(tmp_path, again)
    assert again.seen == 0
    (tmp_path / "teacher-00001.npy").write_bytes(b"damaged")
    opened(tmp_path, again)
    assert again.seen == 16


@pytest.mark.slow
def test_two_hosts_share_the_work_and_one_writes(tmp_path):
    """Each embeds half of every shard, of whatever length; both map the same cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = Path(__file__).parent / "teacher_in_processes.py"
    places = [ROOT, ROOT / "tests" / "support", ROOT / "tests" / "training"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), address, str(number), str(tmp_path / "shared")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    problems = [process.communicate(timeout=HANG)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(problems)
    alone = opened(tmp_path / "alone")(np.arange(IMAGES))
    for number in range(2):
        stored = np.load(tmp_path / f"shared-{number}.npz")
        np.testing.assert_array_equal(stored["found"], alone)
        assert stored["seen"] == 2 * (4 + 4 + 4 + 3)  # halves of 8, 8, 8 and 6 images, two views


def test_another_teacher_or_rule_is_refused(tmp_path):
    opened(tmp_path)
    with pytest.raises(DataError, match="model was 'a' and is 'b'"):
        opened(tmp_path, Model("b"))
    with pytest.raises(DataError, match="views was 'mean' and is 'both'"):
        opened(tmp_path, views="both")


def test_the_disk_is_looked_at_before_anything_is_computed(tmp_path, monkeypatch):
    needed = teacher.bytes_needed(IMAGES, embedding_size=SIZE, views="mean")
    assert needed == IMAGES * SIZE * 2
    model = Model()
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"--distill\.cache"):
        opened(tmp_path, model)
    assert model.seen == 0
    usage.free = needed
    opened(tmp_path, model)


def test_a_stand_in_brings_its_own_embedding(tmp_path):
    cache = opened(tmp_path)
    reader = batches(Drawn(), DataConfig(global_batch_size=10, threads=1), seed=0, start=0, stop=3)
    several = list(reader)
    assert sum(len(batch.bad) for batch in several) == 1
    for batch in several:
        own = [unit(Model()(x)) for x in (batch.images, batch.images[:, :, ::-1])]
        np.testing.assert_allclose(cache(batch.numbers)[:, 0], unit(sum(own)), atol=1e-3)


def test_a_smaller_teacher_keeps_its_cosines(tmp_path):
    stored, lifted = opened(tmp_path), opened(tmp_path, size=16)
    known = np.setdiff1d(np.arange(IMAGES), BROKEN)
    small, large = (cache(known)[:, 0].astype(np.float64) for cache in (stored, lifted))
    assert large.shape == (len(known), 16)
    np.testing.assert_allclose(large @ large.T, small @ small.T, atol=2e-3)


def test_a_wider_teacher_keeps_its_principal_components(tmp_path):
    full = opened(tmp_path)(np.arange(IMAGES))[:, 0].astype(np.float64)
    found = opened(tmp_path, size=3)
    assert found.projection is not None
    values = np.linalg.svd(full, full_matrices=False)[2][:3].T  # (Dt, 3)
    ours = found.projection.astype(np.float64)
    np.testing.assert_allclose(ours @ ours.T, values @ values.T, atol=1e-4)
    np.testing.assert_array_equal(opened(tmp_path, size=3).projection, found.projection)


def test_class_means_become_centers_and_an_empty_class_keeps_its_own(tmp_path):
    cache, mesh = opened(tmp_path, views="both"), meshes.make(2)
    random = np.random.default_rng(0).standard_normal((6, SIZE)).astype(np.float32)
    given = jax.device_put(random, meshes.split(mesh))
    found = np.asarray(teacher.centers(cache, Drawn(), given, mesh=mesh))
    for label in range(CLASSES - 1):
        members = [n for n in range(IMAGES) if n % (CLASSES - 1) == label and n != BROKEN]
        mean = unit(np.sum([expected(n, "both") for n in members], axis=(0, 1)))
        np.testing.assert_allclose(unit(found[label]), mean, atol=2e-3)
        assert np.linalg.norm(found[label]) == pytest.approx(0.01 * SIZE**0.5, rel=1e-3)
    np.testing.assert_array_equal(found[CLASSES - 1 :], random[CLASSES - 1 :])


def test_a_run_resumes_with_the_teacher_that_it_began_with(tmp_path):
    section = DistillConfig()
    teacher_record.agree(tmp_path, teacher.record(Model(), None, distill=section))
    teacher_record.agree(tmp_path, teacher.record(Model(), None, distill=section))
    other = teacher.record(Model("b"), None, distill=section)
    with pytest.raises(CheckpointError, match=r"other model.*--distill\.teacher"):
        teacher_record.agree(tmp_path, other)
    (tmp_path / teacher_record.FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="backup"):
        teacher_record.agree(tmp_path, other)


def test_compatible_embeddings_have_the_teachers_length():
    with pytest.raises(ConfigError, match=r"--model\.embedding-size 6"):
        teacher.check_compatible(Model(), embedding_size=512)
