"""Select a network's arrays by patterns of dotted names, for freezing and learning rates."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from arcface_jax.errors import ConfigError
from arcface_jax.models import stacks

_SHOWN = 5


def select(patterns: Iterable[str], names: Sequence[str], *, field: str) -> set[str]:
    """Returns the names that match at least one of the patterns.

    Args:
      patterns: names with `*` for any characters, including dots, and `?` for one.
      names: names of all arrays.
      field: field of the configuration that the patterns come from, for the error message.

    Raises:
      ConfigError: naming every pattern that matches none.

    Examples:
      >>> sorted(select(["conv1.*"], ["conv1.kernel", "layer1.0.conv1.kernel"], field="frozen"))
      ['conv1.kernel']
    """
    fitting = {p: {name for name in names if fnmatchcase(name, p)} for p in patterns}
    unfit = [_explain(p, names) for p, found in fitting.items() if not found]
    if unfit:
        raise ConfigError(f"{field} matches no array of the network: {'; '.join(unfit)}")
    return set().union(*fitting.values())


def factors(
    rates: Iterable[tuple[str, float]], names: Sequence[str], *, field: str
) -> dict[str, float]:
    """Returns the learning-rate factor by name: from the last pattern that matches, or 1.

    Raises:
      ConfigError: a pattern matches no name.

    Examples:
      >>> factors([("*", 0.1), ("fc.*", 1.0)], ["bn1.scale", "fc.kernel"], field="rates")
      {'bn1.scale': 0.1, 'fc.kernel': 1.0}
    """
    chosen = dict.fromkeys(names, 1.0)
    select((pattern for pattern, _ in rates), names, field=field)
    for pattern, factor in rates:
        chosen |= {name: factor for name in names if fnmatchcase(name, pattern)}
    return chosen


def _explain(pattern: str, names: Sequence[str]) -> str:
    for name in names:
        if any(fnmatchcase(member, pattern) for member in stacks.names_of_members(name) or ()):
            return (
                f"{pattern!r} (its layer is part of a stack, which is selected as a whole, for "
                f"instance {name})"
            )
    near = difflib.get_close_matches(pattern, names, n=_SHOWN, cutoff=0.3)
    return f"{pattern!r} (close matches: {', '.join(near or list(names)[:_SHOWN])})"
