"""Embeds faces, or says whether two are of one person.

python scripts/inference.py --checkpoint WORKDIR --img face.jpg
python scripts/inference.py --weight backbone.pth --network r50 --img FOLDER --output FOLDER
python scripts/inference.py --onnx model.onnx --verify a.jpg b.jpg --calibration c.json
"""

import json
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated

import tyro

from arcface_jax import errors
from arcface_jax.commands import embed as command
from arcface_jax.inference.open_model import ModelChoice, open_model


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    # The text is said here, for tyro finds no other in a script that is not an imported module.
    model: Annotated[ModelChoice, tyro.conf.arg(name="", help="The network; name one.")]
    request: Annotated[command.Request, tyro.conf.arg(name="", help="What to do with it.")]


def main(argv: list[str]) -> None:
    """The command."""
    flags = (tyro.conf.FlagCreatePairsOff,)  # no `--no-` twins
    arguments = tyro.cli(
        Arguments, args=argv, prog="inference.py", description=__doc__, config=flags
    )
    with errors.reported(), warnings.catch_warnings():
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        result = command.run(
            arguments.request,
            open_model=lambda **options: open_model(arguments.model, **options),
        )
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
