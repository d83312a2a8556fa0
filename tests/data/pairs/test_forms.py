"""Pair lists in the forms that people have, and flags in the words that files have for them."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_jax.data.pairs import flags, lists
from arcface_jax.data.pairs.bins import read_bin
from arcface_jax.data.pairs.opening import open_file
from arcface_jax.errors import DataError

JPEG = cv2.imencode(".jpg", np.zeros((112, 112, 3), np.uint8))[1].tobytes()
PAIRS = [  # two files and whether they show one person
    ("ada/ada_0001.jpg", "ada/ada_0002.jpg", True),
    ("ada/ada_0001.jpg", "bob/bob_0001.jpg", False),
    ("bob/bob_0001.jpg", "bob/bob_0003.jpg", True),
    ("bob/bob_0003.jpg", "ada/ada_0002.jpg", False),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in {file for left, right, _ in PAIRS for file in (left, right)}:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(JPEG)
    return tmp_path


def lines(form) -> str:
    return "".join(f"{form(i, a, b, same)}\n" for i, (a, b, same) in enumerate(PAIRS))


FORMS = {
    "label first": lines(lambda i, a, b, s: f"{int(s)} {a} {b}"),
    "label last": lines(lambda i, a, b, s: f"{a} {b} {int(s)}"),
    "label between": lines(lambda i, a, b, s: f"{a},{int(s)},{b}"),
    "tabs": lines(lambda i, a, b, s: f"{a}\t{b}\t{int(s)}"),
    "semicolons and a heading": "a;b;gleich\n" + lines(lambda i, a, b, s: f"{a};{b};{int(s)}"),
    "floats": "first,second,same\n" + lines(lambda i, a, b, s: f"{a},{b},{float(s)}"),
    "words": lines(lambda i, a, b, s: f"{a},{b},{'Same' if s else 'different'}"),
    "minus one": lines(lambda i, a, b, s: f"{a} {b} {1 if s else -1}"),
    "trailing blanks": lines(lambda i, a, b, s: f"{a} {b} {int(s)}  \t"),
    "trailing separators": lines(lambda i, a, b, s: f"{a},{b},{int(s)},,"),
    "an index": lines(lambda i, a, b, s: f"{i},{a},{b},{int(s)}"),
    "an index and a heading": ",x,y,issame\n" + lines(lambda i, a, b, s: f"{i},{a},{b},{int(s)}"),
    "folds beside": "fold,a,b,same\n" + lines(lambda i, a, b, s: f"{i // 2},{a},{b},{int(s)}"),
    "a constant beside": lines(lambda i, a, b, s: f"{a} {b} {int(s)} 1"),
    "backslashes": lines(lambda i, a, b, s: f"{a},{b},{int(s)}").replace("/", "\\"),
    "a byte order mark": "\ufeff" + lines(lambda i, a, b, s: f"{a},{b},{int(s)}"),
    "comments": "# mine\n" + lines(lambda i, a, b, s: f"{a} {b} {int(s)}") + "# end\n",
    "LFW's, as RFW has it": "ada\t1\t2\nada\t1\tbob\t1\nbob\t1\t3\nbob\t3\tada\t2\n",
    "LFW's from a spreadsheet": "name,imagenum1,imagenum2,\nada,1,2,\nada,1,bob,1\nbob,1,3,\n"
    "bob,3,ada,2\n",
    "a name and files": "ada ada_0001.jpg ada_0002.jpg\nada ada_0001.jpg bob bob_0001.jpg\n"
    "bob bob_0001.jpg bob_0003.jpg\nbob bob_0003.jpg ada ada_0002.jpg\n",
    "CPLFW's two lines": lines(lambda i, a, b, s: f"{a} {int(s)}\n{b} {int(s)}"),
    "CALFW's two lines": lines(lambda i, a, b, s: f"{a} {(i + 1) * s}\n{b} {(i + 1) * s}"),
    "two lines, label first": lines(lambda i, a, b, s: f"{int(s)},{a}\n{int(s)},{b}"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_names_the_same_pairs(folder: Path, form: str):
    for suffix in (".txt", ".csv"):
        (folder / f"p{suffix}").write_text(FORMS[form])
        found = lists.listed(folder / f"p{suffix}", folder)
        assert [(p.left, p.right, p.same) for p in found.pairs] == [
            (folder / a, folder / b, same) for a, b, same in PAIRS
        ]


def test_two_line_lists_are_put_into_ten_folds(folder: Path):
    same, other = PAIRS[0], PAIRS[1]
    text = "".join(f"{a} {int(s)}\n{b} {int(s)}\n" for a, b, s in [same] * 40 + [other] * 40)
    (folder / "p.txt").write_text(text)
    found = [pair.same for pair in lists.listed(folder / "p.txt", folder).pairs]
    assert found == ([True] * 4 + [False] * 4) * 10


@pytest.mark.parametrize(
    ("form", "lines", "ignored"),
    [
        ("label first", 4, "0 ignored"),
        ("floats", 5, "1 ignored (headings 1)"),
        ("comments", 6, "2 ignored (comment lines 2)"),
        ("LFW's from a spreadsheet", 5, "1 ignored (headings 1)"),
        ("CPLFW's two lines", 8, "0 ignored"),
    ],
)
def test_every_line_is_accounted_for(folder: Path, form: str, lines: int, ignored: str):
    (folder / "p.txt").write_text(FORMS[form])
    listing = open_file(f"{folder / 'p.txt'}:{folder}").listing
    assert listing is not None and listing.images == 4
    expected = f"p.txt: {lines} lines: 4 pairs (2 of one person) of 4 images used, {ignored}"
    assert listing.account == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{PAIRS[0][0]} 1\n{PAIRS[0][1]} 1\n{PAIRS[0][1]} 1\n", "line 3: 3 lines of one image"),
        (f"{PAIRS[0][0]} 1\n{PAIRS[0][1]} 0\n", "lines 1 and 2: .* two answers"),
        (f"{PAIRS[0][0]} {PAIRS[0][1]} maybe\n" * 2, "line 1: .* is not a pair"),
        (f"{PAIRS[0][0]} {PAIRS[0][1]} 1\n" * 3 + "ada bob 7\n", "line 4: 'ada bob 7' is not"),
    ],
)
def test_what_is_no_pair_is_named(folder: Path, text: str, message: str):
    (folder / "p.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        lists.listed(folder / "p.txt", folder)


FLAGS = {
    True: [1, 1.0, True, "1", "1.0", "True", "TRUE ", b"True", "yes", "same", np.int64(1)],
    False: [0, 0.0, False, "0", "-1", -1, "False", b"0", "no", "Different", np.bool_(False)],
    None: ["", "maybe", 7, 0.5, float("nan"), None, [1], "2"],
}


def test_flags_are_read_as_what_they_say():
    for expected, values in FLAGS.items():
        assert [flags.parse(value) for value in values] == [expected] * len(values)


@pytest.mark.parametrize(
    "same",
    [
        ["1", "0", "True", "False"],
        [b"1", b"0", b"1", b"0"],
        [1, -1, 1.0, 0.0],
        np.array([1, -1, 1, -1], ">i2"),
        np.array(["1", "0", "1", "0"]),
        np.array([b"True", b"False", b"True", b"False"]),
    ],
    ids=["words", "bytes", "minus one", "array", "array of text", "array of bytes"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_flags_of_a_bin_are_read_as_what_they_say(tmp_path: Path, same, protocol: int):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(([JPEG] * 8, same), protocol=protocol))
    assert read_bin(tmp_path / "a.bin").same.tolist() == [True, False] * 2


def test_a_flag_of_a_bin_that_says_nothing_is_refused(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(([JPEG] * 4, ["1", "maybe"])))
    with pytest.raises(DataError, match=r"a\.bin: 'maybe' does not tell"):
        read_bin(tmp_path / "a.bin")
