"""Where a configuration comes from and goes to: recipes, the command line, strict JSON.

The command line overrides the recipe, and `WORKDIR/config.json` records the outcome.
"""

import difflib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import tyro

from arcface_jax.config import MAY_DIFFER_ON_RESUME, Config
from arcface_jax.errors import ConfigError

_ADAPTER = pydantic.TypeAdapter(Config)


def load(argv: Sequence[str], *, prog: str = "train.py") -> Config:
    """Reads `RECIPE [--section.field value ...]`.

    Args:
      argv: the words of the command line behind the program's name.
      prog: the program's name in usage messages.

    Returns:
      The configuration, its types checked; `validation.validate` checks the values.

    Raises:
      ConfigError: no recipe was named, or it cannot be read.
      SystemExit: an option is unknown or has a wrong value (code 2, the message on stderr), or
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
    return tyro.cli(Config, default=recipe, args=words, prog=f"{prog} RECIPE", config=_FLAGS)


# `--model.network r50` for a field of a section, and no sub-commands or `--no-` twins to guess at.
_FLAGS = (tyro.conf.FlagConversionOff,)


def read_recipe(path: Path) -> Config:
    """Runs `get_config()` of a recipe file.

    Raises:
      ConfigError: there is no such file, it has no get_config(), or it states an unknown field or a
        value of the wrong type.
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
    except pydantic.ValidationError as error:
        raise ConfigError(f"recipe {path}: {_in_words(error)}") from error
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
    """The reverse of `to_json`, strict: an unknown key or a wrong type is an error.

    Args:
      text: the JSON.
      source: where it came from, for the error message.

    Raises:
      ConfigError: naming every field at fault.
    """
    try:
        return _ADAPTER.validate_json(text)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source}: {_in_words(error)}") from error


def _in_words(error: pydantic.ValidationError) -> str:
    lines = []
    for item in error.errors():
        # A section's own class reports what a recipe gives it: DataConfig.threads.
        field = ".".join([error.title, *map(str, item["loc"])]).removeprefix("Config.")
        if item["type"] == "unexpected_keyword_argument":
            lines.append(f"there is no {field}{_nearest(str(item['loc'][-1]))}")
        else:
            lines.append(f"{field}: {item['msg']} (got {item['input']!r})")
    return "; ".join(lines)


def _nearest(unknown: str) -> str:
    """Where to look instead of an unknown field."""
    names = flatten(Config())
    near = difflib.get_close_matches(unknown, [name.rpartition(".")[2] for name in names])
    likely = [name for name in names if name.rpartition(".")[2] in near]
    meant = f"did you mean {' or '.join(likely)}? " if likely else ""
    return f" ({meant}python scripts/train.py --help lists all)"


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


def differences(stored: Config, asked: Config) -> list[str]:
    """What keeps `asked` from resuming a run of `stored`: a line for each field, or nothing."""
    old, new = flatten(stored), flatten(asked)
    return [
        f"{name}: the stored run has {old[name]!r}, this command asks for {new[name]!r}"
        for name in old
        if old[name] != new[name] and not name.startswith(MAY_DIFFER_ON_RESUME)
    ]
