"""Where a configuration comes from and goes to: recipes, the command line, strict JSON.

The command line overrides the recipe, and `WORKDIR/config.json` records the outcome.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import tyro

from arcface_jax.config.explain import explain, former_names
from arcface_jax.config.schema import MAY_DIFFER_ON_RESUME, Config
from arcface_jax.errors import ConfigError

_ADAPTER = pydantic.TypeAdapter(Config)


def load(argv: Sequence[str], *, prog: str = "train.py") -> Config:
    """Reads `RECIPE [--section.field value ...]`.

    Args:
      argv: the words of the command line behind the program's name.
      prog: the program's name in usage messages.

    Returns:
      The configuration, types and ranges checked; `validation.validate` checks what depends on
      several fields.

    Raises:
      ConfigError: no recipe was named, it cannot be read, or a value is out of range.
      SystemExit: an option is unknown or not of its type (code 2, the message on stderr), or
        --help.
    """
    recipe = Config()
    words = list(argv)
    if words and not words[0].startswith("-"):
        recipe = read_recipe(Path(words.pop(0)))
    elif "-h" not in words and "--help" not in words:
        raise ConfigError(
            f"{prog} needs a recipe as its first argument, for instance: "
            f"python scripts/{prog} configs/lfw_tiny.py --data.path FOLDER --workdir runs/lfw_tiny"
        )
    words = [_renamed(word, former_names(Config)) for word in words]
    return tyro.cli(Config, default=recipe, args=words, prog=f"{prog} RECIPE", config=_FLAGS)


def _renamed(word: str, names: Mapping[str, str]) -> str:
    """An option's former name as its name now; other words as they are."""
    option, equals, value = word.partition("=")
    name = names.get(option.removeprefix("--").replace("-", "_"))
    if name is None or not option.startswith("--"):
        return word
    return f"--{name}{equals}{value}"


# `--model.network r50` for a field of a section, and no sub-commands or `--no-` twins to guess at.
_FLAGS = (tyro.conf.FlagConversionOff,)


def read_recipe(path: Path) -> Config:
    """Runs `get_config()` of a recipe file.

    Raises:
      ConfigError: there is no such file, it has no get_config(), or it states an unknown field, a
        value of the wrong type or one that is out of range.
    """
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.py"))) or "none"
        raise ConfigError(f"no recipe at {path} (recipes in {path.parent}/: {known})")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        recipe = module.get_config()
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    except Exception as error:
        raise ConfigError(f"recipe {path} cannot be read: {error!r}") from error
    if not isinstance(recipe, Config):
        raise ConfigError(
            f"recipe {path}: get_config() returned {type(recipe).__name__}, not a Config"
        )
    return recipe


def to_json(config: Config) -> str:
    """The whole configuration as indented JSON."""
    return _ADAPTER.dump_json(config, indent=2).decode() + "\n"


def from_json(text: str, *, source: str) -> Config:
    """The reverse of `to_json`; unknown keys, wrong types and values out of range are errors.

    Args:
      text: the JSON.
      source: where it came from, for the error message.

    Raises:
      ConfigError: naming every field at fault.
    """
    try:
        return _ADAPTER.validate_json(text)
    except pydantic.ValidationError as error:
        try:
            given = json.loads(text)
        except json.JSONDecodeError:
            given = None  # pydantic's error has the place
        raise ConfigError(f"{source}: {explain(error, root=Config, given=given)}") from error


def flatten(config: Config) -> dict[str, Any]:
    """All fields by dotted name, values as in JSON."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    visit("", json.loads(to_json(config)))
    return flat


def changed_settings(config: Config) -> dict[str, tuple[Any, Any]]:
    """(value, default) of the fields that differ from their default, by dotted name."""
    default = flatten(Config())
    return {name: (x, default[name]) for name, x in flatten(config).items() if x != default[name]}


def differences(stored: Config, asked: Config) -> list[str]:
    """What keeps `asked` from resuming a run of `stored`: a line for each field, or nothing."""
    old, new = flatten(stored), flatten(asked)
    return [
        f"{name}: the stored run has {old[name]!r}, this command asks for {new[name]!r}"
        for name in old
        if old[name] != new[name] and not name.startswith(MAY_DIFFER_ON_RESUME)
    ]
