"""Make names safe to show in terminals, pages and spreadsheets.

A file name may contain any byte except NUL and "/", so a terminal may interpret it (ESC, CR), an
encoder may reject it (bytes that are not UTF-8, which Python reads as surrogates), and a
spreadsheet may execute it (`=cmd()`). Each kind of output is escaped in one place: the terminal in
`streams` by `shown`, HTML in `evaluation.page` by `shown`, and CSV rows by `cells`.
"""

import re
from collections.abc import Iterable

# Control characters except tab and newline, surrogates, line separators, and characters that
# reverse the text direction.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Codes of colors and weights, except 8 (or 08), which hides text.
_COLOR = re.compile("(\x1b\\[(?!(?:[0-9]*;)*0*8[;m])[0-9;]*m)")
# Characters that start a formula in a spreadsheet.
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def shown(text: str, *, colors: bool = False) -> str:
    r"""Escapes unsafe characters, as `\x1b` or, for a byte that is not UTF-8, `\xff`.

    Args:
      text: of any length.
      colors: keep codes for color and weight.
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
    """Escapes text for a matplotlib figure, which reads text between two `$` as a formula."""
    return shown(text).replace("$", r"\$")


def cells(row: Iterable[object]) -> list[object]:
    """Prepares a row for `csv.writer`: keeps floats, and escapes formulas and unsafe characters.

    Text that a spreadsheet would evaluate is prefixed with an apostrophe.
    """
    return [cell(value) if isinstance(value, str) else value for value in row]


def cell(text: str) -> str:
    """Escapes one cell of `cells`."""
    formula = _FORMULA.match(text) and not _NUMBER.fullmatch(text)
    return shown(f"'{text}" if formula else text)
