"""Makes a small data set in the file formats of IJB-B or IJB-C, out of labeled aligned faces.

python scripts/make_ijb.py --source FOLDER --output runs/small_ijbc
python scripts/make_ijb.py --source synthetic --output runs/small_ijbc --subjects 40
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from arcface_jax import errors
from arcface_jax.config import DataConfig
from arcface_jax.config.choices import IjbProtocol as Protocol
from arcface_jax.data import opening
from arcface_jax.evaluation.protocols import ijb_generator


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    output: Path
    """The folder to make."""
    source: str = opening.SYNTHETIC
    """What --data.path of training takes: a folder with train.rec, or `synthetic`."""
    protocol: Protocol = "ijbc"
    """Whose file names."""
    subjects: int = 40
    """People, with three images each or more."""
    pairs: int = 10_000
    """Pairs of different people, as far as there are so many; those of one person come on top."""
    seed: int = 0
    """The same seed, the same files."""


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="make_ijb.py", description=__doc__)
    begin = time.perf_counter()
    with errors.reported():
        source = opening.open_source(DataConfig(path=arguments.source), seed=arguments.seed)
        ijb_generator.generate(
            source,
            arguments.output,
            protocol=arguments.protocol,
            subjects=arguments.subjects,
            pairs=arguments.pairs,
            seed=arguments.seed,
        )
    images = len(list((arguments.output / "loose_crop").iterdir()))
    print(f"{arguments.output}: {images} images of {arguments.subjects} people")
    seconds = round(time.perf_counter() - begin, 1)
    print("RESULT " + json.dumps({"images": images, "seconds": seconds, "files": []}))


if __name__ == "__main__":
    main(sys.argv[1:])
