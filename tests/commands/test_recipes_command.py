"""Recipes and notebooks from anywhere: found by name, described, copied, never overwritten."""

import json
from pathlib import Path

import pytest

from arcface_jax import cli
from arcface_jax.commands import recipes, write_new
from arcface_jax.config import loading
from arcface_jax.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]


def result(text: str) -> dict:
    return json.loads(text.splitlines()[-1].removeprefix("RESULT "))


def test_a_recipe_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    by_path = loading.read_recipe(ROOT / "configs" / "ms1mv3_r50.py")
    monkeypatch.chdir(tmp_path)
    assert loading.load(["ms1mv3_r50"]) == by_path
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "demo.py").read_text())
    assert loading.load(["mine.py"]) == loading.load(["demo"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ms1mv3_r5", "there is no recipe ms1mv3_r5: did you mean ms1mv3_r50"),
        ("ms1mv3_r50.pyy", "did you mean ms1mv3_r50"),
        ("configs/ms1mv3_r05.py", "no recipe at configs/ms1mv3_r05.py: did you mean ms1mv3_r50"),
        ("nothing_like_it_at_all", "no recipe nothing_like_it_at_all: `arcface-jax recipes`"),
    ],
)
def test_a_wrong_name_is_answered_with_what_is_near(name, expected):
    with pytest.raises(ConfigError) as error:
        loading.load([name])
    assert expected in str(error.value)


def test_all_recipes_are_listed_with_network_data_and_figures(capsys):
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    listed = result(printed)["recipes"]
    assert set(listed) == {path.stem for path in (ROOT / "configs").glob("*.py")}
    about = listed["ms1mv3_r50"]
    assert (about["network"], about["data"]) == ("r50", "data/ms1m-retinaface-t1")
    assert "94.79 / 96.46" in about["figures"] and "python" not in about["figures"]
    assert all(about["figures"] for about in listed.values())
    assert "ms1mv3_r50 " in printed and "94.79 / 96.46" in printed


def test_a_recipe_is_shown_and_copied_but_replaces_nothing(tmp_path, capsys):
    assert cli.main(["recipes", "demo"]) == 0
    assert "def get_config()" in capsys.readouterr().out
    copied = tmp_path / "new" / "mine.py"
    assert cli.main(["recipes", "demo", "--copy", str(copied)]) == 0
    assert result(capsys.readouterr().out)["files"] == [str(copied)]
    assert loading.read_recipe(copied) == loading.read_recipe("demo")
    copied.write_text("mine")
    for words in (["demo", "--copy", str(copied)], ["demo", "--copy", "x"], ["--copy", "y.py"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["recipes", *words])
        assert stop.value.code == 2
    assert "exists already" in capsys.readouterr().err
    assert copied.read_text() == "mine"


def test_every_recipe_shows_its_settings_and_stays_the_same_as_a_copy(tmp_path):
    for name, path in loading.recipe_files().items():
        text = recipes.text_of(path)
        (tmp_path / path.name).write_text(text)
        assert loading.read_recipe(tmp_path / path.name) == loading.read_recipe(name), name
        assert "Config(" in text and "arcface_jax.config.recipes" not in text, name
    text = recipes.text_of(loading.find_recipe("ms1mv3_r50"))
    assert "learning_rate=0.2," in text and "global_batch_size=1024," in text
    assert text.startswith('"""r50 on MS1MV3') and "94.79 / 96.46" in text
    assert "import dataclasses" not in recipes.text_of(loading.find_recipe("ms1mv3_mbf_from_r100"))


def test_a_failed_copy_leaves_nothing_that_blocks_the_next(tmp_path):
    (tmp_path / "2").write_text("mine")
    with pytest.raises(UserError, match="2 exists already"):
        write_new({tmp_path / "1": b"1", tmp_path / "2": b"2"})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    (tmp_path / "2").unlink()
    with pytest.raises(UserError, match=r"cannot write .*File name too long"):
        write_new({tmp_path / "1": b"1", tmp_path / ("x" * 300): b"2"})
    with pytest.raises(TypeError):  # an error in the middle of a file
        write_new({tmp_path / "1": "text"})  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_notebooks_are_copied_but_replace_nothing(tmp_path, capsys):
    assert cli.main(["notebooks"]) == 0
    names = result(capsys.readouterr().out)["notebooks"]
    assert "explore_embeddings" in names
    assert cli.main(["notebooks", "--copy", str(tmp_path / "n")]) == 0
    assert {path.stem for path in (tmp_path / "n").iterdir()} == set(names)
    with pytest.raises(SystemExit) as stop:
        cli.main(["notebooks", "--copy", str(tmp_path / "n")])
    assert stop.value.code == 2


def test_the_demo_is_a_recipe_with_a_workdir_of_its_own(monkeypatch):
    from arcface_jax.commands import Result, train

    seen = []
    monkeypatch.setattr(train, "_train", lambda config, **_: seen.append(config) or Result())
    assert cli.main(["demo", "--seed", "4"]) == 0
    assert cli.main(["demo", "--workdir", "elsewhere"]) == 0
    assert [config.workdir for config in seen] == ["runs/demo", "elsewhere"]
    assert seen[0].seed == 4 and seen[0].data.path == "synthetic"
