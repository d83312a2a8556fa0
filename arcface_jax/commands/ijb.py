"""Evaluate a network on IJB-B or IJB-C: 1:1 on pairs of templates, and 1:N identification.

arcface-jax ijb --workdir WORKDIR --data IJBC --protocol ijbc --output runs/ijbc
arcface-jax ijb --weight backbone.pth --data IJBC --output runs/ijbc
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from arcface_jax.commands import Result, command, console
from arcface_jax.config import DistributedConfig, command_line
from arcface_jax.config.choices import IjbProtocol
from arcface_jax.config.command_line import Positive
from arcface_jax.errors import UserError
from arcface_jax.inference.open_model import ModelChoice, open_model


@dataclass(frozen=True)
class Arguments:
    """Options of `ijb`."""

    model: OmitArgPrefixes[ModelChoice]
    data: Path
    """Folder with meta/ and loose_crop/."""
    output: Path
    """Folder for results and features; the same command resumes from the features there."""
    protocol: IjbProtocol = "ijbc"
    """Protocol that the files belong to."""
    options: tuple[str, ...] = ("NDF",)
    """N feature norm, D detector score, F flipped images, or none; several are compared."""
    batch_size: int = 256
    """Images per forward pass, over all devices."""
    threads: Positive = os.cpu_count() or 4
    """Threads that read and align images."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """With several hosts, each embeds its part of the images."""


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax ijb") -> Result:
    """Embeds the images, prints the tables, and writes results and ROC curves."""
    arguments = command_line.parse(
        Arguments, words, prog=prog, description=__doc__ or "", options_only=True
    )
    from arcface_jax.evaluation.protocols import ijb, ijb_files, ijb_tables
    from arcface_jax.evaluation.report import roc_plot
    from arcface_jax.runtime import launch, strict_json
    from arcface_jax.runtime.files import write_atomic

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
        return Result(reported=False)
    results = [ijb.evaluate(ijb_set, extracted, option) for option in options]
    console().print(*ijb_tables.tables(results), *ijb_tables.remarks(results[0]), sep="\n")
    report = arguments.output / f"{arguments.protocol}.json"
    picture = report.with_name(f"{arguments.protocol}_roc.png")
    curves = {result.options.label: result.curve for result in results}
    summary = strict_json.dumps([result.summary() for result in results], indent=2) + "\n"
    try:
        write_atomic(report, summary)
        roc_plot.draw(curves, title=f"{arguments.protocol}, pairs of templates", path=picture)
    except OSError as error:
        raise UserError(f"cannot write to {arguments.output}: {error.strerror}") from error
    metrics = {name: value for result in results for name, value in result.metrics().items()}
    return Result(metrics, [report, picture])
