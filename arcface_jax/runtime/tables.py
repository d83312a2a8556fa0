"""Small tables for the terminal: names on the left, numbers on the right."""

from collections.abc import Sequence

from rich import box
from rich.table import Table


def new(
    title: str | None,
    numbers: Sequence[str],
    *,
    names: Sequence[str] = (),
    name_width: int | None = None,
) -> Table:
    """Returns an empty table; `add_row` takes a cell for each name, then one for each number.

    Args:
      title: title above the table.
      numbers: headers of the right-hand columns, which are never wrapped.
      names: headers of the left-hand columns.
      name_width: characters of a name per line.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for head in names:
        table.add_column(head, max_width=name_width, overflow="fold")
    for head in numbers:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def share(value: float | None, *, missing: str = "-") -> str:
    """Formats a number between 0 and 1 with four decimals."""
    return missing if value is None else f"{value:.4f}"
