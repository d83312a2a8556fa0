"""Replace tables in the documentation between two marks of a page."""

from pathlib import Path

from arcface_jax.errors import UserError

END = "<!-- end -->"


def replace(page: Path, text: str, *, begin: str, end: str = END) -> None:
    """Replaces the text between the marks.

    Args:
      page: a Markdown file.
      text: text to put between the marks.
      begin: mark before it.
      end: mark after it.

    Raises:
      UserError: the page lacks a mark.
    """
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise UserError(f"{page} has no lines {begin} and {end} for the table")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
