"""Verification sets that are made: balanced, seeded, ten folds, and in insightface's form."""

import io
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from witness import encode, face, smooth

from arcface_jax.commands import data as commands
from arcface_jax.config import DataConfig
from arcface_jax.data import images
from arcface_jax.data.opening import open_source
from arcface_jax.data.pairs import lists
from arcface_jax.data.pairs.bins import read_bin
from arcface_jax.data.tools import pair_sets
from arcface_jax.errors import DataError, ImageError, UserError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(90), np.arange(90) % 6 + 1))


@pytest.mark.parametrize("disjoint", [False, True])
def test_folds_are_balanced_true_and_without_repetition(disjoint: bool):
    chosen, same = pair_sets.draw(LABELS, pairs=200, seed=3, disjoint=disjoint)
    assert chosen.shape == (200, 2) and same.dtype == bool
    people = LABELS[chosen]
    np.testing.assert_array_equal(people[:, 0] == people[:, 1], same)
    assert np.all(chosen[:, 0] != chosen[:, 1])
    assert len({frozenset(pair) for pair in chosen.tolist()}) == 200
    np.testing.assert_array_equal(same.reshape(10, 20).sum(1), 10)
    folds = [set(fold.ravel()) for fold in people.reshape(10, 20, 2)]
    shared = any(folds[i] & folds[j] for i in range(10) for j in range(i))
    assert shared != disjoint
    # Everybody with two images comes before anybody comes twice.
    counts = np.bincount(people[same][:, 0], minlength=90)
    several = np.bincount(LABELS) > 1
    assert counts[several].max() - counts[several].min() <= 2 and not counts[~several].any()


def test_the_seed_decides():
    first = pair_sets.draw(LABELS, pairs=100, seed=0, disjoint=False)[0]
    np.testing.assert_array_equal(
        first, pair_sets.draw(LABELS, pairs=100, seed=0, disjoint=False)[0]
    )
    other = pair_sets.draw(LABELS, pairs=100, seed=1, disjoint=False)[0]
    assert np.mean(first == other) < 0.2


def test_all_pairs_of_one_person_can_be_used_up():
    labels = np.array([0] * 5 + [1, 2])
    chosen, same = pair_sets.draw(labels, pairs=20, seed=0, disjoint=False)
    found = {frozenset(pair) for pair in chosen[same].tolist()}
    assert found == {frozenset((i, j)) for i in range(5) for j in range(i)}
    with pytest.raises(DataError, match=r"10 pairs of one person \(1 identities.*20 are needed"):
        pair_sets.draw(labels, pairs=40, seed=0, disjoint=False)


def test_too_few_images_and_uneven_folds_are_refused():
    with pytest.raises(UserError, match=r"--pairs 30 must be a multiple of 20.*use 40"):
        pair_sets.draw(LABELS, pairs=30, seed=0, disjoint=False)
    with pytest.raises(DataError, match="1 identities, of which 10 pairs of two people"):
        pair_sets.draw(np.zeros(9, int), pairs=20, seed=0, disjoint=False)
    with pytest.raises(DataError, match=r"a fold with identities of its own has .*no --disjoint"):
        pair_sets.draw(LABELS[:40], pairs=400, seed=0, disjoint=True)


def test_the_file_is_the_pickle_that_insightface_loads(tmp_path: Path):
    for number in range(40):
        (tmp_path / f"p{number // 4:02d}").mkdir(exist_ok=True)
        file = tmp_path / f"p{number // 4:02d}" / f"{number:02d}.png"
        file.write_bytes(encode(face(number)))
    source = open_source(DataConfig(path=str(tmp_path)), seed=0)
    chosen, same = pair_sets.draw(source.labels(), pairs=40, seed=0, disjoint=False)
    pair_sets.from_source(source, chosen, same, tmp_path / "out" / "own.bin")
    with (tmp_path / "out" / "own.bin").open("rb") as file:
        bins, issame = pickle.load(file, encoding="bytes")
    assert bins == [encode(face(int(number))) for number in chosen.ravel()]
    assert issame == same.tolist() and {type(x) for x in issame} == {bool}
    read = read_bin(tmp_path / "out" / "own.bin")
    np.testing.assert_array_equal(read.images[7], face(int(chosen[3, 1])))
    np.testing.assert_array_equal(read.same, same)


def people_and_list(folder: Path, *, same: int = 30, different: int = 25) -> Path:
    """Person k has images 1 and 2, the latter large; the list has all same pairs first."""
    lines = []
    for k in range(same):
        (folder / f"p{k}").mkdir(parents=True)
        (folder / f"p{k}" / f"p{k}_0001.png").write_bytes(encode(face(k)))
        large = encode(smooth(k, height=160, width=130), "JPEG")
        (folder / f"p{k}" / f"p{k}_0002.jpg").write_bytes(large)
        lines.append(f"p{k}\t1\t2")
    lines += [f"p{k}\t1\tp{(k + 1) % same}\t2" for k in range(different)]
    path = folder.with_name("pairs.txt")
    path.write_text("\n".join(lines))
    return path


def squares(listed: Path, folder: Path) -> np.ndarray:
    """(2 n, 112, 112, 3) uint8: the images that a list names, as `read_bin` cuts them."""
    files = [
        file for pair in lists.listed(listed, folder).pairs for file in (pair.left, pair.right)
    ]
    return np.stack([images.square(images.read_file(file), where=str(file)) for file in files])


def test_a_list_becomes_the_set_that_it_names(tmp_path: Path):
    listed = people_and_list(tmp_path / "faces")
    target, output = f"{listed}:{tmp_path / 'faces'}", tmp_path / "a.bin"
    done = commands.pairs(target, output)
    assert (done["pairs"], done["images"]) == (55, 60)
    with output.open("rb") as file:
        bins, issame = pickle.load(file, encoding="bytes")
    assert issame == [True] * 30 + [False] * 25
    assert bins[0] == encode(face(0)) and bins[62] == encode(face(1))  # as they are stored
    assert PIL.Image.open(io.BytesIO(bins[1])).size == (112, 112)  # insightface wants squares
    np.testing.assert_array_equal(read_bin(output).images, squares(listed, tmp_path / "faces"))
    assert read_bin(output).same.tolist() == issame
    comma = tmp_path / "pairs.csv"
    comma.write_text("p0/p0_0001.png,p0/p0_0002.jpg,1\np0/p0_0001.png,p1/p1_0001.png,0\n")
    other = tmp_path / "b.bin"
    assert commands.pairs(f"{comma}:{tmp_path / 'faces'}", other)["images"] == 3
    np.testing.assert_array_equal(read_bin(other).images[3], face(1))
    with pytest.raises(UserError, match=r"b\.bin exists: name a new file"):
        commands.pairs(target, other)


def test_a_balanced_part_of_a_list(tmp_path: Path):
    listed = people_and_list(tmp_path / "faces")
    target, output = f"{listed}:{tmp_path / 'faces'}", tmp_path / "a.bin"
    commands.pairs(target, output, pairs=40, seed=1)
    whole, part = squares(listed, tmp_path / "faces"), read_bin(output)
    same = [pair.same for pair in lists.listed(listed, tmp_path / "faces").pairs]
    np.testing.assert_array_equal(part.same.reshape(10, 4).sum(1), 2)
    known = {
        (image.tobytes(), other.tobytes()): is_same
        for image, other, is_same in zip(whole[::2], whole[1::2], same, strict=True)
    }
    chosen = [
        (a.tobytes(), b.tobytes()) for a, b in zip(part.images[::2], part.images[1::2], strict=True)
    ]
    assert len(set(chosen)) == 40
    assert [known[pair] for pair in chosen] == part.same.tolist()
    commands.pairs(target, tmp_path / "b.bin", pairs=40, seed=1)
    assert (tmp_path / "b.bin").read_bytes() == output.read_bytes()
    with pytest.raises(DataError, match="30 pairs of one person and 25 of two, and --pairs 60"):
        commands.pairs(target, tmp_path / "c.bin", pairs=60)
    with pytest.raises(UserError, match="--disjoint does not apply to pair lists"):
        commands.pairs(target, tmp_path / "c.bin", disjoint=True)


def test_damaged_images_do_not_get_into_a_set(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "faces" / name).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "faces" / name / f"{number}.png").write_bytes(encode(face(number)))
    cut = tmp_path / "faces" / "a" / "3.png"
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"a/3\.png"):
        commands.pairs(str(tmp_path / "faces"), tmp_path / "a.bin", pairs=20)
    assert not (tmp_path / "a.bin").exists()
