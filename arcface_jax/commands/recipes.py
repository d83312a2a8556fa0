"""List the recipes with network, data and published figures; show one, or copy it to edit.

arcface-jax recipes
arcface-jax recipes ms1mv3_r50
arcface-jax recipes ms1mv3_r50 --copy my_recipe.py
"""

import ast
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from arcface_jax.commands import Result, command, copy_new
from arcface_jax.config import command_line, loading
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
        print(path.read_text())
        return Result(describe(path))
    if arguments.copy.suffix != ".py":
        raise UserError(f"--copy {arguments.copy} must end in .py")
    copy_new(path, arguments.copy)
    print(f"{arguments.copy}: edit it, then: arcface-jax train {arguments.copy} --workdir FOLDER")
    return Result(describe(path), [arguments.copy])


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
