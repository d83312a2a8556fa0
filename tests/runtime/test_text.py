"""Names that terminals would obey, spreadsheets run, and encoders refuse."""

import contextlib
import csv
import io
import os
import sys

import pytest
from rich.console import Console

from arcface_jax.commands import Result, command, console
from arcface_jax.errors import UserError
from arcface_jax.runtime import streams, tables
from arcface_jax.runtime.files import atomic
from arcface_jax.runtime.text import cell, cells, drawn, shown

ODD = os.fsdecode(b"[red]\x1b[2J \xff.jpg")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ana\tMar\u00eda\n\u674e", "Ana\tMar\u00eda\n\u674e"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb", r"a\x0db"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
    ],
)
def test_what_is_shown_of_a_name(text: str, expected: str):
    assert shown(text) == expected
    shown(text).encode()  # UTF-8 takes it


@pytest.mark.parametrize("formula", ["=cmd()", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "=1\n2"])
def test_no_cell_is_a_formula(formula: str):
    assert cell(formula).startswith("'")


def test_cells_keep_numbers_and_names():
    row = ["Ada", "-0.5", "+1e-3", -0.5, 7, "a=b", ODD]
    assert cells(row) == ["Ada", "-0.5", "+1e-3", -0.5, 7, "a=b", r"[red]\x1b[2J \xff.jpg"]


def test_a_csv_takes_any_name(tmp_path):
    with atomic(tmp_path / "a.csv", newline="") as file:
        csv.writer(file).writerow(cells([ODD, "=cmd()"]))
        file.write(ODD)  # as lists of files have it, byte for byte
    data = (tmp_path / "a.csv").read_bytes()
    assert data == b"[red]\\x1b[2J \\xff.jpg,'=cmd()\r\n[red]\x1b[2J \xff.jpg"


@command
def print_odd(name: str) -> Result:
    """Prints a name in all the ways that commands have."""
    print(name)
    table = tables.new(name, ["n"], names=["set"])
    table.add_row(f"{name} :smile:", "1")
    console().print(table, name)
    print(name, file=sys.stderr)
    if name.endswith("!"):
        raise UserError(f"no such file: {name}")
    return Result({"name": name})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_command_prints_any_name(monkeypatch, encoding: str):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert print_odd(ODD) == 0
    with contextlib.suppress(SystemExit):
        print_odd(ODD + "!")
    assert sys.stdout is out and sys.stderr is err
    for stream in (out, err):
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)  # pyright: ignore[reportAttributeAccessIssue]
        assert "\x1b" not in text and r"[red]\x1b[2J \xff.jpg" in text
    assert ":smile:" in out.buffer.getvalue().decode(encoding)  # pyright: ignore[reportAttributeAccessIssue]


def test_colors_of_tables_pass_and_other_codes_do_not():
    stream = io.StringIO()
    Console(file=streams.colored(stream), force_terminal=True, markup=False).print(ODD, style="red")
    assert "\x1b[31m" in stream.getvalue() and "\x1b[2J" not in stream.getvalue()


def test_a_name_is_no_formula_in_a_picture():
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_title(drawn("$a_{ $b" + ODD))
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize("code", ["8", "08", "8;1", "08;1", "1;8", "1;008;4", ";8"])
def test_no_code_hides_text(code: str):
    assert shown(f"a\x1b[{code}mb", colors=True) == f"a\\x1b[{code}mb"


@pytest.mark.parametrize("code", ["", "0", "1;31", "38;5;208", "48;2;80;18;88", "98"])
def test_codes_of_colors_pass(code: str):
    assert shown(f"a\x1b[{code}mb\x07", colors=True) == f"a\x1b[{code}mb\\x07"
