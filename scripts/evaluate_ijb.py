"""Evaluates a network on IJB-B or IJB-C: pairs of templates, and identification.

python scripts/evaluate_ijb.py --checkpoint WORKDIR --data IJBC --protocol ijbc --output runs/ijbc
python scripts/evaluate_ijb.py --weight backbone.pth --network r50 --data IJBC --output runs/ijbc
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console

from arcface_jax import errors
from arcface_jax.config import DistributedConfig
from arcface_jax.evaluation.protocols import ijb, ijb_files, ijb_tables
from arcface_jax.evaluation.protocols.ijb_files import Protocol
from arcface_jax.evaluation.report import roc_plot
from arcface_jax.inference.open_model import ModelChoice, open_model
from arcface_jax.runtime import launch


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    model: tyro.conf.OmitArgPrefixes[ModelChoice]
    data: Path
    """The folder that holds meta/ and loose_crop/."""
    output: Path
    """Where results and features go; a killed run goes on from the features there."""
    protocol: Protocol = "ijbc"
    """Whose files."""
    options: tuple[str, ...] = ("NDF",)
    """N feature norm, D detector score, F mirrored images, or none; several are compared."""
    batch_size: int = 256
    """Images per forward pass, over all devices."""
    threads: int = os.cpu_count() or 4
    """Threads that read and align images."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """With several hosts each embeds its part of the images (docs/multi_host.md)."""


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="evaluate_ijb.py", description=__doc__)
    begin = time.perf_counter()
    with errors.reported():
        launch.join_processes(arguments.distributed)
        options = [ijb.Options.parse(letters) for letters in arguments.options]
        ijb_set = ijb_files.read(arguments.data, arguments.protocol)
        model = open_model(arguments.model, batch_size=arguments.batch_size)
        total = len(ijb_set.images)
        extracted = ijb.embed_images(
            ijb_set,
            model,
            folder=arguments.output / "features",
            flip=any(option.flip for option in options),
            threads=arguments.threads,
            progress=lambda done: print(f"{done:,} of {total:,} images", file=sys.stderr),
        )
        if not launch.is_first():
            return  # it does the rest
        results = [ijb.evaluate(ijb_set, extracted, option) for option in options]
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(*ijb_tables.tables(results), *ijb_tables.remarks(results[0]), sep="\n")
    report = arguments.output / f"{arguments.protocol}.json"
    report.write_text(json.dumps([result.summary() for result in results], indent=2) + "\n")
    picture = report.with_name(f"{arguments.protocol}_roc.png")
    curves = {result.options.label: result.curve for result in results}
    roc_plot.draw(curves, title=f"{arguments.protocol}, pairs of templates", path=picture)
    metrics = {name: value for result in results for name, value in result.metrics().items()}
    seconds = round(time.perf_counter() - begin, 1)
    files = [str(report), str(picture)]
    print("RESULT " + json.dumps({**metrics, "seconds": seconds, "files": files}))


if __name__ == "__main__":
    main(sys.argv[1:])
