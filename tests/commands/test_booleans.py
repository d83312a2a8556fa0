"""One style of boolean options in all commands; every earlier spelling is accepted."""

from pathlib import Path
from typing import Annotated

import pytest
import tyro

from arcface_jax.commands import data, embed, protocol
from arcface_jax.commands.embed import InferenceArguments
from arcface_jax.config import command_line, loading


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", True),
        ("--data.flip True", True),
        ("--data.flip", True),
        ("--data.flip=True", True),
        ("--data.flip False", False),
        ("--data.flip=False", False),
        ("--data.no-flip", False),
        ("--data.flip False --seed 3", False),
        ("--data.no-flip --data.flip True", True),
    ],
)
def test_a_recipe_takes_flags_with_and_without_a_value(words: str, expected: bool):
    assert loading.load(["demo", *words.split()]).data.flip is expected


def test_only_flags_lose_their_values():
    words = ["demo", "--workdir", "True", "--evaluation.targets", "False", "--logging.csv", "True"]
    config = loading.load(words)
    assert (config.workdir, config.evaluation.targets) == ("True", ("False",))
    assert config.logging.csv


def test_a_wrong_value_names_what_is_right(capsys):
    for words in (["--data.flip", "perhaps"], ["--data.flip=0"]):
        with pytest.raises(SystemExit) as stop:
            loading.load(["demo", *words])
        assert stop.value.code == 2
        assert "expected 'True' or 'False'; or write --data.flip or --data.no-flip" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--flip --normalized", (True, True)),
        ("--flip True --no-normalized", (True, False)),
        ("--no-flip --normalized False", (False, False)),
        ("", (False, False)),
    ],
)
def test_inference_takes_them_without_the_sections_name(words: str, expected):
    arguments = command_line.parse(InferenceArguments, words.split(), prog="x", description="")
    assert (arguments.images.flip, arguments.images.normalized) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [("", True), ("--mirrored False", False), ("--no-mirrored", False), ("--mirrored", True)],
)
def test_a_protocol_takes_them_beside_a_positional_argument(words: str, expected):
    arguments = command_line.parse(
        protocol.Arguments, ["groups", *words.split()], prog="x", description=""
    )
    assert arguments.options.flip is expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pack", "--renumber", "a", "b"], True),
        (["pack", "a", "b", "--renumber"], True),
        (["pack", "a", "b", "--no-renumber"], False),
        (["pack", "a", "b", "--renumber", "False"], False),
        (["pack", "True", "False"], False),
    ],
)
def test_a_tool_takes_them_before_and_after_its_paths(monkeypatch, capsys, words, expected):
    seen = {}

    def pack(path: data.TrainingSet, output: data.Output, renumber: bool = False) -> data.Values:
        """Stands for the tool."""
        seen.update(path=path, output=output, renumber=renumber)
        return {"files": []}

    monkeypatch.setattr(data, "pack", pack)
    assert data.main(words) == 0
    paths = [word for word in words[1:] if not word.startswith("-")][:2]
    assert seen == {"path": paths[0], "output": Path(paths[1]), "renumber": expected}


def test_every_boolean_is_shown_in_the_one_style(capsys):
    for call in (embed.inference, embed.embed, embed.verify):
        with pytest.raises(SystemExit):
            call(["--help"])
        assert "--flip, --no-flip" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        loading.load(["--help"])
    shown = capsys.readouterr().out
    assert "--data.flip, --data.no-flip" in shown
    assert "{True,False}" not in shown


def test_sections_may_be_annotated():
    named = Annotated[Path, tyro.conf.arg(metavar="P")]
    assert command_line._flags(named) == ()  # pyright: ignore[reportPrivateUsage]
