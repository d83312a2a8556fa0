"""Lists of pairs over a folder of images: what they name, and how a faulty one is refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_jax.config import Config, DataConfig, EvaluationConfig, SyntheticConfig
from arcface_jax.data.pairs.opening import open_file, open_for_runs, open_targets
from arcface_jax.data.synthetic.faces import verification_pairs
from arcface_jax.errors import ConfigError, DataError


def face(number: int, *, height: int = 112, width: int = 112) -> np.ndarray:
    blocks = np.random.default_rng(number).integers(0, 256, (7, 7, 3), np.uint8)
    return blocks.repeat(-(-height // 7), axis=0).repeat(-(-width // 7), axis=1)[:height, :width]


def put(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[:, :, ::-1])


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Ann has images 1 to 3, Bob 1 and 12; numbered 10 a person and 1 an image."""
    for name, offset, numbers in (("Ann_Lee", 0, (1, 2, 3)), ("Bob", 10, (1, 12))):
        for number in numbers:
            put(tmp_path / "faces" / name / f"{name}_{number:04d}.png", face(offset + number))
    return tmp_path / "faces"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


EXPECTED = np.stack([face(n) for n in (1, 3, 2, 11, 11, 22)])


@pytest.mark.parametrize(
    "text",
    [
        "Ann_Lee\t1\t3\nAnn_Lee\t2\tBob\t1\nBob\t1\t12\n",
        "\ufeffAnn_Lee 1 3\r\n\r\nAnn_Lee 2 Bob 1\r\nBob 1 12",
    ],
    ids=["tabs", "spaces, BOM, CRLF"],
)
def test_lfws_lists_name_a_person_and_numbers(people: Path, text: str):
    pairs = open_file(write(people, "pairs.txt", text))
    np.testing.assert_array_equal(pairs.images, EXPECTED)
    assert (pairs.name, pairs.same.tolist()) == ("pairs", [True, False, True])


@pytest.mark.parametrize("heading", ["2\t1\n", "2\n"], ids=["folds and pairs", "pairs"])
def test_the_first_line_announces_as_many_of_either_kind(people: Path, heading: str):
    lines = "Bob\t1\t12\nAnn_Lee\t1\t3\nAnn_Lee\t1\tBob\t1\n"
    whole = open_file(write(people, "pairs.txt", f"{heading}{lines}Ann_Lee\t2\tBob\t12\n"))
    assert whole.same.tolist() == [True, True, False, False]
    with pytest.raises(
        DataError, match=r"announces 2 .* has 2 of one person and 1 of two: .* truncated"
    ):
        open_file(write(people, "pairs.txt", heading + lines))


def test_csv_names_paths_and_says_same_or_not(people: Path, tmp_path: Path):
    absolute = people / "Ann_Lee" / "Ann_Lee_0002.png"
    text = (
        "first,second,is the same\n"
        "Ann_Lee/Ann_Lee_0001.png, Ann_Lee/Ann_Lee_0003.png, TRUE\n"
        f'"{absolute}",Bob/Bob_0001.png,0\n\nBob/Bob_0001.png,Bob/Bob_0012.png,1\n'
    )
    beside = open_file(write(people, "mine.csv", text))
    np.testing.assert_array_equal(beside.images, EXPECTED)
    assert (beside.name, beside.same.tolist()) == ("mine", [True, False, True])
    elsewhere = open_file(f"{write(tmp_path, 'mine.csv', text)}:{people}")
    np.testing.assert_array_equal(elsewhere.images, EXPECTED)


def test_a_heading_is_skipped_and_a_first_pair_is_not(people: Path):
    line = "Bob/Bob_0001.png,Bob/Bob_0012.png,1\n"
    assert len(open_file(write(people, "a.csv", line)).same) == 1
    with pytest.raises(DataError, match=r"line 1: .*,perhaps' is not a pair"):
        open_file(write(people, "a.csv", line.replace("1\n", "perhaps\n")))


def test_targets_of_training_are_lists_too_and_lie_in_the_data_folder(people: Path):
    write(people.parent, "pairs.txt", "Bob 1 12\n")
    (pairs,) = open_targets(["pairs.txt:faces"], DataConfig(path=str(people.parent)), seed=0)
    np.testing.assert_array_equal(pairs.images, EXPECTED[4:])
    with pytest.raises(DataError, match=r"no list of pairs at .*absent\.csv"):
        open_file("absent.csv", base=people)


def test_missing_files_are_named_with_their_lines(people: Path):
    lines = [f"Ann_Lee\t1\t{number}\n" for number in (3, *range(20, 27))]
    with pytest.raises(DataError, match=r"names 7 of 9 images") as raised:
        open_file(write(people, "pairs.txt", "".join(lines)))
    message = str(raised.value)
    assert "Ann_Lee_0020.jpg (line 2)" in message and "Ann_Lee_0024.jpg (line 6)" in message
    assert "Ann_Lee_0025" not in message and ", and 2 more; if" in message
    assert "pairs.txt:FOLDER" in message


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "Bob 1 12\nBob 1\n", r"line 2: 'Bob 1' is not a pair; .*name n m"),
        ("a.txt", "Bob 1 twelve\n", r"line 1: .* is not a pair"),
        ("a.txt", "Bob 1 Ann_Lee 2 3\n", r"line 1: .* is not a pair"),
        ("a.csv", "a.png,b.png,1\na.png,1\n", r"line 2: 'a\.png,1' is not a pair; .*path,path"),
        ("a.csv", "a.png,b.png,1\na.png,,1\n", r"line 2: .* is not a pair"),
        ("a.csv", "a.png,b.png,1\na.png,b.png,2\n", r"line 2: .* is not a pair"),
        ("a.csv", "left,right,same\n", r"names no pair"),
        ("a.txt", "\n", r"names no pair"),
        ("a.txt", "\xff\xfe", r"cannot read the list of pairs"),
    ],
)
def test_what_is_no_pair_is_named_by_its_line(people: Path, name: str, text: str, words: str):
    (people / name).write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=words):
        open_file(str(people / name))


def test_an_image_that_cannot_be_read_is_named(people: Path):
    (people / "Bob" / "Bob_0012.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"Bob_0012\.png: 10 bytes that are not an image"):
        open_file(write(people, "pairs.txt", "Bob 1 12\n"))


def test_other_sizes_are_refused(people: Path):
    put(people / "wide.png", face(0, height=112, width=200))
    with pytest.raises(DataError, match=r"wide.png is 200 x 112; expected an aligned face"):
        open_file(write(people, "a.csv", "wide.png,wide.png,1\n"))


def test_the_sets_of_several_runs_are_joined_and_each_is_found_where_its_run_has_it(people: Path):
    """One run trains on drawn faces, two on files: each set once, and as its run knows it."""
    write(people, "mine.csv", "Bob/Bob_0001.png,Bob/Bob_0012.png,1\n")
    drawn = SyntheticConfig(identities=9, pairs=20, pair_identities=5)
    runs = [
        Config(data=DataConfig(path=str(people)), evaluation=EvaluationConfig(targets=(target,)))
        for target in ("mine.csv", str(people / "mine.csv"))
    ]
    runs.append(
        Config(
            data=DataConfig(path="synthetic", synthetic=drawn),
            evaluation=EvaluationConfig(targets=("synthetic",)),
            seed=3,
        )
    )
    expected, _ = verification_pairs(seed=3, first_identity=9, identities=5, pairs=20)
    for targets in ((), ("mine.csv", "synthetic")):
        sets = open_for_runs(runs, targets)
        assert [pairs.name for pairs in sets] == ["mine", "synthetic"]
        np.testing.assert_array_equal(sets[1].images, expected)
    (people.parent / "mine.csv").write_text("faces/Bob/Bob_0001.png,faces/Bob/Bob_0001.png,1\n")
    other = Config(
        data=DataConfig(path=str(people.parent)), evaluation=EvaluationConfig(targets=("mine.csv",))
    )
    with pytest.raises(ConfigError, match="two sets have one name"):
        open_for_runs([*runs, other], ())


def test_a_set_next_to_a_list_of_images_is_found_in_any_case(people: Path):
    line = "Bob/Bob_0001.png,Bob/Bob_0012.png,1\n"
    write(people, "PAIRS.CSV", line)
    images = write(people, "train.csv", "Bob/Bob_0001.png,0\n")
    paths = (str(people / "Bob"), f"{people / 'Bob'},{images}")
    runs = [Config(data=DataConfig(path=path)) for path in paths]
    (found,) = open_for_runs(runs, ["PAIRS.CSV"])
    assert found.name == "PAIRS" and found.same.tolist() == [True]
    assert len(open_file(f"{write(people.parent, 'P.CSV', line)}:{people}").same) == 1
