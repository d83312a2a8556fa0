"""Verifies trained networks on pairs of faces: accuracy, ROC, TAR at FAR; several side by side.

python scripts/evaluate.py --checkpoint WORKDIR [WORKDIR ...] [--targets a.bin pairs.txt:FOLDER]
python scripts/evaluate.py --weight backbone.pth --network r50 --targets a.bin b.bin
python scripts/evaluate.py --checkpoint WORKDIR --onnx model.onnx --targets a.bin --report FOLDER
"""

import json
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from arcface_jax import errors
from arcface_jax.config import Config
from arcface_jax.data.pairs.opening import open_for_runs
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.report import document, tables
from arcface_jax.evaluation.report.document import Evaluated
from arcface_jax.inference.open_model import ModelChoices, open_models
from arcface_jax.training import checkpoint


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    models: Annotated[ModelChoices, tyro.conf.OmitArgPrefixes]
    targets: tuple[str, ...] = ()
    """Verification sets (docs/evaluation.md); those of the runs when not given."""
    batch_size: int = 256
    """Images per forward pass, over all devices."""
    report: Path | None = None
    """Folder for a page of tables, plots and the hardest pairs (index.html)."""


def evaluate(arguments: Arguments) -> list[Evaluated]:
    """Every network on every set."""
    models = open_models(arguments.models, batch_size=arguments.batch_size)
    configs = [checkpoint.read_config(run) for run in arguments.models.checkpoint] or [Config()]
    sets = open_for_runs(configs, arguments.targets)
    if not sets:
        raise errors.UserError(
            "nothing to evaluate on: name verification sets with --targets a.bin b.bin"
        )
    return [
        Evaluated(name, one, verification.verify(model, one, model=name if len(models) > 1 else ""))
        for one in sets
        for name, model in models.items()
    ]


def main(argv: list[str]) -> None:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="evaluate.py", description=__doc__)
    begin = time.perf_counter()
    with errors.reported():
        evaluated = evaluate(arguments)
        page = arguments.report and document.write(arguments.report, evaluated, made=datetime.now())
    results = [one.result for one in evaluated]
    # Where nobody watches, rich takes 80 columns; the tables want up to 100.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(*tables.summary(results), *tables.remarks(results), sep="\n")
    metrics = {name: value for result in results for name, value in result.metrics().items()}
    seconds = round(time.perf_counter() - begin, 1)
    files = [str(page)] if page else []
    print("RESULT " + json.dumps({**metrics, "seconds": seconds, "files": files}))


if __name__ == "__main__":
    main(sys.argv[1:])
