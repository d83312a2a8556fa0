"""Evaluates a network on IJB-B or IJB-C: pairs of templates, and identification.

python scripts/evaluate_ijb.py --checkpoint WORKDIR --data IJBC --protocol ijbc --output runs/ijbc
python scripts/evaluate_ijb.py --weight backbone.pth --network r50 --data IJBC --output runs/ijbc
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from rich.console import Console

from arcface_jax import errors
from arcface_jax.evaluation import features, ijb, ijb_files, ijb_tables, roc_plot
from arcface_jax.evaluation.ijb_files import IjbSet, Protocol
from arcface_jax.network import Model, Network
from convert.any_model import ModelChoice, open_model


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


def extract(arguments: Arguments, model: Model, ijb_set: IjbSet, *, mirrored: bool):
    """The features of all images, those on disk included."""
    total = len(ijb_set.images)

    def progress(done: int) -> None:
        print(f"features: {done:,} of {total:,} images", file=sys.stderr)

    listed = hashlib.sha256(ijb_set.landmarks.tobytes())
    listed.update("\n".join(path.name for path in ijb_set.images).encode())
    return features.extract(
        model,
        lambda i: features.aligned_image(ijb_set.images[i], ijb_set.landmarks[i]),
        names=[path.name for path in ijb_set.images],
        folder=arguments.output / "features",
        settings={"model": model.digest(), "images and landmarks": listed.hexdigest()},
        mirrored=mirrored,
        threads=arguments.threads,
        host_rows=model.rows_of_this_host if isinstance(model, Network) else None,
        progress=progress,
    )


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="evaluate_ijb.py", description=__doc__)
    begin = time.perf_counter()
    with errors.reported():
        options = [ijb.Options.parse(letters) for letters in arguments.options]
        ijb_set = ijb_files.read(arguments.data, arguments.protocol)
        model = open_model(arguments.model, batch_size=arguments.batch_size)
        extracted = extract(arguments, model, ijb_set, mirrored=any(o.mirrored for o in options))
        if jax.process_index():
            return  # the first host does the rest
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
