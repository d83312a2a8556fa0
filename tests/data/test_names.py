"""Which labels are numbers and which are names, and the table that a set keeps."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.data import names
from arcface_jax.errors import ImageError


def where(place: int) -> str:
    return f"list.csv, line {place + 1}"


# Labels, their identities, and the names; None where labels are numbers.
LABELS = {
    "dense": (["0", "1", "1", "2"], [0, 1, 1, 2], None),
    "from 1": (["1", "2", "3"], [1, 2, 3], None),
    "a gap": (["0", "5", "3"], [0, 5, 3], None),
    "im2rec's floats": (["0.000000", "1.0", "1."], [0, 1, 1], None),
    "leading zeros": (["0000045", "0000102", "0000045"], [0, 1, 0], ["0000045", "0000102"]),
    "one leading zero among numbers": (["1", "2", "03"], [1, 2, 0], ["03", "1", "2"]),
    "underscores": (["0_0_0000037", "1_0_0000000"], [0, 1], ["0_0_0000037", "1_0_0000000"]),
    "that collide without underscores": (
        ["1_11", "11_1", "111"],
        [2, 1, 0],
        ["111", "11_1", "1_11"],
    ),
    "of other digits": (["\u0661", "\u0662"], [0, 1], ["\u0661", "\u0662"]),
    "mixed": (["7", "ada", "7"], [0, 1, 0], ["7", "ada"]),
    "of other letters": (["Zoë", "adam", "李"], [0, 1, 2], ["Zoë", "adam", "李"]),
    "sparse numbers, by value": (["9000", "10000", "70"], [1, 2, 0], ["70", "9000", "10000"]),
    "staff numbers of 12 digits": (["491512345678", "13"], [1, 0], ["13", "491512345678"]),
    "hexadecimal": (["1e3", "0x10"], [1, 0], ["0x10", "1e3"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_numbers_only_if_plain_and_nearly_dense(kind: str):
    labels, expected, table = LABELS[kind]
    found = names.number(labels, where=where)
    assert found.labels.tolist() == expected and found.labels.dtype == np.int32
    assert found.num_classes == max(expected) + 1
    assert (None if found.names is None else list(found.names)) == table


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "", "1"], "line 2: has no label"),
        ([*"0123456", "20000000"], "line 8: label 20000000 is far beyond .* 20,000,001 classes"),
        (["ada", "bob", ""], "line 3: has no label"),
        (["0", "-1"], r"line 2: label -1\.0 is not an identity"),
        (["0", "0.5"], r"line 2: label 0\.5 is not an identity"),
        (["1", "nan"], "line 2: label nan is not an identity"),
    ],
)
def test_labels_that_are_no_identity_are_refused_with_the_line(labels, message: str):
    with pytest.raises(ImageError, match=message):
        names.number(labels, where=where)


def test_whole_numbers_follow_the_same_rule():
    declared = names.number_integers(np.array([7000, -1, 9]), where=where, count=7001)
    assert (declared.labels.tolist(), declared.num_classes) == ([7000, -1, 9], 7001)
    assert names.number(["9", "7000"], where=where, count=7001).labels.tolist() == [9, 7000]
    dense = names.number_integers(np.array([2, -1, 0]), where=where)
    assert (dense.labels.tolist(), dense.num_classes, dense.names) == ([2, -1, 0], 3, None)
    sparse = names.number_integers(np.array([7000, -1, 9, 7000]), where=where)
    assert sparse.labels.tolist() == [1, -1, 0, 1]
    assert sparse.names is not None and list(sparse.names) == ["9", "7000"]
    with pytest.raises(ImageError, match="line 9: label 16777215 is far beyond"):
        names.number_integers(np.array([*range(8), 16777215]), where=where)


AWKWARD = ["", "a\tb", "two\nlines", "back\\slash", "back\\nslash", "\x85", "Zoë 李", "\udcff"]


def test_the_table_comes_back_as_it_was_written(tmp_path: Path):
    names.write(tmp_path, AWKWARD)
    table = names.read(tmp_path, count=len(AWKWARD))
    assert table is not None and list(table) == AWKWARD
    assert list(pickle.loads(pickle.dumps(table))) == AWKWARD
    assert (tmp_path / "identities.txt").read_bytes().count(b"\n") == len(AWKWARD)


@pytest.mark.parametrize(
    ("text", "noted"),
    [(None, False), ("0\t0\n1\t1\n", False), ("0\tada\n", True), ("ada\nbob\n", True), ("", True)],
    ids=["no file", "numbers", "of another set", "another table", "empty"],
)
def test_what_is_no_table_of_names_is_not_used(tmp_path: Path, capsys, text, noted: bool):
    if text is not None:
        (tmp_path / "identities.txt").write_text(text)
    assert names.read(tmp_path, count=2) is None
    assert ("identities.txt is not a table of 2 lines" in capsys.readouterr().err) == noted


def test_names_of_several_sets_stay_apart():
    first, second = names.Names(["ada", "bob"]), names.Names(["bob", "eve"])
    joined = names.joined([(first, 2), (second, 2), (None, 1)])
    assert joined is not None and list(joined) == ["ada", "1:bob", "2:bob", "eve", "0"]
    assert names.joined([(None, 3), (None, 2)]) is None
