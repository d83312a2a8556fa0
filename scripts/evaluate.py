"""Verifies a trained network on pairs of faces: accuracy, ROC, TAR at FAR.

python scripts/evaluate.py --checkpoint WORKDIR [--targets a.bin b.bin]
python scripts/evaluate.py --weight backbone.pth --network r50 --targets a.bin b.bin
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from arcface_jax import checkpoint, errors
from arcface_jax import config as configs
from arcface_jax.config import Config
from arcface_jax.data import pairs
from arcface_jax.evaluation import tables, verification
from arcface_jax.network import Network


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    checkpoint: Path | None = None
    """WORKDIR of a training run; its newest checkpoint is evaluated."""
    weight: Path | None = None
    """Or a backbone.pth."""
    network: str = "r50"
    """The network of --weight."""
    targets: tuple[str, ...] = ()
    """Verification sets (.bin files); those of the run when not given."""
    batch_size: int = 256
    """Images per forward pass, over all devices."""


def open_model(arguments: Arguments) -> tuple[Network, Config]:
    """The network to evaluate, and the configuration that names its default sets."""
    if arguments.checkpoint is not None and arguments.weight is None:
        config = checkpoint.read_config(arguments.checkpoint)
        return Network.from_workdir(arguments.checkpoint, batch_size=arguments.batch_size), config
    if arguments.weight is None or arguments.checkpoint is not None:
        raise errors.UserError("name one network: either --checkpoint WORKDIR or --weight FILE.pth")
    from convert import weights

    params, batch_stats = weights.load(arguments.weight, arguments.network)
    embedder = Network(arguments.network, params, batch_stats, batch_size=arguments.batch_size)
    return embedder, Config()


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="evaluate.py", description=__doc__)
    begin = time.perf_counter()
    with errors.reported():
        embedder, config = open_model(arguments)
        if arguments.targets:
            config = configs.replace(config, evaluation__targets=arguments.targets)
        sets = pairs.open_targets(config)
        if not sets:
            raise errors.UserError(
                "nothing to evaluate on: name verification sets with --targets a.bin b.bin"
            )
        results = [verification.verify(embedder, pair_set) for pair_set in sets]
    # Where nobody watches, rich takes 80 columns; the tables want up to 100.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(*tables.summary(results), *tables.remarks(results), sep="\n")
    metrics = {name: value for result in results for name, value in result.metrics().items()}
    seconds = round(time.perf_counter() - begin, 1)
    print("RESULT " + json.dumps({**metrics, "seconds": seconds, "files": []}))


if __name__ == "__main__":
    main(sys.argv[1:])
