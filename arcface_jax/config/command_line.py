"""Parse command lines: one style of options, help and errors for every command.

Booleans are `--flag` and `--no-flag` (`--data.flip`, `--data.no-flip`); a value after the flag,
`--data.flip False`, is accepted too. Descriptions may contain example commands, which --help prints
one per line.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from arcface_jax import errors

T = TypeVar("T")


def _within(
    kind: type[int] | type[float], least: float, most: float = math.inf
) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Returns how a number in a range is parsed; others are refused like words."""

    def parsed(words: list[str]) -> int | float:
        number = kind(words[0])
        if not least <= number <= most:
            upto = f" to {most}" if most < math.inf else " or more"
            raise ValueError(f"{number} must be {least}{upto}")
        return number

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=parsed,
        is_instance=lambda value: isinstance(value, (int, kind)),
        str_from_instance=lambda value: [str(value)],
    )


Count = Annotated[int, _within(int, 0)]
"""A whole number, from 0."""
Positive = Annotated[int, _within(int, 1)]
"""A whole number, from 1."""
Share = Annotated[float, _within(float, 0, 1)]
"""A number from 0 to 1."""
Quality = Annotated[int, _within(int, 1, 100)]
"""Quality of a JPEG file."""


def parse(
    target: type[T],
    words: Sequence[str],
    *,
    prog: str,
    description: str,
    default: T | None = None,
    options_only: bool = False,
) -> T:
    """Parses all words.

    Args:
      target: the dataclass, or union of dataclasses, to create.
      words: the command line after the program's name.
      prog: the program's name in usage and errors.
      description: the text at the top of --help.
      default: an instance with the default values.
      options_only: there are no positional arguments, so a word after a flag is a wrong value.

    Raises:
      SystemExit: code 2 and a message on stderr for a mistake; code 0 after --help.
    """
    words = _without_values(words, _flags(target), options_only=options_only)
    text = with_examples(description)
    if default is None:
        return tyro.cli(target, args=words, prog=prog, description=text)
    return tyro.cli(target, args=words, prog=prog, description=text, default=default)


def parse_known(
    target: type[T], words: Sequence[str], *, prog: str, description: str
) -> tuple[T, list[str]]:
    """Parses the words that belong to `target`; returns it and the remaining words.

    Raises:
      SystemExit: as `parse`.
    """
    words = _without_values(words, _flags(target))
    return tyro.cli(
        target,
        args=words,
        prog=prog,
        description=with_examples(description),
        return_unknown_args=True,
    )


def call_subcommand(
    functions: Mapping[str, Callable[..., Any]],
    words: Sequence[str],
    *,
    prog: str,
    description: str,
) -> Any:
    """Calls the function that the first word names, with the options that follow it.

    Raises:
      SystemExit: as `parse`.
    """
    named = functions.get(words[0]) if words else None
    if named is None and not (words and words[0] in ("-h", "--help")):
        with errors.reported():
            raise errors.UserError(errors.unknown(words[0] if words else "", functions, prog=prog))
    words = _without_values(words, () if named is None else _flags(named))
    return tyro.extras.subcommand_cli_from_dict(
        dict(functions), args=words, prog=prog, description=with_examples(description)
    )


def with_examples(description: str) -> str:
    """Indents example commands and code, because tyro joins lines that start with a letter."""
    kept: list[str] = []
    for line in description.strip().splitlines():
        if line.startswith((" ", "arcface-jax ", "python ")):
            # Without the empty line above, which tyro would double.
            if kept and not kept[-1]:
                kept.pop()
            kept.append(f"    {line.strip()}")
        else:
            kept.append(line)
    return "\n".join(kept)


def _flags(target: Any) -> tuple[str, ...]:
    """Returns dotted names of the boolean fields of a dataclass, a union of them, or a function.

    Includes aliases from annotations.
    """
    return tuple(name.replace("_", "-") for name, kind in _leaves(target) if kind is bool)


def _leaves(target: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    while typing.get_origin(target) is Annotated:
        target, *notes = typing.get_args(target)
        for alias in (alias for note in notes for alias in getattr(note, "aliases", None) or ()):
            yield alias.removeprefix("--"), target
    if typing.get_origin(target) in (typing.Union, types.UnionType):
        for member in typing.get_args(target):
            yield from _leaves(member, prefix)
    elif dataclasses.is_dataclass(target) or isinstance(target, types.FunctionType):
        for name, kind in typing.get_type_hints(target, include_extras=True).items():
            yield from _leaves(kind, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, target


def _without_values(
    words: Sequence[str], flags: Sequence[str], *, options_only: bool = False
) -> list[str]:
    """Rewrites `--a.flag False` and `--a.flag=False` as `--a.no-flag`.

    A section's prefix may be omitted, as tyro does for the sections of some commands.
    """
    taken: list[str] = []
    rest = list(words)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        name = option.removeprefix("--").replace("_", "-")
        is_flag = option.startswith("--") and any(f".{f}".endswith(f".{name}") for f in flags)
        if not is_flag:
            taken.append(option + equals + value)
            continue
        follows = rest[0] if rest else ""
        if not equals and (follows in ("True", "False") or _is_value(follows, options_only)):
            value = rest.pop(0)
        section, dot, leaf = option.removeprefix("--").rpartition(".")
        negated = f"--{section}{dot}no-{leaf}"
        if value not in ("", "True", "False"):
            with errors.reported():
                raise errors.ConfigError(
                    f"{option} {value!r}: expected 'True' or 'False'; or write {option} or "
                    f"{negated}, without a value"
                )
        taken.append(negated if value == "False" else option)
    return taken


def _is_value(word: str, options_only: bool) -> bool:
    return options_only and bool(word) and not word.startswith("-")
