"""Draw the effect of each augmentation on a face (docs/input_pipeline.md), and time it.

python scripts/augmentations.py [--path FOLDER] [--output docs/images/augmentations.jpg]
"""

import sys
import time
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from arcface_jax.commands import Result, command
from arcface_jax.config import DataConfig
from arcface_jax.data import augment, opening

_SAMPLES = 7
_TIMED = 400


@command
def main(
    path: str = "synthetic",
    output: Path = Path("docs/images/augmentations.jpg"),
    image: int = 0,
    seed: int = 0,
) -> Result:
    """Draws a row for each augmentation: the image, and seven results.

    Args:
      path: A training set, as in --data.path of train.py.
      output: The picture to write.
      image: Number of the image in the set.
      seed: Random seed.
    """
    face, _ = opening.open_source(DataConfig(path=path), seed=0)[image]
    rng = np.random.default_rng(seed)
    figure = Figure(figsize=(1.1 * (_SAMPLES + 1), 1.2 * len(augment.OPERATIONS)))
    panels = figure.subplots(len(augment.OPERATIONS), _SAMPLES + 1)
    microseconds = {}
    for row, operation in zip(panels, augment.OPERATIONS.values(), strict=True):
        draws = rng.random((_TIMED, operation.draws)).tolist()
        start = time.process_time()
        outcomes = [operation.apply(face, draw) for draw in draws]
        microseconds[operation.name] = round(1e6 * (time.process_time() - start) / _TIMED, 1)
        for panel, shown in zip(row, [face, *outcomes], strict=False):
            panel.imshow(shown)
            panel.set_axis_off()
        row[0].set_title(operation.name, fontsize=8, loc="left")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.97, wspace=0.04, hspace=0.2)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=75)
    for name, cost in microseconds.items():
        print(f"{name:24} {cost:7.1f} us of CPU time per augmented image")
    return Result({"microseconds": microseconds}, [output])


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
