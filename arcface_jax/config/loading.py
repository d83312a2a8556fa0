"""Read and write configurations: recipes, the command line, strict JSON.

The command line overrides the recipe, and `WORKDIR/config.json` records the result.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from arcface_jax.config import command_line
from arcface_jax.config.explain import explain, former_names
from arcface_jax.config.schema import MAY_DIFFER_ON_RESUME, Config
from arcface_jax.errors import ConfigError, meant

_ADAPTER = pydantic.TypeAdapter(Config)


def load(words: Sequence[str], *, prog: str = "arcface-jax train", description: str = "") -> Config:
    """Reads `RECIPE [--section.field value ...]`.

    Args:
      words: the command line after the program's name; a recipe's name as in `read_recipe`.
      prog: the program's name in usage messages.
      description: the text at the top of --help.

    Returns:
      The configuration, types and ranges checked; `validation.validate` checks combinations of
      fields.

    Raises:
      ConfigError: no recipe was named, it cannot be read, or a value is out of range.
      SystemExit: an option is unknown or not of its type (code 2, the message on stderr), or
        --help.
    """
    recipe, options = Config(), list(words)
    if options and not options[0].startswith("-"):
        recipe = read_recipe(options.pop(0))
    elif "-h" not in options and "--help" not in options:
        raise ConfigError(
            f"{prog} needs a recipe as its first argument: a name of `arcface-jax recipes` or a "
            f"file, for instance: {prog} lfw_tiny --data.path FOLDER --workdir runs/lfw_tiny"
        )
    options = [_renamed(word, former_names(Config)) for word in options]
    return override(recipe, options, prog=f"{prog} RECIPE", description=description)


def override(recipe: Config, options: Sequence[str], *, prog: str, description: str = "") -> Config:
    """Returns a recipe with the options `--section.field value ...` applied.

    Raises:
      SystemExit: as `load`.
    """
    return command_line.parse(
        Config,
        options,
        prog=prog,
        description=description or "One training run.",
        default=recipe,
        options_only=True,
    )


def _renamed(word: str, names: Mapping[str, str]) -> str:
    """Replaces an option's former name by its present one; returns other words unchanged."""
    option, equals, value = word.partition("=")
    name = names.get(option.removeprefix("--").replace("-", "_"))
    if name is None or not option.startswith("--"):
        return word
    return f"--{name}{equals}{value}"


def recipe_files() -> dict[str, Path]:
    """Returns the project's recipes by name, from the installed package or the checkout."""
    return {path.stem: path for path in shipped("configs").glob("*.py")}


def shipped(folder: str) -> Path:
    """Returns a folder that is inside the package in a wheel, and next to it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def find_recipe(name: str | Path) -> Path:
    """Returns the file of a recipe.

    Args:
      name: a path, or the name of a recipe of the project, `ms1mv3_r50`.

    Raises:
      ConfigError: the recipe does not exist; the message lists similar names.
    """
    path = Path(name)
    if path.is_file():
        return path
    recipes = recipe_files()
    if str(name) in recipes:
        return recipes[str(name)]
    near = meant(path.stem, recipes)
    if path.suffix == ".py" or path.parent != Path():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.py"))) or "none"
        raise ConfigError(f"no recipe at {path}: {near}recipes in {path.parent}/: {there}")
    raise ConfigError(f"there is no recipe {name}: {near}`arcface-jax recipes` lists all")


def read_recipe(name: str | Path) -> Config:
    """Runs `get_config()` of a recipe.

    Args:
      name: a path, or the name of a recipe of the project.

    Raises:
      ConfigError: the file does not exist, has no get_config(), or sets an unknown field or an
        invalid value.
    """
    path = find_recipe(name)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"recipe {path}: its name must end in .py")
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
    """Returns the whole configuration as indented JSON."""
    return _ADAPTER.dump_json(config, indent=2).decode() + "\n"


def from_json(text: str, *, source: str) -> Config:
    """Parses the JSON of `to_json`; unknown keys and invalid values are errors.

    Args:
      text: the JSON.
      source: its origin, for the error message.

    Raises:
      ConfigError: naming every field at fault.
    """
    try:
        return _ADAPTER.validate_json(text)
    except pydantic.ValidationError as error:
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            given = None  # pydantic's error has the place
        raise ConfigError(f"{source}: {explain(error, root=Config, given=given)}") from error


def flatten(config: Config) -> dict[str, Any]:
    """Returns all fields by dotted name, values as in JSON."""
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
    """Returns (value, default) of the fields that differ from their default, by dotted name."""
    default = flatten(Config())
    return {name: (x, default[name]) for name, x in flatten(config).items() if x != default[name]}


def differences(stored: Config, asked: Config) -> list[str]:
    """Lists the differences that prevent resuming a run of `stored` as `asked`, a line per
    field.
    """
    old, new = flatten(stored), flatten(asked)
    return [
        f"{name}: the stored run has {old[name]!r}, this command asks for {new[name]!r}"
        for name in old
        if old[name] != new[name]
        and (not name.startswith(MAY_DIFFER_ON_RESUME) or _is_added_or_dropped(name, old, new))
    ]


def _is_added_or_dropped(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Returns whether only one of two runs has a teacher, which may move but not come or go."""
    return name == "distill.teacher" and bool(old[name]) != bool(new[name])
