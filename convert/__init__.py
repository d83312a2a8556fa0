"""Conversion commands for a checkout: `python -m convert.to_torch` and others.

The code is in `arcface_jax.convert`. Importing its modules from here still works, with a warning,
and stops working in the release after 0.2.
"""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ELSEWHERE = {
    "any_model": "arcface_jax.inference.open_model",
    "modelzoo": "benchmarks.modelzoo",
    "reference_head": "benchmarks.reference_head",
    "reference_step": "benchmarks.reference_step",
    "step_twin": "benchmarks.step_twin",
}


def moved(name: str) -> ModuleType:
    """Returns the present module of `convert.NAME`, with a warning.

    Raises:
      ModuleNotFoundError: there is no such module, or no longer.
    """
    new = _ELSEWHERE.get(name, f"arcface_jax.convert.{name}")
    try:
        module = importlib.import_module(new)
    except ModuleNotFoundError as error:
        if error.name != new:
            raise
        raise ModuleNotFoundError(
            f"convert.{name} has no successor: the modules are now in arcface_jax.convert", name=new
        ) from None
    warnings.warn(
        f"convert.{name} is now {new}; the old name goes with the release after 0.2",
        DeprecationWarning,
        stacklevel=2,
    )
    return module


class _Moved(MetaPathFinder, Loader):
    """Finds every `convert.NAME` that has no file here."""

    def find_spec(self, fullname: str, path: object = None, target: object = None):
        package, _, _ = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = moved(name.rpartition(".")[2])

    def get_code(self, fullname: str) -> None:
        """Refuses `python -m convert.NAME`, which reports the message in one line."""
        raise ImportError(
            f"{fullname} is not a command: use `arcface-jax import` or `arcface-jax export`"
        )


sys.meta_path.append(_Moved())
