"""Load a part of a run by name: a built-in one, or your own as `package.module:name`.

The built-in parts are listed only here. A new one needs a file and one line in `BUILT_IN`; one from
outside the package needs a file. docs/extending.md has the protocols.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from arcface_jax.errors import ConfigError

_IRESNET = "arcface_jax.models.iresnet:make"
_MOBILEFACENET = "arcface_jax.models.mobilefacenet:make"
_VIT = "arcface_jax.models.vit:make"
_EDGEFACE = "arcface_jax.models.edgeface:make"

# Field of the configuration -> name -> location. Strings, so that a name can be checked without
# importing it.
BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "head.loss": {
        "arcface": "arcface_jax.heads.margins:make_arcface",
        "cosface": "arcface_jax.heads.margins:make_cosface",
        "combined": "arcface_jax.heads.margins:make_combined",
        "adaface": "arcface_jax.heads.margins:make_adaface",
        "magface": "arcface_jax.heads.margins:make_magface",
        "curricularface": "arcface_jax.heads.margins:make_curricularface",
    },
    "model.network": {
        "r_tiny": _IRESNET,
        "r18": _IRESNET,
        "r34": _IRESNET,
        "r50": _IRESNET,
        "r100": _IRESNET,
        "r200": _IRESNET,
        "r2060": _IRESNET,
        "adaface_ir18": _IRESNET,
        "adaface_ir50": _IRESNET,
        "adaface_ir101": _IRESNET,
        "mbf": _MOBILEFACENET,
        "mbf_large": _MOBILEFACENET,
        "mobilefacenet_y1": _MOBILEFACENET,
        "edgeface_xs": _EDGEFACE,
        "edgeface_s": _EDGEFACE,
        "vit_t": _VIT,
        "vit_t_dp005_mask0": _VIT,
        "vit_s": _VIT,
        "vit_s_dp005_mask_0": _VIT,
        "vit_b": _VIT,
        "vit_b_dp005_mask_005": _VIT,
        "vit_l_dp005_mask_005": _VIT,
        "vit_h": _VIT,
    },
    "optimizer.kind": {
        "sgd": "arcface_jax.training.optim:sgd",
        "adamw": "arcface_jax.training.optim:adamw",
        "lars": "arcface_jax.training.optim:lars",
        "lamb": "arcface_jax.training.optim:lamb",
    },
}

Options = Iterable[tuple[str, float]]
"""Settings of a plug-in, by name, as `--head.options alpha 0.5 beta 2` gives them."""

_WORD = r"[A-Za-z_]\w*"
_REFERENCE = re.compile(rf"({_WORD}(?:\.{_WORD})*:{_WORD})(?::(.*))?", re.DOTALL)
# `pairs.txt:FOLDER` is a list of pairs and the folder of its images, not a module.
_FILES = (".txt", ".csv", ".tsv", ".lst")


class Reference(NamedTuple):
    """A part from outside the package."""

    name: str
    """`package.module:name`."""
    argument: str
    """Text after a second colon; empty without one."""

    @property
    def attribute(self) -> str:
        """Last part of the name."""
        return self.name.rpartition(":")[2]


def parse(text: str) -> Reference | None:
    """Parses `package.module:name` or `package.module:name:ARGUMENT`; None for anything else."""
    found = _REFERENCE.fullmatch(text)
    if found is None:
        return None
    module = found[1].partition(":")[0]
    if module.lower().endswith(_FILES) or os.path.exists(text):
        return None
    return Reference(found[1], found[2] or "")


def expectation(name: str, *, field: str) -> str | None:
    """Returns what a field expects instead of `name`; None if `name` has a valid form.

    Nothing is imported, so `package.module:name` may still not exist.
    """
    known = BUILT_IN[field]
    if name in known or _is_plain_reference(name):
        return None
    near = difflib.get_close_matches(name, known, n=2)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    option = field.replace("_", "-")
    return (
        f"set --{option} to one of {', '.join(map(repr, known))}, or to package.module:name for "
        f"a part of your own (docs/extending.md){meant}"
    )


def load(name: str, *, field: str, options: Options = ()) -> Any:
    """Imports a part.

    The current directory is searched last, so a file next to the recipe also works with the
    installed command.

    Args:
      name: name of a built-in part of that field, or `package.module:name`.
      field: what the name was given for: "head.loss", "data.path", "--detector".
      options: options in the recipe; built-in parts take none.

    Raises:
      ConfigError: the part does not exist, cannot be imported or called, or is built in and was
        given options.
    """
    where = BUILT_IN.get(field, {}).get(name)
    if where is None and not _is_plain_reference(name):
        expected = expectation(name, field=field) if field in BUILT_IN else _FORM
        raise ConfigError(f"unknown {field} {name!r}: {expected}")
    if where is not None and tuple(options):
        section = field.rpartition(".")[0]
        raise ConfigError(
            f"{section}.options {_shown(options)}: the built-in {name} takes no options, only the "
            f"fields of {section}; remove them, or set --{field} to a part of your own"
        )
    return _import(where or name, field=field)


def settings(given: Options, /, **defaults: float) -> dict[str, float]:
    """Returns the options of a plug-in, by name, with defaults for those not given.

    `settings(head.options, low=0.1, high=0.5)` refuses any other name.

    Raises:
      ConfigError: the part has no option of that name.

    Examples:
      >>> settings((("t", 0.3),), t=0.2, low=0.0)
      {'t': 0.3, 'low': 0.0}
    """
    unknown = [name for name, _ in given if name not in defaults]
    if unknown:
        near = difflib.get_close_matches(unknown[0], defaults, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown options {', '.join(map(repr, unknown))} in --head.options, --model.options "
            f"or --optimizer.options: this part takes {', '.join(defaults) or 'none'}{meant}"
        )
    return {**defaults, **dict(given)}


TRUSTED = "ARCFACE_JAX_PLUGINS"
"""Environment variable with a comma-separated list of packages that any run may use parts of."""


def require_own(named: Iterable[tuple[str, str]], *, source: Path) -> None:
    """Refuses parts that a file names, unless their code is the user's own.

    A run's config.json may be untrusted, and importing a module or calling its functions runs code.
    Names on the command line or in a recipe are not checked.

    Args:
      named: fields with their `package.module:name`.
      source: the file, for the message.

    Raises:
      ConfigError: a part is in the standard library, in a package unrelated to this one, or next to
        the file.
    """
    trusted = [name.strip() for name in os.environ.get(TRUSTED, "").split(",")]
    for field, name in named:
        top = name.partition(":")[0].partition(".")[0]
        problem = None if top in trusted else _why_foreign(top, source.parent)
        if problem:
            raise ConfigError(
                f"{source} names {name} for {field}, which is {problem}, and is not imported: if "
                f"you trust it, set {TRUSTED}={top}"
            )


def _why_foreign(package: str, folder: Path) -> str | None:
    """Returns why a package is not the user's own, or None; imports nothing."""
    if package in sys.stdlib_module_names or package == __name__.partition(".")[0]:
        return "no part that was made for runs"
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None  # `load` reports it
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else [])]
    if any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places):
        return "code in the folder of the run"
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    inside = [Path(place).resolve() for place in places]
    if not any(place.is_relative_to(base) for place in inside for base in installed):
        return None
    for distribution in importlib.metadata.packages_distributions().get(package, ()):
        needs = importlib.metadata.requires(distribution) or ()
        if any(re.match(r"arcface[-_.]jax\b", need, re.IGNORECASE) for need in needs):
            return None
    return "of an installed package that was not made for this one"


_FORM = "expected package.module:name, for instance mypkg.parts:make"


def _is_plain_reference(name: str) -> bool:
    found = _REFERENCE.fullmatch(name)
    return found is not None and found[2] is None


def _import(where: str, *, field: str) -> Any:
    module_name, _, attribute = where.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # the installed command has its own folder there instead
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{field} {where}: cannot import {module_name} ({error}); run the command in the "
            "folder that holds it, install its package, or add its folder to PYTHONPATH"
        ) from error
    try:
        part = getattr(module, attribute)
    except AttributeError as error:
        public = [name for name in vars(module) if not name.startswith("_")]
        near = difflib.get_close_matches(attribute, public, n=2)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(
            f"{field} {where}: {module.__file__} has no {attribute!r}{meant}"
        ) from error
    if not callable(part):
        raise ConfigError(
            f"{field} {where}: expected a function or class, found {type(part).__name__}"
        )
    return part


def _shown(options: Options) -> str:
    return " ".join(f"{name} {value:g}" for name, value in options)
