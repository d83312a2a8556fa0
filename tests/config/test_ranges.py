"""Ranges of the fields: refused outside, accepted at the edge, wherever a value comes from."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import pytest

from arcface_jax import config as configs
from arcface_jax.config import Config, explain, loading
from arcface_jax.errors import ConfigError

ROOT = Path(__file__).parents[2]
SECTIONS = explain.sections(Config)


class Edge(NamedTuple):
    """A bound of a field."""

    name: str
    accepted: float
    refused: float


def edges() -> list[Edge]:
    """Both sides of each bound that pydantic knows of a field, from its JSON schema."""
    found = []
    for prefix, section in SECTIONS.items():
        schema = pydantic.TypeAdapter(section).json_schema()
        for field, properties in schema["properties"].items():
            name = f"{prefix}.{field}".lstrip(".")
            for kind in properties.get("anyOf", [properties]):
                found += [Edge(name, *sides) for sides in sides_of(kind)]
    return found


def sides_of(kind: dict[str, Any]) -> list[tuple[float, float]]:
    """(accepted, refused) for each bound of one type in a JSON schema."""
    integer = kind.get("type") == "integer"

    def next_to(value: float, direction: int) -> float:
        return value + direction if integer else math.nextafter(value, direction * math.inf)

    sides = []
    if (low := kind.get("exclusiveMinimum")) is not None:
        sides.append((next_to(low, +1), low))
    if (low := kind.get("minimum")) is not None:
        sides.append((low, next_to(low, -1)))
    if (high := kind.get("exclusiveMaximum")) is not None:
        sides.append((next_to(high, -1), high))
    if (high := kind.get("maximum")) is not None:
        sides.append((high, next_to(high, +1)))
    return sides


def in_json(name: str, value: Any) -> str:
    """The defaults with one value changed, as JSON."""
    tree = json.loads(loading.to_json(Config()))
    *path, last = name.split(".")
    section = tree
    for part in path:
        section = section[part]
    section[last] = value
    return json.dumps(tree)


@pytest.mark.parametrize("edge", edges(), ids=lambda edge: f"{edge.name}-{edge.refused}")
def test_a_value_at_the_edge_is_accepted_and_the_next_one_refused(edge: Edge):
    field = edge.name.replace(".", "__")
    at_edge = configs.replace(Config(), **{field: edge.accepted})
    assert loading.flatten(at_edge)[edge.name] == edge.accepted
    assert loading.from_json(in_json(edge.name, edge.accepted), source="x") == at_edge
    for attempt in (
        lambda: configs.replace(Config(), **{field: edge.refused}),
        lambda: loading.from_json(in_json(edge.name, edge.refused), source="config.json"),
    ):
        with pytest.raises(ConfigError) as error:
            attempt()
        message = str(error.value).removeprefix("config.json: ")
        assert message.startswith(f"{edge.name} {edge.refused!r} must ")
        assert "\n" not in message and len(message) > len(edge.name) + 30  # range and usual value


# Independent of the schema: field, value out of range, what the message has.
REFUSED: list[tuple[str, Any, list[str]]] = [
    ("seed", -1, ["must not be negative"]),
    ("seed", 2**32, ["at most 4294967295"]),
    ("devices", 0, ["must be greater than 0", "leave it out"]),
    ("data.global_batch_size", 0, ["must be greater than 0", "128"]),
    ("data.prefetch_batches", 0, ["must be greater than 0"]),
    ("data.shard_images", 0, ["must be greater than 0"]),
    ("data.shard_window", -4, ["must be greater than 0"]),
    ("data.workers", -1, ["must not be negative"]),
    ("data.threads", -1, ["must not be negative"]),
    ("data.max_bad_share", 1.5, ["at most 1", "share"]),
    ("data.synthetic.identities", 0, ["must be greater than 0"]),
    ("data.noise.classes", 0, ["must be greater than 0"]),
    ("data.augment.erasing", -0.1, ["must not be negative", "share"]),
    ("data.augment.dali_color", 1.1, ["at most 1", "share"]),
    ("model.embedding_size", 0, ["must be greater than 0", "512"]),
    ("model.bn_batch_size", -1, ["must be greater than 0"]),
    ("head.scale", 0.0, ["must be greater than 0", "64"]),
    ("head.margin", -0.5, ["must not be negative"]),
    ("head.margin", 1e9, ["at most 3.14159", "0.2 to 0.5"]),
    ("head.margins", (1.0, 1e9, 0.0), ["+-pi", "radians", "arcface is (1, m, 0)"]),
    ("head.margins", (1e9, 0.5, 0.0), ["+-10"]),
    ("head.margins", (1.0, 0.0, -3.0), ["+-2"]),
    ("head.magface_margins", (0.45, 4.0), ["at most pi", "radians"]),
    ("head.sample_rate", 10.0, ["0 to 1", "share of the classes"]),
    ("head.sample_rate", -0.1, ["must not be negative", "0 to 1"]),
    ("head.interclass_filtering_threshold", 1.0, ["below 1", "0.4"]),
    ("head.subcenters", 0, ["must be greater than 0"]),
    ("head.ema", 2.0, ["at most 1", "0.01"]),
    ("head.ema", 0.0, ["greater than 0", "0.01"]),
    ("head.adaface_h", 0.0, ["must be greater than 0"]),
    ("head.magface_norms", (110.0, 10.0), ["(110.0, 10.0)", "increase", "(10.0, 110.0)"]),
    ("head.magface_norms", (10.0, 10.0), ["increase strictly"]),
    ("head.magface_margins", (0.0, 0.8), ["(0.0, 0.8)", "above 0", "(0.45, 0.8)"]),
    ("head.magface_weight", -1.0, ["must not be negative"]),
    ("head.block_size", -1, ["must not be negative"]),
    ("optimizer.learning_rate", 0.0, ["must be greater than 0", "0.1"]),
    ("optimizer.learning_rate", math.inf, ["finite"]),
    ("optimizer.momentum", 1.0, ["below 1", "without bound", "0.9"]),
    ("optimizer.momentum", -0.1, ["must not be negative"]),
    ("optimizer.betas", (0.9, 1.0), ["(0.9, 1.0)", "below 1", "(0.9, 0.999)"]),
    ("optimizer.betas", (-0.1, 0.9), ["(-0.1, 0.9)", "must not be negative"]),
    ("optimizer.ema", 1.0, ["below 1", "0.9999 is usual", "0 is off"]),
    ("optimizer.weight_decay", -1e-4, ["must not be negative"]),
    ("optimizer.micro_batches", 0, ["must be greater than 0"]),
    ("optimizer.loss_scale", 1e38, ["at most 1.67772e+07", "65536"]),
    ("optimizer.loss_scale", 0.5, ["at least 1", "65536"]),
    ("optimizer.clip_norm", math.inf, ["finite"]),
    ("optimizer.loss_scale_steps", 0, ["must be greater than 0"]),
    ("schedule.epochs", 0, ["must be greater than 0"]),
    ("schedule.warmup_epochs", -0.5, ["must not be negative"]),
    ("schedule.warmup_steps", -1, ["must not be negative"]),
    ("schedule.decay_factor", 0.0, ["must be greater than 0"]),
    ("schedule.decay_factor", 10.0, ["at most 1", "0.1 divides"]),
    ("schedule.epochs", 2**31, ["at most 2147483647"]),
    ("data.noise.images", 10**23, ["at most 2147483647"]),
    ("schedule.decay_epochs", (10, 10, 16), ["(10, 10, 16)", "increase", "(10, 16, 22)"]),
    ("schedule.decay_epochs", (16, 10), ["(16, 10)", "increase", "(10, 16, 22)"]),
    ("schedule.decay_epochs", (0, 10), ["(0, 10)", "above 0", "(10, 16, 22)"]),
    ("finetune.rates", (("fc.*", 2.0), ("layer1.*", 0.0)), ["('layer1.*', 0.0)", "greater than 0"]),
    ("finetune.rates", (("layer1.*", -1.0),), ["--finetune.frozen"]),
    ("evaluation.batch_size", 0, ["must be greater than 0"]),
    ("evaluation.every_epochs", -1.0, ["must not be negative"]),
    ("checkpoint.keep", 0, ["must be greater than 0"]),
    ("checkpoint.requeue_exit_code", -1, ["must not be negative"]),
    ("checkpoint.requeue_exit_code", 256, ["at most 255"]),
    ("checkpoint.deadline_seconds", -1.0, ["must not be negative"]),
    ("logging.every_steps", 0, ["must be greater than 0"]),
    ("logging.watchdog_seconds", -1.0, ["must not be negative"]),
    ("logging.profile_steps", (0, 5), ["first and the last step", "10 20", "0 0"]),
    ("logging.profile_steps", (20, 10), ["(20, 10)", "counted from 1"]),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), REFUSED, ids=lambda value: str(value) if value else None
)
def test_the_message_names_field_value_range_and_fix(name: str, value: Any, expected: list[str]):
    *path, last = name.split(".")
    with pytest.raises(ConfigError) as error:
        SECTIONS[".".join(path)](**{last: value})  # as in a recipe
    assert [words for words in [name, *expected] if words not in str(error.value)] == []
    with pytest.raises(ConfigError) as error:
        configs.replace(Config(), **{name.replace(".", "__"): value})
    assert [words for words in [name, *expected] if words not in str(error.value)] == []


def test_all_fields_at_fault_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        configs.OptimizerConfig(momentum=1.0, clip_norm=0.0)
    assert str(error.value) == (
        "optimizer.momentum 1.0 must be below 1: at 1 updates grow without bound (default 0.9); "
        "optimizer.clip_norm 0.0 must be greater than 0 (default 5.0)"
    )


def test_every_number_has_a_range_or_a_reason_to_have_none():
    free = {
        "distributed.num_processes",  # checked together, when the processes start
        "distributed.process_id",
        "distributed.local_devices",
    }
    ranged = {edge.name for edge in edges()} | {name for name, _, _ in REFUSED}
    assert numbers() - ranged == free


def numbers() -> set[str]:
    """Fields that are numbers or lists of numbers, from pydantic's JSON schema."""
    found = set()
    for prefix, section in SECTIONS.items():
        schema = pydantic.TypeAdapter(section).json_schema()
        for field, properties in schema["properties"].items():
            kinds = properties.get("anyOf", [properties])
            kinds += [item for kind in kinds for item in kind.get("prefixItems", ())]
            kinds += [kind["items"] for kind in kinds if isinstance(kind.get("items"), dict)]
            if any(kind.get("type") in ("integer", "number") for kind in kinds):
                found.add(f"{prefix}.{field}".lstrip("."))
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--data.threads -1", "data.threads -1 must not be negative (default 0)"),
        ("--seed -1", "seed -1 must not be negative (default 0)"),
        (
            "--optimizer.betas 0.9 1.0",
            "optimizer.betas (0.9, 1.0) must be below 1 (default (0.9, 0.999))",
        ),
        (
            "--data.augment.erasing 1.5",
            "data.augment.erasing 1.5 must be at most 1: a share, 0 to 1 (default 0.5)",
        ),
    ],
)
def test_an_option_out_of_range_is_one_error(words: str, expected: str):
    with pytest.raises(ConfigError) as error:
        loading.load([str(ROOT / "configs" / "demo.py"), *words.split()])
    assert str(error.value) == expected


def test_a_command_ends_with_one_line_and_code_2(tmp_path: Path):
    recipe = tmp_path / "mine.py"
    text = "from arcface_jax.config import Config, DataConfig\n\n\ndef get_config():\n"
    recipe.write_text(text + "    return Config(data=DataConfig(threads=-2))\n")
    demo = str(ROOT / "configs" / "demo.py")
    for words, expected in [
        ([demo, "--head.scale", "0"], "head.scale 0.0 must be greater than 0 (default 64.0)"),
        ([str(recipe)], f"recipe {recipe}: data.threads -2 must not be negative (default 0)"),
    ]:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {expected}\n")


def test_every_section_has_its_name_in_messages():
    names = {name: cls.__name__ for name, cls in SECTIONS.items()}
    assert names["data.augment"] == "AugmentConfig" and names[""] == "Config"
    assert len(set(names.values())) == len(names)  # a class in two places would have one name
    fields = sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values())
    assert fields == len(loading.flatten(Config())) + len(SECTIONS) - 1
