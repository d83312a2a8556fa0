"""The README and the pages of docs/: their blocks of code, and the commands in them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What starts a process on this host or others, in front of the command proper.
_LAUNCHERS = {"srun": 0, "mpirun": 0, "exec": 0}


class Command(NamedTuple):
    """A line of a shell, without what launches it."""

    line: str
    """As it stands on the page."""
    words: list[str]
    """The program and its arguments."""


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return [text for kind, text in _BLOCK.findall(page.read_text()) if kind == language]


def lines(page: Path) -> list[str]:
    """The shell lines of a page, continued lines joined."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def commands(page: Path) -> list[Command]:
    """The commands of a page; what its own `export` lines set is filled in."""
    found, variables = [], {"PWD": "."}
    for line in lines(page):
        words = _without_launcher(shlex.split(_filled(line, variables), comments=True))
        if words[:1] == ["export"]:
            variables |= dict(word.split("=", 1) for word in words[1:])
        if words:
            found.append(Command(line, words))
    return found


def _filled(line: str, variables: Mapping[str, str]) -> str:
    line = line.replace('"$@"', "configs/ms1mv3_r50.py")  # a launcher's own arguments are a run's
    return re.sub(r"\$(\w+)", lambda name: variables.get(name[1], "given"), line)


def _without_launcher(words: list[str]) -> list[str]:
    words = [word for word in words if word not in ("...", "&", "\\")]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words and words[0] in _LAUNCHERS:
        starts = (n for n, word in enumerate(words) if word.endswith(("python", "arcface-jax")))
        words = words[next(starts, len(words)) :]
    return words


def inline(page: Path) -> list[str]:
    """The code spans in running text."""
    text = _BLOCK.sub("", page.read_text())
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def script(lines: Iterable[str]) -> str:
    """A bash script of commands; each is echoed behind `>>>`, and the first that fails ends it."""
    begin = f'set -e\narcface-jax() {{ "{sys.executable}" -m arcface_jax "$@"; }}\n'
    return begin + "".join(f"echo '>>>' '{line}'\n{line}\n" for line in lines)


def run(lines: Iterable[str], folder: Path, **variables: str) -> str:
    """Runs commands in a folder, on CPUs; returns what they print.

    Args:
      lines: as they stand on a page.
      folder: where; modules in it can be imported.
      **variables: of the environment.
    """
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", **variables}
    done = subprocess.run(
        ["bash", "-c", script(lines)],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout
