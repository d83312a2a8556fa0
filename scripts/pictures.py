"""Draw the pictures of the README and the site: devices and packages, each light and dark.

python scripts/pictures.py [--output docs/images]

The packages and their dots come from the imports of `arcface_jax` and the layers of
`pyproject.toml`.
"""

import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import grimp
import tyro

from arcface_jax.commands import Result, command

ROOT = Path(__file__).parents[1]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


class Theme(NamedTuple):
    """Colors of a picture; the background stays transparent."""

    ink: str
    faint: str
    line: str
    box: str
    shards: Sequence[str]
    accent: str


THEMES = {
    "light": Theme(
        "#1f2328",
        "#59636e",
        "#8c959f",
        "#f3f5f8",
        ("#cfe3ff", "#d3f2dc", "#ffe3c4", "#e9dcff"),
        "#c2410c",
    ),
    "dark": Theme(
        "#f0f6fc",
        "#a8b3bf",
        "#7d8793",
        "#1c2530",
        ("#1d4a80", "#1f5a38", "#74461a", "#4d3689"),
        "#ff9d5c",
    ),
}


class Svg:
    """An SVG drawing, built from shapes.

    Args:
      width: in pixels.
      height: in pixels.
      title: text for screen readers.
      theme: the colors.
    """

    def __init__(self, width: float, height: float, *, title: str, theme: Theme):
        self._theme = theme
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'role="img" font-family="{FONT}" font-size="14">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{theme.line}"/>'
            "</marker></defs>",
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "",
        dashed: bool = False,
    ) -> None:
        """Draws a rectangle with round corners."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'fill="{fill or self._theme.box}" stroke="{self._theme.line}"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "middle",
        color: str = "",
        size: float = 14,
        bold: bool = False,
        turned: float = 0,
    ) -> None:
        """Draws a line of text; y is its base line, and the rotation is in degrees clockwise."""
        weight = ' font-weight="600"' if bold else ""
        turn = f' transform="rotate({turned:g} {x:g} {y:g})"' if turned else ""
        self._lines.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}"'
            f'{weight}{turn} fill="{color or self._theme.ink}">{text}</text>'
        )

    def band(self, x: float, y: float, width: float, height: float) -> None:
        """Draws a rectangle without an outline."""
        self._lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'fill="{self._theme.box}"/>'
        )

    def dot(self, x: float, y: float, radius: float, *, fill: str) -> None:
        """Draws a filled circle."""
        self._lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}"/>')

    def arrow(self, path: str) -> None:
        """Draws a path with a tip at its end."""
        self._lines.append(
            f'<path d="{path}" fill="none" stroke="{self._theme.line}" stroke-width="1.5" '
            'marker-end="url(#tip)"/>'
        )

    def close(self) -> str:
        """Returns the whole drawing."""
        return "\n".join([*self._lines, "</svg>", ""])


def devices(theme: Theme, *, count: int = 4) -> str:
    """Draws how batch, backbone and class centers are placed, and what the devices exchange."""
    left, column, gap = 150.0, 158.0, 16.0
    width = left + count * (column + gap)
    title = f"Batch and class centers on {count} devices"
    svg = Svg(width, 452, title=title, theme=theme)
    for device in range(count):
        x, shade = left + device * (column + gap), theme.shards[device % len(theme.shards)]
        middle = x + column / 2
        svg.text(middle, 22, f"GPU {device}", bold=True)
        svg.box(x, 34, column, 44, fill=shade)
        svg.text(middle, 61, "B / N images")
        svg.arrow(f"M{middle:g} 78V96")
        svg.box(x, 98, column, 44)
        svg.text(middle, 125, "backbone")
        svg.arrow(f"M{middle:g} 142V160")
        svg.box(x, 162, column, 44, fill=shade)
        svg.text(middle, 189, "B / N embeddings")
        svg.arrow(f"M{middle:g} 206V224")
        svg.arrow(f"M{middle:g} 258V276")
        svg.box(x, 278, column, 104, fill=shade)
        svg.text(middle, 300, "C / N class centers")
        svg.text(middle, 317, "and their momentum", size=12, color=theme.faint)
        svg.box(x + 14, 328, column - 28, 40, fill="none", dashed=True)
        svg.text(middle, 353, "8,192 at a time", size=13, color=theme.accent)
        svg.arrow(f"M{middle:g} 382V400")
    right = width - gap
    for y, text in (
        (226, "all-gather: every GPU gets all B embeddings"),
        (402, "sum of 2 B numbers gives the loss; reduce-scatter returns the gradients"),
    ):
        svg.box(left, y, right - left, 32, fill="none")
        svg.text((left + right) / 2, y + 21, text, size=13)
    for y, text in ((61, "batch"), (125, "copies"), (189, "batch"), (335, "classes")):
        svg.text(left - 18, y, text, anchor="end", color=theme.faint)
    for y, text in (
        (78, "split over the GPUs"),
        (142, "gradients are summed"),
        (352, "split over the GPUs"),
        (367, "no B x C logits"),
    ):
        svg.text(left - 18, y, text, anchor="end", size=11, color=theme.faint)
    return svg.close()


def layers() -> list[list[str]]:
    """Returns the names in each layer of the package, from the top, as in import-linter's
    contract.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip(" ()") for name in layer.split("|")] for layer in found]


def imports(names: Iterable[str]) -> dict[str, set[str]]:
    """Returns which of the package's parts each part imports."""
    graph = grimp.build_graph("arcface_jax", cache_dir=None)
    parts = [f"arcface_jax.{name}" for name in names]
    for part in parts:
        graph.squash_module(part)
    found: dict[str, set[str]] = {}
    for part in parts:
        found[part.rpartition(".")[2]] = {
            other.rpartition(".")[2]
            for other in graph.find_modules_directly_imported_by(part)
            if other in parts and other != part
        }
    return found


def packages(theme: Theme) -> str:
    """Draws the parts of the package in their layers, with a dot where a row imports a column."""
    rows = layers()
    names = [name for row in rows for name in row]
    imported = imports(names)
    left, top, cell = 136.0, 108.0, 27.0
    size = cell * len(names)
    svg = Svg(left + size + 70, top + size + 8, title="Packages and their imports", theme=theme)
    number = 0
    for level, row in enumerate(rows):  # a band for each layer
        if level % 2 == 0:
            svg.band(0, top + number * cell, left + size, len(row) * cell)
        number += len(row)
    for number, name in enumerate(names):
        shown = name if (ROOT / "arcface_jax" / name).is_dir() else f"{name}.py"
        middle = top + (number + 0.5) * cell
        svg.text(left - 12, middle + 5, shown, anchor="end", bold=name == "train")
        across = left + (number + 0.5) * cell
        svg.text(across + 4, top - 8, shown, anchor="start", size=13, turned=-50)
        svg.dot(across, middle, 3, fill=theme.line)
        for other in sorted(imported[name]):
            svg.dot(left + (names.index(other) + 0.5) * cell, middle, 6.5, fill=theme.accent)
    return svg.close()


PICTURES = {"devices": devices, "packages": packages}


@command
def main(output: Path = ROOT / "docs" / "images") -> Result:
    """Writes NAME-light.svg and NAME-dark.svg of every picture.

    Args:
      output: Folder to write to.
    """
    files = []
    for name, draw in PICTURES.items():
        for shade, theme in THEMES.items():
            files.append(output / f"{name}-{shade}.svg")
            files[-1].write_text(draw(theme))
    return Result(files=files)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
