"""List the recipes with network, data and published figures; show one, or copy it to edit.

arcface-jax recipes
arcface-jax recipes ms1mv3_r50
arcface-jax recipes ms1mv3_r50 --copy my_recipe.py
"""

import ast
import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from arcface_jax.commands import Result, command, write_new
from arcface_jax.config import command_line, loading, recipes
from arcface_jax.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Options of `recipes`."""

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")] = ""
    """A recipe; by default all are listed."""
    copy: Path | None = None
    """Write the recipe to this new file."""


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax recipes") -> Result:
    """Lists recipes, or shows or copies one."""
    arguments = command_line.parse(Arguments, words, prog=prog, description=__doc__ or "")
    if not arguments.name:
        if arguments.copy is not None:
            raise UserError(f"--copy {arguments.copy} needs the recipe's name: recipes NAME --copy")
        return _list()
    path = loading.find_recipe(arguments.name)
    if arguments.copy is None:
        print(text_of(path))
        return Result(describe(path))
    if arguments.copy.suffix != ".py":
        raise UserError(f"--copy {arguments.copy} must end in .py")
    write_new({arguments.copy: text_of(path).encode()})
    print(f"{arguments.copy}: edit it, then: arcface-jax train {arguments.copy} --workdir FOLDER")
    return Result(describe(path), [arguments.copy])


def text_of(path: Path) -> str:
    """Returns a recipe to read and to edit, with every setting that differs from its default.

    That is the file itself, or, if the file only calls a function that several recipes share, its
    docstring and the resulting configuration.
    """
    source = path.read_text()
    if recipes.__name__ not in source:
        return source
    docstring = "\n".join(source.splitlines()[: ast.parse(source).body[0].end_lineno])
    config = _constructor(loading.read_recipe(path), indent=4)
    return (
        f"{docstring}\n\nfrom arcface_jax import config as c\n\n\n"
        f"def get_config() -> c.Config:\n    return {config}\n"
    )


def _constructor(value: Any, *, indent: int) -> str:
    """Returns the expression that constructs a configuration or one of its values."""
    if not dataclasses.is_dataclass(value):
        return repr(value).replace("'", '"')
    name, default = type(value).__name__, type(value)()
    lines = [
        f"{' ' * (indent + 4)}{field.name}={_constructor(own, indent=indent + 4)},\n"
        for field in dataclasses.fields(value)
        if (own := getattr(value, field.name)) != getattr(default, field.name)
    ]
    return f"c.{name}(\n{''.join(lines)}{' ' * indent})"


def describe(path: Path) -> dict[str, str]:
    """Returns network, data and figures of a recipe; the figures are in its docstring."""
    config = loading.read_recipe(path)
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    # A summary, the command in indented lines, and the measured or published figures.
    paragraphs = [part for part in text.split("\n\n")[1:] if not part.startswith(" ")]
    figures = " ".join(" ".join(paragraphs).split())
    return {
        "network": config.model.network,
        "data": config.data.path or "--data.path",
        "figures": figures,
    }


def _list() -> Result:
    found = {name: describe(path) for name, path in sorted(loading.recipe_files().items())}
    for name, about in found.items():
        print(f"{name:35} {about['network']:20} {about['data']}")
        indent = " " * 4
        print(textwrap.fill(about["figures"], 100, initial_indent=indent, subsequent_indent=indent))
    print("arcface-jax recipes NAME --copy FILE writes a recipe to edit")
    return Result({"recipes": found})
