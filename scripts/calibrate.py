"""Finds the threshold for a false accept rate on your pairs, and saves it for inference.

python scripts/calibrate.py --checkpoint WORKDIR --pairs pairs.bin --far 1e-2 --output c.json
python scripts/calibrate.py --weight backbone.pth --network r50 --pairs pairs.bin --output c.json
python scripts/calibrate.py --onnx model.onnx --pairs pairs.bin --output c.json
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from arcface_jax import errors
from arcface_jax.data.pairs.opening import open_for_runs
from arcface_jax.evaluation import calibration, verification
from arcface_jax.inference.embedder import Embedder
from arcface_jax.inference.open_model import ModelChoice, config_of, open_model


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    # The text is said here, for tyro finds no other in a script that is not an imported module.
    model: Annotated[ModelChoice, tyro.conf.arg(name="", help="The network; name one.")]
    pairs: str
    """The pairs: a verification set, as evaluate.py takes it: a.bin, or LIST:FOLDER."""
    output: Path
    """The JSON file to write."""
    far: float = 1e-3
    """The target: the share of pairs of different people that may be accepted."""
    flip: bool = False
    """Whether to add the embeddings of the mirrored faces; inference then does so too."""
    batch_size: int = 256
    """Images per forward pass."""


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(
        Arguments, args=argv, prog="calibrate.py", description=__doc__, config=_FLAGS
    )
    begin = time.perf_counter()
    with errors.reported():
        config = config_of(arguments.model)
        (pair_set,) = open_for_runs([config], [arguments.pairs])
        verification.check(pair_set)
        model = open_model(arguments.model, batch_size=arguments.batch_size)
        embedder = Embedder(model, flip=arguments.flip, batch_size=arguments.batch_size)
        found = calibration.calibrate(
            embedder(pair_set.images),
            pair_set,
            far=arguments.far,
            flip=arguments.flip,
            model=model.digest(),
        )
        calibration.write(found, arguments.output)
    print(calibration.in_words(found))
    seconds = round(time.perf_counter() - begin, 1)
    result = {**dataclasses.asdict(found), "seconds": seconds, "files": [str(arguments.output)]}
    print("RESULT " + json.dumps(result))


# One spelling of a flag, no `--no-` twins.
_FLAGS = (tyro.conf.FlagCreatePairsOff,)

if __name__ == "__main__":
    main(sys.argv[1:])
