"""Every recipe loads, passes validation, and says exactly what it said before."""

import json
from pathlib import Path

import pytest

from arcface_jax import config as configs
from arcface_jax import config_files, validation

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_is_valid_and_unchanged(path, request):
    config = config_files.read_recipe(path)
    assert config.data.path or path.stem == "lfw_tiny"  # its data may lie anywhere
    complete = configs.replace(config, workdir="runs/x", data__path=config.data.path or "data/lfw")
    validation.validate(complete, num_devices=1)
    text = "".join(f"{k}: {json.dumps(v)}\n" for k, v in config_files.flatten(config).items())
    golden = GOLDEN / f"{path.stem}.txt"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "if intended: pytest tests/test_recipes.py --update-golden"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_docstring_has_the_command(path):
    text = path.read_text()
    assert f"python scripts/train.py configs/{path.name}" in text


def test_the_zoo_of_2021_is_as_published():
    recipe = config_files.read_recipe(ROOT / "configs" / "ms1mv3_r50.py")
    assert recipe.data.global_batch_size == 8 * 128
    assert configs.batch_norm_groups(recipe) == 8
    assert recipe.optimizer.learning_rate == pytest.approx(0.1 * 1024 / 512)
    assert (recipe.schedule.epochs, recipe.schedule.decay_epochs) == (25, (10, 16, 22))
    assert (recipe.head.loss, recipe.head.margin, recipe.head.gradient) == ("arcface", 0.5, "exact")
    recipe = config_files.read_recipe(ROOT / "configs" / "glint360k_r100.py")
    assert (recipe.schedule.epochs, recipe.schedule.decay_epochs) == (20, (8, 12, 15, 18))
    assert (recipe.head.loss, recipe.head.margin, recipe.model.network) == ("cosface", 0.4, "r100")
    validation.validate(configs.replace(recipe, workdir="runs/x"), num_devices=8)
