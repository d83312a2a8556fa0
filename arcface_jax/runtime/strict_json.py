"""JSON that every parser accepts: non-finite numbers become null."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def dumps(
    value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> str:
    """Serializes a value; NaN and infinity, which JSON does not have, become null.

    Args:
      value: as for `json.dumps`.
      indent: as for `json.dumps`.
      default: as for `json.dumps`.
    """
    return json.dumps(_without_nan(value), indent=indent, default=default, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
