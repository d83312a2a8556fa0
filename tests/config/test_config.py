"""Recipes, the command line, and JSON."""

import json
from pathlib import Path

import pytest

from arcface_jax import config as configs
from arcface_jax import errors
from arcface_jax.config import Config, DataConfig, ModelConfig, loading
from arcface_jax.errors import ConfigError

RUNNABLE = configs.replace(Config(workdir="w"), data__path="faces")


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe that returns the expression, and gives its path as a word."""

    def write(expression: str) -> str:
        path = tmp_path / "recipe.py"
        path.write_text(
            f"from arcface_jax import config as c\n\n\ndef get_config():\n    return {expression}\n"
        )
        return str(path)

    return write


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_defaults(recipe):
    path = recipe('c.Config(seed=3, data=c.DataConfig(path="a", threads=2))')
    config = loading.load([path, "--data.path", "b", "--model.network", "r18", "--workdir", "w"])
    assert config == Config(
        workdir="w",
        seed=3,
        data=DataConfig(path="b", threads=2),
        model=ModelConfig(network="r18"),
    )


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--data.flip False", "data.flip", False),
        ("--data.flip=False", "data.flip", False),
        ("--data.no-flip", "data.flip", False),
        ("--data.no_flip", "data.flip", False),
        ("--no-deterministic --deterministic True", "deterministic", True),
        ("--deterministic", "deterministic", True),
        ("--logging.tensorboard False", "logging.tensorboard", False),
        ("--data.global-batch-size 96", "data.global_batch_size", 96),
        ("--data.global_batch_size 96", "data.global_batch_size", 96),
        ("--data.synthetic.pairs 40", "data.synthetic.pairs", 40),
        ("--devices 4", "devices", 4),
        ("--devices None", "devices", None),
        ("--optimizer.learning-rate 1", "optimizer.learning_rate", 1.0),
        ("--evaluation.targets a.bin b.bin", "evaluation.targets", ["a.bin", "b.bin"]),
        ("--evaluation.targets", "evaluation.targets", []),
        ("--schedule.decay-epochs 10 16", "schedule.decay_epochs", [10, 16]),
        ("--init-from runs/a", "init_from", "runs/a"),
        ("--finetune.rates * 0.1 fc.* 1", "finetune.rates", [["*", 0.1], ["fc.*", 1.0]]),
    ],
)
def test_an_option_sets_its_field_and_no_other(recipe, words: str, name: str, value):
    path = recipe('c.Config(devices=2, evaluation=c.EvaluationConfig(targets=("x",)))')
    before = loading.flatten(loading.read_recipe(Path(path)))
    after = loading.flatten(loading.load([path, *words.split()]))
    assert after == before | {name: value}
    assert type(after[name]) is type(value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--data.globl-batch-size 64", ["--data.globl-batch-size", "--data.global-batch-size"]),
        ("--head.bogus 1", ["--head.bogus", "--help"]),
        ("--no-data.flip", ["--no-data.flip", "--data.flip, --data.no-flip"]),
        ("stray", ["stray", "--help"]),
        ("--seed ten", ["--seed", "ten", "INT"]),
        ("--data.threads 1.5", ["--data.threads", "1.5", "INT"]),
        ("--data.flip perhaps", ["--data.flip", "perhaps", "'True'", "'False'"]),
        ("--model.network r51", ["--model.network", "r51", "'r50'", "'r100'"]),
        ("--seed", ["--seed", "--help"]),
    ],
)
def test_a_wrong_option_exits_with_2_and_says_what_would_be_right(recipe, capsys, words, expected):
    with pytest.raises(SystemExit) as exit_, errors.reported():
        loading.load([recipe("c.Config()"), *words.split()])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert [word for word in expected if word not in message] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--optimizer.learning-rate nan", ["optimizer.learning_rate", "nan", "finite"]),
        ("--optimizer.weight-decay inf", ["optimizer.weight_decay", "inf", "finite"]),
    ],
)
def test_an_option_without_a_finite_value_is_an_error(recipe, words: str, expected: list[str]):
    with pytest.raises(ConfigError) as error:
        loading.load([recipe("c.Config()"), *words.split()])
    assert [word for word in expected if word not in str(error.value)] == []


@pytest.mark.parametrize("words", [[], ["--workdir", "w"], ["--seed", "1", "recipe.py"]])
def test_the_recipe_comes_first(words: list[str]):
    with pytest.raises(ConfigError, match=r"recipe as its first argument.*lfw_tiny --data"):
        loading.load(words)


def test_help_needs_no_recipe(capsys):
    with pytest.raises(SystemExit) as exit_:
        loading.load(["--help"])
    assert exit_.value.code == 0
    assert "--model.network" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("c.Config(data=c.DataConfig(batch_size=1))", ["data.batch_size", "global_batch"]),
        ("c.Config(moddel=c.ModelConfig())", ["no moddel", "--help"]),
        ("c.Config(seed=True)", ["seed", "valid integer", "True"]),
        ("c.Config(seed=1.0)", ["seed", "valid integer", "1.0"]),
        ("c.Config(data=c.DataConfig(threads='4'))", ["data.threads", "integer", "'4'"]),
        ("c.Config(data={'threads': 4})", ["data", "instance of DataConfig", "'threads'"]),
        ("c.Config(data=c.DataConfig(flip=1))", ["data.flip", "valid boolean", "1"]),
        (
            "c.Config(model=c.ModelConfig(network='r51'))",
            ["model.network", "'r50'", "'r51'"],
        ),
        (
            "c.Config(head=c.HeadConfig(loss='sphereface', scale='64'))",
            ["head.loss", "'arcface'", "'sphereface'", "head.scale"],
        ),
        (
            "c.Config(optimizer=c.OptimizerConfig(learning_rate=float('nan')))",
            ["optimizer.learning_rate", "finite", "nan"],
        ),
        ("c.DataConfig()", ["returned DataConfig", "not a Config"]),
        ("undefined", ["cannot be read", "undefined"]),
    ],
)
def test_a_wrong_recipe_is_an_error_that_says_what_would_be_right(recipe, expression, expected):
    path = recipe(expression)
    with pytest.raises(ConfigError) as error:
        loading.load([path])
    assert [word for word in [path, *expected] if word not in str(error.value)] == []


@pytest.mark.parametrize("text", ["def get_config(:", "", "import no_such_module_anywhere"])
def test_a_recipe_that_is_no_recipe_is_named(tmp_path: Path, text: str):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.py cannot be read: "):
        loading.read_recipe(path)


def test_a_missing_recipe_names_its_neighbors(tmp_path: Path):
    (tmp_path / "ms1mv3_r50.py").touch()
    with pytest.raises(ConfigError, match=r"no recipe at .*ms1mv3_r5\.py.*recipes in.*ms1mv3_r50"):
        loading.load([str(tmp_path / "ms1mv3_r5.py")])
    with pytest.raises(ConfigError, match=r"no recipe at .*nowhere.*none"):
        loading.load([str(tmp_path / "nowhere" / "r.py")])


def test_a_configuration_cannot_be_changed():
    with pytest.raises(AttributeError, match="seed"):
        Config().seed = 1  # pyright: ignore[reportAttributeAccessIssue]  # what is tested


def other(number: float) -> float:
    """A number that is in the range of every field of its type, shares included."""
    return number + 1 if isinstance(number, int) else (number or 1.0) / 2


def changed_everywhere() -> Config:
    """Every field another value than its default, so that a lost one shows."""
    config = Config()
    choices = {"r50": "r18", "bfloat16": "float32", "arcface": "cosface", "none": "linear"}
    choices |= {"straight_through": "exact", "polynomial": "step", "": "x"}
    choices |= {"sgd": "adamw", "untouched": "decayed", "random": "kept", "float32": "bfloat16"}
    choices |= {"refuse": "accept", "automatic": "unit"}
    choices |= {"mean": "both", "constant": "linear", "on": "off"}
    choices |= {"drop": "pad", "shuffled": "shards", "~/.cache/arcface_jax": "x"}
    lists = {"schedule.decay_epochs": (3, 5), "evaluation.targets": ("a.bin", "b.bin")}
    lists |= {"finetune.frozen": ("fc.*",), "finetune.frozen_statistics": ("*",)}
    lists |= {
        "finetune.rates": (("*", 0.5), ("fc.*", 2.0)),
        "data.augment.sets": ("dali", "erasing"),
        "distill.loss": ("relational", "centers"),
        "distributed.local_devices": (1, 2),
    }
    lists["data.columns"] = "path=file"
    lists |= {f"{part}.options": (("x", 0.5),) for part in ("model", "head", "optimizer")}
    for name, value in loading.flatten(config).items():
        if name in lists:
            new = lists[name]
        elif isinstance(value, bool):
            new = not value
        elif isinstance(value, str):
            new = choices[value]
        elif isinstance(value, list):
            new = tuple(other(x) for x in value)
        else:
            new = 7 if value is None else other(value)
        config = configs.replace(config, **{name.replace(".", "__"): new})
    return config


def test_json_brings_back_every_field():
    config = changed_everywhere()
    default, changed = loading.flatten(Config()), loading.flatten(config)
    assert [name for name in default if default[name] == changed[name]] == []
    text = loading.to_json(config)
    assert loading.from_json(text, source="config.json") == config
    assert text.endswith("}\n")
    assert json.loads(text)["schedule"]["decay_epochs"] == [3, 5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"data": {"treads": 4}}', ["no data.treads", "did you mean data.threads"]),
        ('{"data": {"threads": "4"}, "seed": 1.0}', ["data.threads", "'4'", "seed", "1.0"]),
        ('{"seed": true}', ["seed", "valid integer"]),
        ('{"model": {"network": "r51"}}', ["model.network", "'r50'", "'r51'"]),
        ('{"model": null}', ["model", "None"]),
        ('{"optimizer": {"learning_rate": null}}', ["optimizer.learning_rate", "valid number"]),
        ('{"optimizer": {"learning_rate": 1e999}}', ["optimizer.learning_rate", "finite"]),
        ("[]", ["Config", "[]"]),
        ('{"seed": 1', ["Invalid JSON"]),
        ("", ["Invalid JSON"]),
    ],
)
def test_json_is_read_strictly(text: str, expected: list[str]):
    with pytest.raises(ConfigError) as error:
        loading.from_json(text, source="runs/a/config.json")
    message = str(error.value)
    assert [word for word in ["runs/a/config.json", *expected] if word not in message] == []


def test_flatten_has_a_dotted_name_for_every_field():
    flat = loading.flatten(Config())
    assert flat["data.synthetic.pairs"] == 600
    assert flat["schedule.decay_epochs"] == []
    assert all(not isinstance(value, dict) for value in flat.values())
    sections = json.loads(loading.to_json(Config()))
    leaves = json.dumps(sections).count(": ") - json.dumps(sections).count(": {")
    assert len(flat) == leaves


def test_differences_are_those_that_change_what_is_computed():
    changed = changed_everywhere()
    free = ("workdir", "devices", "data.path", "data.threads", "data.prefetch_batches")
    free += (
        "data.columns",
        "data.label_index",
        "data.identity_level",
        "data.workers",
        "data.changed",
        "data.max_bad_share",
        "head.block_size",
        "head.block_form",
        "optimizer.micro_batches",
        "optimizer.stop_after_skipped",
        "schedule.extend",
        "distill.cache",
        "evaluation",
        "checkpoint",
        "deterministic",
        "compilation_cache",
        "distributed",
        "logging",
    )
    expected = [
        name
        for name in loading.flatten(changed)
        if name not in free and name.split(".")[0] not in free
    ]
    lines = loading.differences(Config(), changed)
    assert [line.split(":")[0] for line in lines] == expected
    assert "head.loss" in expected and "data.global_batch_size" in expected
    assert loading.differences(changed, changed) == []


def test_a_difference_names_both_values():
    lines = loading.differences(Config(), configs.replace(Config(), model__network="r18"))
    assert lines == ["model.network: the stored run has 'r50', this command asks for 'r18'"]


def test_replace_changes_a_copy_at_any_depth():
    before = Config()
    after = configs.replace(before, data__synthetic__pairs=40, data__path="p", seed=9)
    assert (after.data.synthetic.pairs, after.data.path, after.seed) == (40, "p", 9)
    assert before == Config()
    flat = loading.flatten(before)
    assert loading.flatten(after) == flat | {
        "data.synthetic.pairs": 40,
        "data.path": "p",
        "seed": 9,
    }


@pytest.mark.parametrize("change", [{"data__treads": 4}, {"moddel__network": "r18"}, {"sed": 1}])
def test_replace_refuses_unknown_names(change: dict):
    with pytest.raises((AttributeError, ConfigError)):
        configs.replace(Config(), **change)


def test_replace_checks_types():
    with pytest.raises(ConfigError, match=r"data\.threads: .*valid integer.*'4'"):
        configs.replace(Config(), data__threads="4")


@pytest.mark.parametrize(
    "words",
    ["--data.augment.dali-colour 0.3", "--data.augment.dali_colour=0.3"],
)
def test_a_renamed_field_keeps_its_former_name(recipe, words: str):
    """In the options, in recipes, and in the config.json of runs that have it."""
    expected = configs.replace(Config(), data__augment__dali_color=0.3)
    assert loading.load([recipe("c.Config()"), *words.split()]) == expected
    former = recipe("c.Config(data=c.DataConfig(augment=c.AugmentConfig(dali_colour=0.3)))")
    assert loading.read_recipe(Path(former)) == expected
    stored = loading.to_json(expected).replace("dali_color", "dali_colour")
    assert "dali_colour" in stored
    assert loading.from_json(stored, source="config.json") == expected


def test_a_renamed_field_has_one_name_in_what_is_written():
    config = configs.AugmentConfig(dali_colour=0.3)  # pyright: ignore[reportCallIssue]  # tested
    assert config.dali_color == 0.3
    assert "data.augment.dali_colour" not in loading.flatten(Config())
    with pytest.raises(ConfigError, match=r"data\.augment\.dali_color 3 must be at most 1"):
        configs.AugmentConfig(dali_colour=3)  # pyright: ignore[reportCallIssue]  # tested


@pytest.mark.parametrize("name", ["nope", "heads__x", "data__nope", "data__path__x"])
def test_replacing_an_unknown_field_is_a_config_error(name: str):
    with pytest.raises(ConfigError, match=name.split("__")[-1]):
        configs.replace(Config(), **{name: 1})


def test_changed_settings_are_those_that_differ_from_the_defaults():
    config = configs.replace(Config(), data__path="faces", schedule__decay_epochs=(3, 5))
    assert loading.changed_settings(Config()) == {}
    assert loading.changed_settings(config) == {
        "data.path": ("faces", ""),
        "schedule.decay_epochs": ([3, 5], []),
    }


def test_a_teacher_may_move_but_not_come_or_go():
    without, here, there = (configs.replace(Config(), distill__teacher=x) for x in ("", "a", "b"))
    assert loading.differences(here, there) == []
    for stored, asked in ((without, here), (here, without)):
        (line,) = loading.differences(stored, asked)
        assert line.startswith("distill.teacher: the stored run has ")
