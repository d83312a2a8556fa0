"""Embeds faces, or says whether two are of one person.

python scripts/inference.py --checkpoint WORKDIR --img face.jpg
python scripts/inference.py --weight backbone.pth --network r50 --img FOLDER --output FOLDER
python scripts/inference.py --onnx model.onnx --verify a.jpg b.jpg --calibration c.json
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from arcface_jax import errors, inference
from arcface_jax.embedder import Embedder
from arcface_jax.evaluation import calibration
from convert.any_model import ModelChoice, open_model


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    # The text is said here, for tyro finds no other in a script that is not an imported module.
    model: Annotated[ModelChoice, tyro.conf.arg(name="", help="The network; name one.")]
    img: Path | None = None
    """An image, or a folder of them; seeded noise when not given."""
    output: Path | None = None
    """Where embeddings are saved: a .npy file for an image, a folder of shards for a folder."""
    points: tuple[str, ...] = ()
    """To align by: ten numbers x1 y1 ... x5 y5, or a file of lines `image x1 y1 ... x5 y5`."""
    verify: tuple[Path, Path] | None = None
    """Two images to compare instead."""
    threshold: float | None = None
    """The lowest cosine that --verify calls the same."""
    calibration: Path | None = None
    """Or the JSON file of calibrate.py, for this model."""
    normalized: bool = False
    """Whether embeddings are of length 1; the network's own length when not."""
    flip: bool = False
    """Whether to add the embeddings of the mirrored faces."""
    shard_size: int = 10_000
    """Images per shard of a folder."""
    batch_size: int = 64
    """Images per forward pass."""


def run(arguments: Arguments) -> dict:
    """Does what was asked for and returns what RESULT says."""
    threshold, flip = arguments.threshold, arguments.flip
    if arguments.calibration is not None:
        if threshold is not None or arguments.verify is None:
            raise errors.UserError("--calibration goes with --verify, and without --threshold")
        threshold = calibration.read(arguments.calibration)
        flip = threshold.flip
    one = arguments.verify is not None or not (arguments.img and arguments.img.is_dir())
    batch_size, devices = (1, 1) if one else (arguments.batch_size, None)
    model = open_model(arguments.model, batch_size=batch_size, devices=devices)
    embedder = Embedder(model, flip=flip, other_size="resize", batch_size=batch_size)
    if arguments.verify is not None:
        return inference.verify(
            embedder, arguments.verify, points=arguments.points, threshold=threshold
        )
    how = {name: getattr(arguments, name) for name in ("points", "normalized", "output")}
    if one:
        return inference.embed_image(embedder, arguments.img, **how)
    assert arguments.img is not None  # it is a folder
    return inference.embed_folder(embedder, arguments.img, shard_size=arguments.shard_size, **how)


def main(argv: list[str]) -> None:
    """The command."""
    flags = (tyro.conf.FlagCreatePairsOff,)  # no `--no-` twins
    arguments = tyro.cli(
        Arguments, args=argv, prog="inference.py", description=__doc__, config=flags
    )
    with errors.reported(), warnings.catch_warnings():
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        result = run(arguments)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
