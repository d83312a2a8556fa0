"""Every recipe loads, passes validation, and states what its golden text has."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from arcface_jax import config as configs
from arcface_jax.config import Config, loading
from arcface_jax.training import validation

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted((ROOT / "configs").glob("*.py"))
GOLDEN_NAMES = {"defaults", *(path.stem for path in RECIPES)}
# Recipes whose data lie anywhere.
ANYWHERE = ("lfw_tiny", "lfw_tiny_from_teacher", "small_own")
UPDATE = "if intended: pytest tests/config/test_recipes.py --update-golden"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_is_valid_and_unchanged(path, request):
    config = loading.read_recipe(path)
    assert config.data.path or path.stem in ANYWHERE
    complete = configs.replace(config, workdir="runs/x", data__path=config.data.path or "data/lfw")
    if path.stem == "small_own":
        complete = configs.replace(complete, init_from="weights.onnx")  # which are the user's
    validation.validate(complete, num_devices=1)
    changed = loading.changed_settings(config)
    compare(path.stem, {name: value for name, (value, _) in changed.items()}, request)


def test_the_defaults_are_unchanged(request):
    compare("defaults", loading.flatten(Config()), request)


def test_every_golden_text_has_a_recipe(request):
    stale = [path for path in GOLDEN.glob("*.txt") if path.stem not in GOLDEN_NAMES]
    if request.config.getoption("--update-golden"):
        for path in stale:
            path.unlink()
    else:
        assert stale == [], UPDATE


def compare(name: str, settings: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Compares settings with a golden text, or writes it."""
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())
    golden = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text(), UPDATE


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_docstring_has_command_hardware_and_figures(path):
    text = path.read_text()
    assert f"python scripts/train.py configs/{path.name}" in text
    docstring = text.split('"""')[1]
    assert "GPUs with" in docstring or "one GPU" in docstring or "cores" in docstring
    assert re.search("Published|Measured|No\\spublished figures", docstring)


def test_the_zoo_of_2021_is_as_published():
    recipe = loading.read_recipe(ROOT / "configs" / "ms1mv3_r50.py")
    assert recipe.data.global_batch_size == 8 * 128
    assert configs.batch_norm_groups(recipe) == 8
    assert recipe.optimizer.learning_rate == pytest.approx(0.1 * 1024 / 512)
    assert (recipe.schedule.epochs, recipe.schedule.decay_epochs) == (25, (10, 16, 22))
    assert (recipe.head.loss, recipe.head.margin, recipe.head.gradient) == ("arcface", 0.5, "exact")
    recipe = loading.read_recipe(ROOT / "configs" / "glint360k_r100.py")
    assert (recipe.schedule.epochs, recipe.schedule.decay_epochs) == (20, (8, 12, 15, 18))
    assert (recipe.head.loss, recipe.head.margin, recipe.model.network) == ("cosface", 0.4, "r100")
    validation.validate(configs.replace(recipe, workdir="runs/x"), num_devices=8)


# insightface's own configurations: images per GPU x GPUs, rate, decay, epochs, warm-up, sample
# rate; ArcFace 0.5 on MS1M, CosFace 0.4 elsewhere.
SGD = {
    "ms1mv2_r50": (128, 8, 0.1, 5e-4, 20, 0, 1),
    "ms1mv2_r100": (128, 8, 0.1, 5e-4, 20, 0, 1),
    "ms1mv2_mbf": (128, 8, 0.1, 1e-4, 40, 0, 1),
    "ms1mv3_mbf": (128, 8, 0.1, 1e-4, 40, 0, 1),
    "ms1mv3_r50_polynomial": (128, 8, 0.1, 5e-4, 20, 0, 1),
    "ms1mv3_r100_polynomial": (128, 8, 0.1, 5e-4, 20, 0, 1),
    "ms1mv3_r50_onegpu": (128, 1, 0.02, 5e-4, 20, 0, 1),
    "glint360k_mbf": (128, 8, 0.1, 1e-4, 20, 0, 1),
    "glint360k_r50_polynomial": (128, 8, 0.1, 1e-4, 20, 0, 1),
    "glint360k_r100_polynomial": (128, 8, 0.1, 1e-4, 20, 0, 1),
    "wf4m_mbf": (128, 8, 0.1, 1e-4, 20, 0, 1),
    "wf4m_r50": (128, 8, 0.1, 5e-4, 20, 0, 1),
    "wf4m_r100": (128, 8, 0.1, 5e-4, 20, 0, 1),
    "wf12m_mbf": (128, 8, 0.1, 1e-4, 20, 0, 1),
    "wf12m_r50": (128, 8, 0.1, 5e-4, 20, 0, 1),
    "wf12m_r100": (128, 8, 0.1, 5e-4, 20, 0, 1),
    "wf12m_pfc02_r100": (128, 8, 0.1, 5e-4, 20, 0, 0.2),
    "wf12m_flip_r50": (128, 8, 0.1, 5e-4, 20, 2, 1),
    "wf12m_flip_pfc01_filter04_r50": (128, 8, 0.1, 5e-4, 20, 2, 0.1),
    "wf12m_conflict_r50": (128, 8, 0.1, 5e-4, 20, 2, 1),
    "wf12m_conflict_r50_pfc03_filter04": (128, 8, 0.1, 5e-4, 20, 2, 0.3),
    "wf42m_pfc03_32gpu_r18": (128, 32, 0.4, 5e-4, 20, 2, 0.3),
    "wf42m_pfc03_32gpu_r50": (128, 32, 0.4, 5e-4, 20, 2, 0.3),
    "wf42m_pfc03_32gpu_r100": (128, 32, 0.4, 5e-4, 20, 2, 0.3),
    "wf42m_pfc03_32gpu_r200": (128, 32, 0.4, 5e-4, 20, 2, 0.3),
    "wf42m_pfc02_32gpus_r50_bs4k": (128, 32, 0.4, 5e-4, 20, 2, 0.2),
    "wf42m_pfc02_r100_32gpus": (128, 32, 0.4, 5e-4, 20, 2, 0.2),
    "wf42m_pfc02_r100": (128, 8, 0.1, 5e-4, 20, 0, 0.2),
    "wf42m_pfc02_r100_16gpus": (128, 16, 0.2, 5e-4, 20, 2, 0.2),
    "wf42m_pfc02_16gpus_r100": (256, 16, 0.3, 5e-4, 20, 1, 0.2),
    "wf42m_pfc0008_32gpu_r100": (512, 32, 0.4, 5e-4, 20, 2, 0),
    "wf42m_pfc02_8gpus_r50_bs4k": (512, 8, 0.4, 5e-4, 20, 2, 0.2),
    "wf42m_pfc02_16gpus_r50_bs8k": (512, 16, 0.6, 5e-4, 20, 4, 0.2),
    "wf42m_pfc02_16gpus_mbf_bs8k": (512, 16, 0.4, 1e-4, 20, 2, 0.2),
}
ADAMW = {
    "wf42m_pfc03_40epoch_64gpu_vit_t": (384, 64, 1e-3, 0.1, 40, 4, 0.3),
    "wf42m_pfc03_40epoch_64gpu_vit_s": (384, 64, 1e-3, 0.1, 40, 4, 0.3),
    "wf42m_pfc03_40epoch_64gpu_vit_b": (384, 64, 1e-3, 0.1, 40, 4, 0.3),
    "wf42m_pfc03_40epoch_64gpu_vit_l": (384, 64, 1e-3, 0.1, 40, 4, 0.3),
    "wf42m_pfc03_40epoch_8gpu_vit_b": (256, 8 * 12, 1e-3, 0.1, 40, 4, 0.3),
    "wf42m_pfc03_40epoch_8gpu_vit_t": (512, 8, 1e-3, 0.1, 40, 4, 0.3),
    "wf42m_pfc05_vit_h": (768, 8, 1e-3, 0.1, 16, 2, 0.5),
}


@pytest.mark.parametrize("name", [*SGD, *ADAMW])
def test_todays_recipes_are_as_insightface_has_them(name):
    recipe = loading.read_recipe(ROOT / "configs" / f"{name}.py")
    per_gpu, gpus, rate, decay, epochs, warmup, sample_rate = (SGD | ADAMW)[name]
    assert recipe.data.global_batch_size == per_gpu * gpus
    assert configs.batch_norm_groups(recipe) == gpus
    optimizer, schedule, head = recipe.optimizer, recipe.schedule, recipe.head
    assert optimizer.kind == ("sgd" if name in SGD else "adamw")
    assert (optimizer.learning_rate, optimizer.weight_decay) == (rate, decay)
    assert (schedule.kind, schedule.epochs, schedule.warmup_epochs) == (
        "polynomial",
        epochs,
        warmup,
    )
    loss = ("arcface", 0.5) if name.startswith("ms1m") else ("cosface", 0.4)
    assert (head.loss, head.margin, head.gradient) == (*loss, "straight_through")
    assert (head.sample_rate, head.unsampled == "decayed") == (sample_rate, sample_rate < 1)
    assert head.interclass_filtering_threshold == (0.4 if "filter04" in name else 0)
    words = name.removesuffix("_bs4k").removesuffix("_bs8k").split("_")
    assert recipe.model.network.startswith("vit" if "vit" in words else ("r", "mbf"))
    if "vit" not in words:
        assert recipe.model.network in words
    validation.validate(configs.replace(recipe, workdir="runs/x"), num_devices=8)


def test_accumulation_augmentation_and_noise_are_as_insightface_has_them():
    def recipe(name: str):
        return loading.read_recipe(ROOT / "configs" / f"{name}.py")

    assert recipe("wf42m_pfc03_40epoch_8gpu_vit_b").optimizer.micro_batches == 12
    assert recipe("wf42m_pfc05_vit_h").data.augment.sets == ("dali",)
    noise = recipe("synthetic_mbf")
    assert (noise.data.noise.classes, noise.data.noise.images) == (300_000, 100_000)
    assert (noise.data.global_batch_size, noise.head.sample_rate) == (4096, 0.1)
    assert noise.schedule.epochs == 30 and noise.model.network == "mbf"


def test_r2060_has_half_the_batch_and_half_the_rate():
    recipe = loading.read_recipe(ROOT / "configs" / "ms1mv3_r2060.py")
    assert (recipe.data.global_batch_size, recipe.model.bn_batch_size) == (512, 64)
    assert recipe.optimizer.learning_rate == pytest.approx(0.1)
    assert recipe.schedule.decay_epochs == (10, 16, 22)
