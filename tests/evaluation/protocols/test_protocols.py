"""Retrieval, groups and labeled faces, against plain loops; odd input is named."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_jax.errors import DataError
from arcface_jax.evaluation import roc
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.evaluation.protocols import groups, labeled, reports, retrieval
from arcface_jax.evaluation.protocols.labeled import Labeled
from arcface_jax.evaluation.verification import Verification


class Mean:
    """A face's mean color and that of its left half: nothing that is trained."""

    def __call__(self, images: np.ndarray, /) -> np.ndarray:
        left = images[:, :, :56].mean(axis=(1, 2))
        return np.concatenate([images.mean(axis=(1, 2)), left], axis=1).astype(np.float32)

    input = ModelInput(embedding_size=6, digest="mean")

    def digest(self) -> str:
        return self.input.digest


@pytest.mark.parametrize("seed", range(8))
def test_ranks_equal_plain_loops_with_several_mates_and_distractors(seed: int):
    rng = np.random.default_rng(seed)

    def faces(count: int, *, people: int = 12) -> Labeled:
        # Corners of a cube: many exact ties.
        vectors = rng.choice([-1.0, 1.0], (count, 4)).astype(np.float32)
        return Labeled(vectors, rng.integers(0, people, count).astype(str))

    gallery, distractors = faces(60), faces(40)  # distractors whose names seem to be the gallery's
    probes = faces(30)
    known = np.isin(probes.people, gallery.people)
    probes = Labeled(probes.features[known], probes.people[known])
    found = retrieval.retrieve(probes, gallery, distractors=distractors)
    ranks = []
    for vector, person in zip(probes.features, probes.people, strict=True):
        known = zip(gallery.features, gallery.people, strict=True)
        scores = [(float(vector @ v), p) for v, p in known]
        scores += [(float(vector @ v), "distractor") for v in distractors.features]
        best = max(score for score, p in scores if p == person)
        ranks.append(1 + sum(score >= best for score, p in scores if p != person))
    assert found.rank.tolist() == ranks
    assert found.accuracy == {k: np.mean(np.array(ranks) <= k) for k in (1, 5, 10, 20)}
    assert (found.probes, found.gallery, found.distractors) == (len(probes.people), 60, 40)


def test_probes_that_cannot_be_found_are_named():
    vectors = np.eye(2, dtype=np.float32)
    gallery = Labeled(vectors, np.array(["Ann", "Bob"]))
    with pytest.raises(DataError, match=r"1 of 2 probes have no image in the gallery.*'Cid'"):
        retrieval.retrieve(Labeled(vectors, np.array(["Ann", "Cid"])), gallery)
    with pytest.raises(DataError, match="2 of 2 probes"):
        retrieval.retrieve(
            Labeled(vectors, np.array(["", ""])), Labeled(vectors, np.array(["", "b"]))
        )


def write_faces(folder: Path) -> None:
    for place, (person, side) in enumerate([("Ann", 112), ("Ann", 112), ("Bob", 50), ("", 112)]):
        (folder / person).mkdir(parents=True, exist_ok=True)
        image = np.full((side, side, 3), 20 * place + 10, np.uint8)
        cv2.imwrite(str(folder / person / f"{place}.png"), image)


def test_a_folder_and_a_list_of_its_images_give_the_same(tmp_path: Path):
    write_faces(tmp_path / "faces")
    folder = labeled.read(tmp_path / "faces", Mean, output=tmp_path / "one")
    assert folder.people.tolist() == ["", "Ann", "Ann", "Bob"]
    np.testing.assert_array_equal(folder.features[:, 0], [140, 20, 60, 100])  # mirrored: twice
    listed = tmp_path / "faces" / "list.txt"
    listed.write_text("3.png\nAnn/0.png\tAnn\nAnn/1.png Ann\n\nBob/2.png\tBob\n")
    other = labeled.read(listed, Mean, output=tmp_path / "two")
    assert other.people.tolist() == folder.people.tolist()
    np.testing.assert_array_equal(other.features, folder.features)
    plain = labeled.read(listed, Mean, output=tmp_path / "two", flip=False)
    np.testing.assert_array_equal(plain.features[:, 0], [70, 10, 30, 50])
    used = "4 images used of 2 identities"
    assert folder.account() == f"4 files: {used}, 0 ignored, 0 unreadable"
    assert other.account() == f"4 lines: {used}, 0 ignored, 0 unreadable"


def test_a_list_may_have_any_encoding_separator_and_a_header(tmp_path: Path):
    write_faces(tmp_path)
    text = "# mine\nimage;person\nAnn\\0.png;Zoë Lee\nBob/2.png;'Bob'\n"
    (tmp_path / "list.csv").write_text(text, encoding="utf-16")
    found = labeled.read(tmp_path / "list.csv", Mean, output=tmp_path / "out")
    assert found.people.tolist() == ["Zoë Lee", "Bob"]
    line = "2 ignored (comment lines 1, headings 1), 0 unreadable"
    assert found.account() == f"4 lines: 2 images used of 2 identities, {line}"


def test_a_list_may_name_images_by_absolute_paths(tmp_path: Path):
    write_faces(tmp_path / "faces")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/faces/Ann/0.png Ann\nfaces/Bob/2.png Bob\n")
    found = labeled.read(listed, Mean, output=tmp_path / "out")
    np.testing.assert_array_equal(found.features[:, 0], [20, 100])
    listed.write_text(f"{tmp_path}/faces/Ann/1.png Ann\nfaces/Bob/2.png Bob\n")
    with pytest.raises(DataError, match="other settings"):
        labeled.read(listed, Mean, output=tmp_path / "out")


def test_features_of_an_npz_need_no_network(tmp_path: Path):
    path = tmp_path / "f.npz"
    np.savez(path, features=np.eye(3), labels=np.array([4, 5, 4]))
    found = labeled.read(path, pytest.fail, output=tmp_path)  # pyright: ignore[reportArgumentType]  # never called
    assert found.people.tolist() == ["4", "5", "4"]
    assert found.features.dtype == np.float32


def test_input_that_is_no_such_list_is_named(tmp_path: Path):
    def read(path: Path) -> Labeled:
        return labeled.read(path, Mean, output=tmp_path / "out")

    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        read(tmp_path / "empty")
    for name in ("gone.txt", "gone.npz"):
        with pytest.raises(DataError, match="does not exist"):
            read(tmp_path / name)
    (tmp_path / "bad.txt").write_text("a.png Ann\nb.png Ann Lee\n")
    with pytest.raises(DataError, match=r"bad\.txt, line 2: 'b.png Ann Lee'"):
        read(tmp_path / "bad.txt")
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(DataError, match=r"none\.txt lists no images"):
        read(tmp_path / "none.txt")
    (tmp_path / "lost.txt").write_text("a.png Ann\n")
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        read(tmp_path / "lost.txt")
    np.savez(tmp_path / "x.npz", features=np.eye(3))
    with pytest.raises(DataError, match="expected `features`"):
        read(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", features=np.full((2, 2), np.nan), labels=[1, 2])
    with pytest.raises(DataError, match="finite numbers"):
        read(tmp_path / "x.npz")


ODD_ARRAYS = {
    "labels of objects": (np.eye(2), np.array(["a", "b"], object), "Object arrays"),
    "text": (np.array([["a", "b"]]), np.array(["a"]), r"\(1, 2\) <U1 .*expected \(n, D\) numbers"),
    "complex": (np.eye(2) * 1j, np.array(["a", "b"]), "complex128"),
    "no faces": (np.ones((0, 4)), np.array([], str), "n and D at least 1"),
    "no width": (np.ones((2, 0)), np.array(["a", "b"]), "n and D at least 1"),
    "too large": (np.full((1, 2), 1e300), np.array(["a"]), "finite numbers"),
    "labels of dates": (np.eye(1), np.array(["2020"], "M8[Y]"), "datetime64"),
}


@pytest.mark.parametrize("case", ODD_ARRAYS)
def test_odd_arrays_in_an_npz_are_one_line(tmp_path: Path, case: str):
    features, labels, expected = ODD_ARRAYS[case]
    np.savez(tmp_path / "f.npz", features=features, labels=labels)
    with pytest.raises(DataError, match=rf"f\.npz.*{expected}") as error:
        labeled.read(tmp_path / "f.npz", Mean, output=tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_npz_is_one_line(tmp_path: Path):
    path = tmp_path / "f.npz"
    np.savez(path, features=np.eye(2), labels=np.array(["a", "b"]))
    whole = path.read_bytes()
    np.save(tmp_path / "f.npy", np.eye(2))
    array = (tmp_path / "f.npy").read_bytes()
    for content in (b"", b"PK\x03\x04 broken", whole[: len(whole) // 2], array, b"\x80\x04N."):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"f\.npz") as error:
            labeled.read(path, Mean, output=tmp_path)
        assert "\n" not in str(error.value)


def test_people_in_an_npz_may_be_bytes_and_other_arrays_are_not_read(tmp_path: Path):
    names = np.array(["Zoë".encode(), b"Bob"])
    odd = np.array([{}], object)
    np.savez(tmp_path / "f.npz", features=np.eye(2), labels=names, odd=odd)
    assert labeled.read(tmp_path / "f.npz", Mean, output=tmp_path).people.tolist() == ["Zoë", "Bob"]


def test_features_of_another_length_and_no_probes_are_named():
    people = np.array(["a", "b"])
    wide, narrow = (Labeled(np.ones((2, n), np.float32), people) for n in (8, 4))
    with pytest.raises(DataError, match=r"probes have features of length 8, the gallery of len.*4"):
        retrieval.retrieve(wide, narrow)
    with pytest.raises(DataError, match="the distractors of length 4"):
        retrieval.retrieve(wide, wide, distractors=narrow)
    with pytest.raises(DataError, match="no probes"):
        retrieval.retrieve(Labeled(wide.features[:0], people[:0]), wide)


def result(name: str, accuracy: float, *, shift: float, seed: int = 0) -> Verification:
    rng = np.random.default_rng(seed)
    same = np.arange(2000) % 2 == 0
    distance = np.where(same, 0.8, 1.6) + shift + 0.2 * rng.normal(size=2000)
    return Verification(
        name=name,
        accuracy=accuracy,
        accuracy_std=0.0,
        interval=(0.0, 1.0),
        threshold=1.2,
        auc=1.0,
        eer=0.0,
        tars=tuple(roc.tar_at_far(-distance, same, fars=[0.1])),
        fold_tar=1.0,
        xnorm=1.0,
        norms=np.ones(4),
        mean_cosine=0.0,
        effective_rank=9.0,
        distance=distance,
        same=same,
    )


def test_the_bias_of_groups_is_as_counted_by_hand():
    """Mean 94.6375; deviations 1.5425, 0.0325, -0.9175, -0.6575, whose squares add up to 3.6547."""
    names = ("Caucasian", "Indian", "Asian", "African")
    accuracies = (0.9618, 0.9467, 0.9372, 0.9398)
    shifts = (0, 0.1, -0.4, 0)
    results = [
        result(name, accuracy, shift=shift, seed=seed)
        for seed, (name, accuracy, shift) in enumerate(zip(names, accuracies, shifts, strict=True))
    ]
    found = groups.bias(results)
    assert 100 * found.mean == pytest.approx(94.6375)
    assert 100 * found.std == pytest.approx((3.6547 / 3) ** 0.5, abs=1e-4)
    assert found.skewed_error_ratio == pytest.approx(6.28 / 3.82)
    fars = {name: far for name, (far, _) in found.at_one_threshold.items()}
    assert sum(fars.values()) / 4 <= found.far == 1e-3
    assert max(fars, key=fars.__getitem__) == "Asian"  # its distances are the smallest
    for name, (far, tar) in found.at_one_threshold.items():
        (group,) = [r for r in results if r.name == name]
        accepted = 1 - group.distance / 2 >= found.threshold
        assert (far, tar) == (accepted[~group.same].mean(), accepted[group.same].mean())
    metrics = groups.metrics(results, found)
    assert metrics["eval/groups/std"] == found.std
    assert metrics["eval/African/accuracy"] == 0.9398
    assert groups.bias([result("a", 1.0, shift=0)] * 2).skewed_error_ratio is None


def test_one_group_is_no_comparison():
    with pytest.raises(DataError, match="at least two"):
        groups.bias([result("a", 0.9, shift=0)])


def test_all_pairs_leave_out_faces_of_nobody():
    rng = np.random.default_rng(0)
    people = np.array(["a", "b", "c", ""] * 8)
    vectors = rng.normal(size=(32, 8)).astype(np.float32)
    report = reports.all_pairs(Labeled(vectors, people), fars=(0.1, 1e-6))
    named = people != ""
    unit = vectors[named] / np.linalg.norm(vectors[named], axis=1, keepdims=True)
    upper = np.triu_indices(24, 1)
    score, same = (unit @ unit.T)[upper], (people[named][:, None] == people[named])[upper]
    (expected,) = roc.tar_at_far(score, same, fars=[0.1])
    assert report.metrics == {"eval/all_to_all/tar@far=1e-1": expected.tar}
    assert "1e-6 (needs 1,000,000)" in report.notes[1]
