"""Verify networks on pairs of faces: accuracy, ROC, TAR@FAR; several networks side by side.

arcface-jax evaluate --workdir WORKDIR [WORKDIR ...] [--targets a.bin pairs.txt:FOLDER]
arcface-jax evaluate --weight backbone.pth --targets a.bin b.bin
arcface-jax evaluate --workdir WORKDIR --onnx model.onnx --targets a.bin --report FOLDER
arcface-jax evaluate --workdir WORKDIR --targets pairs.txt:PHOTOGRAPHS --detector yunet.onnx
arcface-jax evaluate --workdir WORKDIR --targets a.bin --leave-out runs/overlap/overlap.csv
arcface-jax evaluate --onnx other.onnx --targets a.bin --check-input
arcface-jax evaluate --workdir WORKDIR --targets a.bin --against TEACHER
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes

from arcface_jax import errors
from arcface_jax.commands import Result, command, console, own_options
from arcface_jax.config import Config, command_line
from arcface_jax.config.choices import AlignOptions
from arcface_jax.inference.open_model import ModelChoices, open_models, open_path

if TYPE_CHECKING:
    import numpy as np

    from arcface_jax.data.pairs.bins import PairSet
    from arcface_jax.evaluation.embed import Embed, Model
    from arcface_jax.evaluation.report.document import Evaluated


@dataclass(frozen=True)
class Arguments:
    """Options of `evaluate`."""

    models: OmitArgPrefixes[ModelChoices]
    targets: tuple[str, ...] = ()
    """Verification sets: .bin files, or LIST:FOLDER; by default the targets of the runs."""
    align: OmitArgPrefixes[AlignOptions] = field(default_factory=AlignOptions)
    batch_size: int = 256
    """Images per forward pass, over all devices."""
    report: Path | None = None
    """Folder for a page of tables, plots and the hardest pairs (index.html)."""
    leave_out: Path | None = None
    """overlap.csv of `data overlap`: print each set also without the pairs that it flags."""
    against: Path | None = None
    """The model of an existing gallery, such as the teacher of --distill.compatible: verify it too,
    and each network's embeddings (second face of a pair) against its own (first face)."""
    check_input: bool = False
    """Verify with both color orders, ONNX files with three normalizations, and name the best."""


def _open(arguments: Arguments) -> "tuple[dict[str, Model], list[PairSet]]":
    """Opens the networks and the sets."""
    from arcface_jax.data import aligner
    from arcface_jax.data.pairs.opening import open_for_runs
    from arcface_jax.training import checkpoint

    how = arguments.align
    if how.detector is not None:
        print(aligner.in_words(how.choose))
    models = open_models(arguments.models, batch_size=arguments.batch_size)
    configs = [checkpoint.read_config(path) for path in arguments.models.workdir] or [Config()]
    with own_options({"evaluation.targets": "--targets"}):
        sets = open_for_runs(configs, arguments.targets, aligner=aligner.of_options(how))
    if not sets:
        raise errors.UserError(
            "nothing to evaluate on: name verification sets with --targets a.bin b.bin"
        )
    if arguments.leave_out is not None:
        sets = _without_overlap(sets, arguments.leave_out)
    return models, sets


def _without_overlap(sets: "Sequence[PairSet]", path: Path) -> "list[PairSet]":
    """Returns each set and, if overlap.csv flags some of its pairs, the set without them."""
    from arcface_jax.cleaning import leaks

    flagged = leaks.left_out(path, {pairs.name: len(pairs.images) for pairs in sets})
    return [x for one in sets for x in (one, *_without(one, flagged[one.name], path))]


def _without(pairs: "PairSet", flagged: "np.ndarray", path: Path) -> "list[PairSet]":
    """Returns the set without pairs of flagged images; empty if there is none."""
    import numpy as np

    kept = np.setdiff1d(np.arange(len(pairs.same)), flagged // 2)
    dropped = len(pairs.same) - len(kept)
    print(f"{pairs.name}: {dropped:,} of {len(pairs.same):,} pairs are flagged in {path}")
    if not dropped:
        return []
    images = pairs.images[np.stack([2 * kept, 2 * kept + 1], axis=1).ravel()]
    name = f"{pairs.name}_without_overlap"
    return [pairs._replace(name=name, images=images, same=pairs.same[kept], listing=None)]


def evaluate(arguments: Arguments) -> "list[Evaluated]":
    """Verifies every network on every set."""
    from arcface_jax.evaluation import verification
    from arcface_jax.evaluation.report.document import Evaluated

    models, sets = _open(arguments)
    embeds: dict[str, Embed] = dict(models)
    if arguments.against is not None:
        embeds = _with_enrolled(models, arguments.against, batch_size=arguments.batch_size)
    for one in sets:
        print(one.account())
    return [
        Evaluated(name, one, verification.verify(embed, one, model=name if len(embeds) > 1 else ""))
        for one in sets
        for name, embed in embeds.items()
    ]


def _with_enrolled(
    models: "dict[str, Model]", path: Path, *, batch_size: int
) -> "dict[str, Embed]":
    """Returns the networks, each compared with the enrolled one, and the enrolled one itself."""
    from arcface_jax.evaluation import verification

    enrolled = open_path(path, batch_size=batch_size)
    own = path.resolve().name if path.is_dir() else path.stem
    own = f"{own}-enrolled" if own in models else own
    embeds: dict[str, Embed] = {}
    for name, model in models.items():
        embeds[name] = model
        embeds[f"{name}-against-{own}"] = verification.across(model, enrolled=enrolled)
    return embeds | {own: enrolled}


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax evaluate") -> Result:
    """Prints the tables, and writes the report if requested."""
    arguments = command_line.parse(
        Arguments, words, prog=prog, description=__doc__ or "", options_only=True
    )
    if arguments.check_input:
        return _check_input(arguments)
    from arcface_jax.evaluation.report import document, tables

    if arguments.report is not None:
        arguments.report.mkdir(parents=True, exist_ok=True)
    evaluated = evaluate(arguments)
    results = [one.result for one in evaluated]
    words = [*tables.forms(results), *tables.remarks(results)]
    console().print(*tables.summary(results), *words, sep="\n")
    page = arguments.report and document.write(arguments.report, evaluated, made=datetime.now())
    metrics: dict[str, float] = {}
    for result in results:
        metrics |= result.metrics()
        metrics[f"{result.prefix}/threshold_cosine_single"] = result.single_threshold_cosine
    for one in evaluated:
        metrics |= one.pairs.counts()
    return Result(metrics, [page] if page else [])


def _check_input(arguments: Arguments) -> Result:
    """Prints the accuracy of each way to prepare the input, and the best one for each model."""
    from rich.table import Table

    from arcface_jax.inference import input_check

    for option, value in (("--report", arguments.report), ("--against", arguments.against)):
        if value is not None:
            raise errors.UserError(
                f"{option} {value} does not go with --check-input, which only prints a table: "
                "leave one of them out"
            )
    models, sets = _open(arguments)
    values: dict[str, object] = {}
    for name, model in models.items():
        tried = input_check.run(model, sets)
        best = input_check.best(tried)
        table = Table("set", "input", "accuracy (95 %)", title=name)
        for one in tried:
            low, high = one.interval
            marks = " (used)" * one.is_used
            measured = f"{one.accuracy:.4f} ({low:.4f}-{high:.4f})"
            if one.failed:
                measured = "failed: embeddings are not finite"
            table.add_row(one.set_name, one.form + marks, measured)
            accuracy = None if one.failed else one.accuracy
            values[f"check_input/{name}/{one.set_name}/{one.form}"] = accuracy
        certain = input_check.is_certain(tried)
        values[f"check_input/{name}/wants"] = best.form
        values[f"check_input/{name}/certain"] = certain
        console().print(table)
        fix = (
            f"--color-order {best.color_order} --mean {best.mean:g} --scale {best.scale:g}"
            if hasattr(model, "taking")
            else "open or import its weights with the other --color-order"
        )
        verdict = "as it is run" if best.is_used else f"not as it is run: {fix}"
        doubt = "" if certain else "; these pairs are too few to tell it from the next best"
        console().print(f"{name} wants {best.form}, {verdict}{doubt}")
    return Result(values)
