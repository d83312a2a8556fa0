"""Import packages that only some exports need."""

import importlib
from typing import Any

from arcface_jax.errors import UserError, install


def require(name: str, *, extra: str = "onnx") -> Any:
    """Imports a module of a package that an extra installs.

    Raises:
      UserError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"this needs the package {error.name}: {install(extra)}") from error
