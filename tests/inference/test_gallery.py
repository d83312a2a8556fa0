"""Search in a gallery against a plain float64 product of all rows, in both forms."""

import json
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.inference import gallery
from arcface_jax.inference.embedder import Embedder
from arcface_jax.inference.gallery import Gallery

FORMS = ("float32", "int8")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A few hundred rows are several blocks in several threads."""
    monkeypatch.setattr(gallery, "BLOCK", 64)
    monkeypatch.setattr(gallery, "_CACHED", 24)
    monkeypatch.setattr(gallery, "_QUERIES", 3)
    monkeypatch.setattr(gallery, "_RESCORED", 7)


def brute_force(rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the k best, ties by row, by one sorted list for each query."""
    scores = np.array([[float(np.dot(q, r)) for r in rows.astype(float)] for q in queries])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def people(count: int, size: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, size)) + rng.normal(size=size)
    rows *= rng.uniform(0.1, 9, (count, 1))
    rows[count // 2] = 2 * rows[0]  # the same direction
    return rows.astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 63, 500])
def test_the_best_of_all_rows(tmp_path: Path, form, count: int):
    rows, queries = people(count), people(8, seed=1)
    names = [f"person {i % 9}" for i in range(count)]
    found = gallery.build(tmp_path / "g", rows, names, model="m", form=form).search(queries, 4)
    score, row = brute_force(normalize(rows), normalize(queries).astype(float), 4)
    np.testing.assert_array_equal(found.row, row)
    np.testing.assert_allclose(found.score, score, atol=1e-12)
    assert found.name == [[names[i] for i in each] for each in row]


def test_both_forms_give_the_same_bits_whatever_the_blocks(tmp_path: Path, monkeypatch):
    """Rows around one direction, so close that float32 sums cannot order them."""
    rng = np.random.default_rng(0)
    close = np.ones((400, 128)) + rng.normal(0, 1e-5, (400, 128))
    close[[3, 200, 399]] = close[50]
    names = list(map(str, range(400)))
    made = [gallery.build(tmp_path / f, close, names, model="m", form=f) for f in FORMS]
    queries = close[[50, 7]] + rng.normal(0, 1e-6, (2, 128))
    first = made[0].search(queries, 400)
    stored = np.array(made[0].embeddings)
    np.testing.assert_array_equal(
        first.row, brute_force(stored, normalize(queries).astype(float), 400)[1]
    )
    place = {int(row): i for i, row in enumerate(made[0].search(queries[:1], 400).row[0])}
    ties = [place[row] for row in (3, 50, 200, 399)]
    assert ties == list(range(ties[0], ties[0] + 4))  # equal rows follow each other in order
    for block in (64, 1000):
        monkeypatch.setattr(gallery, "BLOCK", block)
        for found in made:
            again = found.search(queries[:1], 400)
            assert again.row.tobytes() == first.row[:1].tobytes()
            assert again.score.tobytes() == first.score[:1].tobytes()


def test_few_rows_are_scored_again(tmp_path: Path):
    """Otherwise the scan was for nothing."""
    rows = np.random.default_rng(0).normal(size=(3000, 64))
    found = gallery.build(tmp_path / "g", rows, ["x"] * 3000, model="m", form="int8")
    (candidates,) = found._candidates(normalize(rows[:1]), 5)
    assert 5 <= len(candidates) <= 60


def test_a_gallery_is_written_in_parts_and_read_without_being_loaded(tmp_path: Path):
    rows = people(200)
    parts = (rows[i : i + 30] for i in range(0, 200, 30))
    gallery.build(tmp_path / "g", parts, list(map(str, range(200))), model="m", flip=True)
    found = Gallery(tmp_path / "g")
    assert (len(found), found.shape, found.flip, found.model) == (200, (200, 24), True, "m")
    np.testing.assert_array_equal(found.embeddings, normalize(rows))
    assert isinstance(found.embeddings.base, np.memmap)


def test_what_cannot_be_built_or_searched(tmp_path: Path):
    rows = people(9)
    bad = rows.copy()
    bad[3] = 0
    for embeddings, names, words in (
        (rows, ["a"], "at least 9 embeddings for 1 names"),
        (rows, ["a"] * 10, "9 embeddings for 10 names"),
        (rows, [], "at least one face"),
        (bad, ["a"] * 9, "zero or not finite"),
        (iter([rows[:4], rows[4:, :5]]), ["a"] * 9, "24 and 5 numbers"),
    ):
        with pytest.raises(DataError, match=words):
            gallery.build(tmp_path / "g", embeddings, names, model="m")
        assert not (tmp_path / "g").exists()
    found = gallery.build(tmp_path / "g", rows, ["a"] * 9, model="m")
    assert found.search(rows[:1], 99).row.shape == (1, 9)
    with pytest.raises(UserError, match="not empty"):
        gallery.build(tmp_path / "g", rows, ["a"] * 9, model="m")
    for queries, k, words in (
        (rows[:, :5], 1, r"queries are \(9, 5\); expected \(m, 24\)"),
        (rows * np.nan, 1, "not finite"),
        (rows, 0, "k must be at least 1"),
    ):
        with pytest.raises(DataError, match=words):
            found.search(queries, k)


@pytest.mark.parametrize("name", ["gallery.json", "names.json", "embeddings.npy", "int8.npy"])
def test_a_damaged_gallery_is_one_error(tmp_path: Path, name: str):
    gallery.build(tmp_path / "g", people(9), ["a"] * 9, model="m", form="int8")
    content = (tmp_path / "g" / name).read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        (tmp_path / "g" / name).unlink()
        (tmp_path / "g" / name).write_bytes(damaged)
        with pytest.raises(DataError, match="gallery"):
            Gallery(tmp_path / "g").search(people(1))
    with pytest.raises(DataError, match="not a gallery"):
        Gallery(tmp_path / "none")


def test_scales_that_are_no_numbers_are_one_error(tmp_path: Path):
    gallery.build(tmp_path / "g", people(200), ["a"] * 200, model="m", form="int8")
    np.save(tmp_path / "g" / "scales.npy", np.full(200, np.nan, np.float32))
    with pytest.raises(DataError, match="not finite: build the gallery again"):
        Gallery(tmp_path / "g").search(people(1))


class Blocks:
    """A model that needs no time: means of 16 blocks of the pixels."""

    input = ModelInput(embedding_size=16, digest="blocks")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), 16, -1).mean(2).astype(np.float32)

    def digest(self) -> str:
        return self.input.digest


def test_faces_are_found_by_an_embedder(tmp_path: Path):
    faces = np.random.default_rng(0).integers(0, 256, (40, 112, 112, 3), np.uint8)
    embedder = Embedder(Blocks(), batch_size=8)
    names = [f"{i}.png" for i in range(40)]
    made = embedder.build_gallery(tmp_path / "g", iter(faces), names, form="int8")
    found = embedder.search(tmp_path / "g", faces[[7, 31]], k=3)
    assert [each[0] for each in found.name] == ["7.png", "31.png"]
    np.testing.assert_allclose(found.score[:, 0], 1, atol=1e-6)
    again = embedder.search(made, embedder(faces[[7, 31]]), k=3)
    np.testing.assert_array_equal(again.row, found.row)
    with pytest.raises(UserError, match=r"gallery was made with flip=False"):
        Embedder(Blocks(), flip=True).search(made, faces[0])
    about = json.loads((tmp_path / "g" / "gallery.json").read_text())
    (tmp_path / "g" / "gallery.json").write_text(json.dumps({**about, "model": "other"}))
    with pytest.raises(UserError, match=r"gallery is of another model \(SHA-256 other"):
        embedder.search(tmp_path / "g", faces[0])
