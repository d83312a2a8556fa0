"""Names as people gave them, made safe for what shows them: terminals, pages and spreadsheets.

A file name may hold any byte but NUL and "/", so a terminal may take it for a command (ESC, CR), an
encoder may refuse it (bytes that are not UTF-8, which Python reads as surrogates), and a
spreadsheet may run it (`=cmd()`). Each kind of output escapes in one place: `streams` the terminal
by `shown`, `evaluation.page` HTML by `shown`, and everything that writes a CSV its rows by `cells`.
"""

import re
from collections.abc import Iterable

# Control characters but tab and newline, surrogates, line separators, and what reverses the
# direction of the text that follows.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Of colors and weights, but for 8, which hides.
_COLOR = re.compile("(\x1b\\[(?!8m|[0-9;]*;8[;m])[0-9;]*m)")
# What a spreadsheet takes for the beginning of a formula.
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def shown(text: str, *, colors: bool = False) -> str:
    r"""The text with unsafe characters escaped, as `\x1b` or, for a byte that is no UTF-8, `\xff`.

    Args:
      text: of any length.
      colors: leave the codes that change color and weight.
    """
    if not _UNSAFE.search(text):
        return text
    if colors:
        parts = _COLOR.split(text)
        parts[::2] = map(shown, parts[::2])
        return "".join(parts)
    return _UNSAFE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    number = ord(found[0])
    if 0xDC80 <= number <= 0xDCFF:
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def drawn(text: str) -> str:
    """The text for a matplotlib figure, which takes what is between two `$` for a formula."""
    return shown(text).replace("$", r"\$")


def cells(row: Iterable[object]) -> list[object]:
    """A row for `csv.writer`: floats as they are, text without formulas and unsafe characters.

    Text that a spreadsheet would compute gets an apostrophe before it.
    """
    return [cell(value) if isinstance(value, str) else value for value in row]


def cell(text: str) -> str:
    """One cell of `cells`."""
    formula = _FORMULA.match(text) and not _NUMBER.fullmatch(text)
    return shown(f"'{text}" if formula else text)
