"""List the notebooks, or copy them to a folder to run them there.

    arcface-jax notebooks
    arcface-jax notebooks --copy my_notebooks

They read the run in ARCFACE_JAX_WORKDIR, or runs/demo, which `arcface-jax demo` trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arcface_jax import errors
from arcface_jax.commands import Result, command, write_new
from arcface_jax.config import command_line, loading


@dataclass(frozen=True)
class Arguments:
    """Options of `notebooks`."""

    copy: Path | None = None
    """Copy all notebooks to this folder."""


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax notebooks") -> Result:
    """Lists or copies the notebooks."""
    arguments = command_line.parse(
        Arguments, words, prog=prog, description=__doc__ or "", options_only=True
    )
    notebooks = sorted(loading.shipped("notebooks").glob("*.ipynb"))
    names = [path.stem for path in notebooks]
    if arguments.copy is None:
        print(*names, sep="\n")
        return Result({"notebooks": names})
    copies = {arguments.copy / path.name: path.read_bytes() for path in notebooks}
    write_new(copies)
    print(f"{arguments.copy}: {len(copies)} notebooks; they need {errors.install('notebook,onnx')}")
    return Result({"notebooks": names}, [*copies])
