"""The commands of `arcface-jax`, one module each; they parse options before heavy imports."""

import contextlib
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

from arcface_jax import errors
from arcface_jax.config import command_line
from arcface_jax.runtime import homes, streams, strict_json

if TYPE_CHECKING:
    from rich.console import Console

Words = ParamSpec("Words")


class Result(NamedTuple):
    """Result of a command, and its exit code."""

    values: Mapping[str, Any] = {}
    """Values of the RESULT line, to which `seconds` and `files` are added."""
    files: Sequence[str | Path] = ()
    """Files written."""
    code: int = 0
    """The exit code."""
    reported: bool = True
    """False in a process whose RESULT is printed by another process of the run."""


def command(body: Callable[Words, Result]) -> Callable[Words, int]:
    """Turns a function into a command, which prints its RESULT line and returns the exit code.

    A UserError becomes a message on stderr and exit code 2; Ctrl-C a message and 130.
    """

    @functools.wraps(body)
    def run(*words: Words.args, **options: Words.kwargs) -> int:
        begin = time.perf_counter()
        with streams.escaping(), errors.reported():
            homes.find_temporary()
            result = body(*words, **options)
            if result.reported:
                seconds = round(time.perf_counter() - begin, 1)
                files = [str(file) for file in result.files]
                line = {**result.values, "seconds": seconds, "files": files}
                print("RESULT " + strict_json.dumps(line, default=str), flush=True)
        return result.code

    return run


@contextlib.contextmanager
def own_options(names: Mapping[str, str]) -> Iterator[None]:
    """Renames options in error messages from their names in `train` to this command's names.

    Args:
      names: as `own_names`.
    """
    try:
        yield
    except errors.ImageError:
        raise
    except errors.UserError as error:
        error.args = (own_names(str(error), names),)
        raise


def own_names(text: str, names: Mapping[str, str]) -> str:
    """Replaces options of `train` in a text by the options of another command.

    Args:
      text: an error or a note, which names an option as `--data.label-index` or the field as
        `data.label_index`.
      names: "data.label-index" and so on, with this command's names for them.
    """
    for name, own in names.items():
        field = "[-_]".join(map(re.escape, name.split("-")))
        text = re.sub(rf"(?<![\w./-])(?:--)?{field}(?![\w-])", own, text)
    return text


def refuse_changed(options: Any, *fields: str, because: str) -> None:
    """Refuses options that this call would ignore.

    Args:
      options: dataclass of the options.
      fields: names of those that would be ignored.
      because: end of the message after the option: why it is ignored, and the fix.

    Raises:
      UserError: one of them differs from its default.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in fields and value != field.default:
            option = f"--{field.name.replace('_', '-')}"
            several = value if isinstance(value, tuple) else (value,)
            shown = "" if value is True else f" {' '.join(map(str, several))}"
            raise errors.UserError(f"{option}{shown} {because}")


def console() -> "Console":
    """Returns a console for tables: as wide as the terminal, or 100 columns if redirected."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 100
    # Names may contain what looks like markup or emoji: [red], :smile:.
    return Console(file=streams.colored(sys.stdout), width=width, markup=False, emoji=False)


def dispatch(
    functions: Mapping[str, Callable[..., int]],
    words: Sequence[str],
    *,
    prog: str,
    description: str,
) -> int:
    """Runs the command that the first word names, with the remaining words.

    Args:
      functions: each takes words and `prog`, and returns an exit code.
      words: the command line after `prog`.
      prog: the program's name in usage and errors.
      description: the text of --help.
    """
    first = words[0] if words else ""
    if first in ("-h", "--help"):
        print(f"usage: {prog} {{{','.join(functions)}}} [OPTIONS]\n")
        print(command_line.with_examples(description))
        print(f"\n{prog} NAME --help lists the options.")
        return 0
    if first not in functions:
        with errors.reported():
            raise errors.UserError(errors.unknown(first, functions, prog=prog))
    return functions[first](words[1:], prog=f"{prog} {first}")


def write_new(files: Mapping[Path, bytes]) -> None:
    """Writes new files, and creates their folders if missing; if one fails, none is left.

    Args:
      files: content by path.

    Raises:
      UserError: a file already exists, or cannot be written.
    """
    written: list[Path] = []
    try:
        with _removing(written):
            for path, content in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as file:
                    written.append(path)
                    file.write(content)
    except FileExistsError as error:
        raise errors.UserError(f"{error.filename} exists already: choose another name") from error
    except OSError as error:
        path = error.filename or written[-1]
        raise errors.UserError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def _removing(written: list[Path]) -> Iterator[None]:
    """Removes the listed files if the block fails."""
    try:
        yield
    except BaseException:
        for path in written:
            with contextlib.suppress(OSError):  # the first error is the one to report
                path.unlink()
        raise
