"""Errors and notes name the options of the command that prints them."""

from pathlib import Path

import pytest
from commands import script
from witness import encode, face

from arcface_jax.commands import data, own_names
from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.pairs import bins
from arcface_jax.errors import DataError
from arcface_jax.training import validation

NAMES = {"data.path": "PATH", "data.label-index": "--label-index"}


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("set --data.path to", "set PATH to"),
        ("data.path /x is", "PATH /x is"),
        ("--data.label-index 1; data.label_index 2", "--label-index 1; --label-index 2"),
        ("metadata.path and --data.pathology and my/data.path", None),
    ],
)
def test_options_of_train_are_replaced(text: str, own: str | None):
    assert own_names(text, NAMES) == (text if own is None else own)


def failing(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        data.main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_data_tools_name_their_own(tmp_path: Path, capsys):
    assert "PATH /nowhere does not exist: set PATH to" in failing(capsys, "inspect", "/nowhere")
    assert "did you mean inspect?" in failing(capsys, "inspec", "/nowhere")
    (tmp_path / "a.csv").write_text("file,one,two\na.jpg,1,1\nb.jpg,1,2\nc.jpg,2,1\nd.jpg,2,2\n")
    message = failing(capsys, "pack", tmp_path / "a.csv", tmp_path / "out")
    assert "name it with --columns label=two" in message
    message = failing(capsys, "pack", tmp_path / "a.csv", tmp_path / "out", "--columns", "x")
    assert "--columns 'x' must be path=COLUMN" in message and "data." not in message


def test_a_list_of_pairs_is_no_training_set(tmp_path: Path):
    (tmp_path / "a.csv").write_text("first,second,same\na.jpg,b.jpg,1\nc.jpg,d.jpg,0\n")
    with pytest.raises(DataError, match=r"two columns of images, as a list of pairs"):
        open_source(DataConfig(path=str(tmp_path / "a.csv")), seed=0)


def test_a_misspelled_verification_set_has_a_suggestion(tmp_path: Path, capsys):
    (tmp_path / "lfw_dev.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"did you mean lfw_dev\.bin\? .*--evaluation\.targets"):
        bins.read_bin(tmp_path / "lfw_de.bin")
    words = ["--weight", "x.pth", "--pairs", str(tmp_path / "lfw_de.bin"), "--output", "c.json"]
    with pytest.raises(SystemExit):
        script("calibrate").main(words)
    assert "name an existing set with --pairs" in capsys.readouterr().err


def test_photographs_that_are_not_aligned_are_refused_before_a_run(tmp_path: Path):
    for number in range(12):
        path = tmp_path / "set" / str(number // 4) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # A third is aligned, which is too few; later two thirds are.
        path.write_bytes(encode(face(1, height=90 if number % 3 else 112, width=112)))
    source = open_source(DataConfig(path=str(tmp_path / "set")), seed=0)
    with pytest.raises(DataError, match=r"of 12 sampled images 8 are not 112 x 112.*data align"):
        validation.validate_data(source, "set")
    for number in (1, 4, 7, 10):
        path = tmp_path / "set" / str(number // 4) / f"{number}.png"
        path.write_bytes(encode(face(1)))
    validation.validate_data(source, "set")
