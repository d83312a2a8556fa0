"""Turn pydantic's errors into messages that name the field, its value, the range and the fix."""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import pydantic


@dataclasses.dataclass(frozen=True)
class Hint:
    """In a field's `Annotated` type: ends the message when the value is out of range."""

    text: str


_BOUNDS = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
}


def explain(error: pydantic.ValidationError, *, root: type, given: Any) -> str:
    """Describes every field at fault.

    A field's validator raises a `ValueError` whose text either continues the sentence "FIELD VALUE
    ...", as in "must increase", or is an instruction.

    Args:
      error: error of `root`, or of the section that the error's title names.
      root: the class of the whole configuration.
      given: what was validated: keyword arguments, or parsed JSON.

    Returns:
      A sentence for each field, joined with semicolons.
    """
    prefixes = {cls.__name__: (name, cls) for name, cls in sections(root).items()}
    prefix, section = prefixes.get(error.title, ("", root))
    return "; ".join(
        _sentence(item, prefix, section, root=root, given=given)
        for item in error.errors(include_url=False)
    )


def sections(root: type) -> dict[str, type]:
    """Returns the classes of a configuration by dotted name of their section; "" is the root's."""
    found = {"": root}
    for field in dataclasses.fields(root):
        if dataclasses.is_dataclass(field.default):
            for inner, cls in sections(type(field.default)).items():
                found[f"{field.name}.{inner}".rstrip(".")] = cls
    return found


def _sentence(item: Any, prefix: str, section: type, *, root: type, given: Any) -> str:
    path = list(itertools.takewhile(lambda part: isinstance(part, str), item["loc"]))
    name = ".".join([prefix, *path]).strip(".") or section.__name__
    name = former_names(root).get(name, name)
    if item["type"] in ("unexpected_keyword_argument", "unexpected_property"):
        return f"there is no {name}{_nearest(path[-1], root)}"
    if item["type"] in _BOUNDS:
        key, words = _BOUNDS[item["type"]]
        bound = item["ctx"][key]
        limit = str(bound) if isinstance(bound, int) else f"{bound:g}"
        expected = f"{words} {limit}" if (key, bound) != ("ge", 0) else "must not be negative"
    elif item["type"] == "value_error":
        expected = str(item["ctx"]["error"])
    else:
        return f"{name}: {item['msg']} (got {item['input']!r})"
    value = _value(given, item["loc"], default=item["input"])
    colon = "" if expected.startswith("must ") else ":"
    return f"{name} {value!r}{colon} {expected}{_ending(name, root)}"


def _value(given: Any, location: Sequence[str | int], *, default: Any) -> Any:
    """Returns the given value; for an element of a tuple, the whole innermost tuple."""
    for part in location[:-1] if isinstance(location[-1], int) else location:
        try:
            given = given[part]
        except (KeyError, IndexError, TypeError):
            return default
    return given


def _ending(name: str, root: type) -> str:
    """Returns the field's hint and its default, which is a usual value."""
    prefix, _, last = name.rpartition(".")
    section = sections(root)[prefix]
    annotation = get_type_hints(section, include_extras=True)[last]
    hints = [m.text for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Hint)]
    (default,) = (field.default for field in dataclasses.fields(section) if field.name == last)
    usual = f" (default {default!r})" if default not in (None, ()) else ""
    return "".join(f": {hint}" for hint in hints[-1:]) + usual


def _nearest(unknown: str, root: type) -> str:
    """Suggests where to look instead of an unknown field."""
    names = [
        f"{prefix}.{field.name}".lstrip(".")
        for prefix, section in sections(root).items()
        for field in dataclasses.fields(section)
        if not dataclasses.is_dataclass(field.default)
    ]
    near = difflib.get_close_matches(unknown, [name.rpartition(".")[2] for name in names])
    likely = [name for name in names if name.rpartition(".")[2] in near]
    meant = f"did you mean {' or '.join(likely)}? " if likely else ""
    return f" ({meant}arcface-jax train --help lists all)"


def former_names(root: type) -> Mapping[str, str]:
    """Maps former dotted names of fields to their present names."""
    return {
        f"{prefix}.{old}".lstrip("."): f"{prefix}.{field.name}".lstrip(".")
        for prefix, section in sections(root).items()
        for field in dataclasses.fields(section)
        for old in _former(section, field.name)
    }


def _former(section: type, name: str) -> list[str]:
    annotation = get_type_hints(section, include_extras=True)[name]
    choices: list[str] = []
    for metadata in getattr(annotation, "__metadata__", ()):
        alias = getattr(metadata, "validation_alias", None)
        if isinstance(alias, pydantic.AliasChoices):
            choices += [choice for choice in alias.choices if isinstance(choice, str)]
    return [choice for choice in choices if choice != name]
