"""Generate a small data set in the file formats of IJB-B or IJB-C from labeled aligned faces.

python scripts/make_ijb.py --source FOLDER --output runs/small_ijbc
python scripts/make_ijb.py --source synthetic --output runs/small_ijbc --subjects 40
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arcface_jax.commands import Result, command
from arcface_jax.config import DataConfig, command_line
from arcface_jax.config.choices import IjbProtocol
from arcface_jax.data import opening
from arcface_jax.evaluation.protocols import ijb_generator


@dataclass(frozen=True)
class Arguments:
    """Options of `make_ijb.py`."""

    output: Path
    """Folder to create."""
    source: str = opening.SYNTHETIC
    """Training set, as in --data.path of train.py: a folder with train.rec, or `synthetic`."""
    protocol: IjbProtocol = "ijbc"
    """Protocol whose file names to use."""
    subjects: int = 40
    """Number of people, with at least three images each."""
    pairs: int = 10_000
    """Pairs of different people, if there are enough; pairs of one person are added."""
    seed: int = 0
    """Random seed; determines the files."""


@command
def main(words: Sequence[str], *, prog: str = "make_ijb.py") -> Result:
    """Writes the data set."""
    arguments = command_line.parse(
        Arguments, words, prog=prog, description=__doc__ or "", options_only=True
    )
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
    return Result({"images": images})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
