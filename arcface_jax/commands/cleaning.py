"""`data clean`, `data overlap` and `data apply`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from arcface_jax.commands import own_options
from arcface_jax.commands.training_sets import (
    AS_FOUND,
    How,
    Output,
    TrainingSet,
    Values,
    open_set,
)
from arcface_jax.config.choices import Bad, OnnxOptions, Which
from arcface_jax.config.command_line import Count
from arcface_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from arcface_jax.cleaning.apply import Applied
    from arcface_jax.cleaning.pipeline import Findings
    from arcface_jax.data.source import Source
    from arcface_jax.evaluation.embed import Model

ModelFile = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN_OR_MODEL")]
Level = Literal["images", "centers"]
_OF_ITSELF = OnnxOptions()  # as the ONNX file states


class _Opening(NamedTuple):
    """Arguments to open a model."""

    path: Path
    network: str | None
    step: Which
    onnx_options: OnnxOptions
    batch_size: int

    def open(self) -> "Model":
        """Opens the model."""
        from arcface_jax.inference.open_model import open_path

        return open_path(
            self.path,
            network=self.network,
            step=self.step,
            onnx_options=self.onnx_options,
            batch_size=self.batch_size,
        )


def clean(
    model: ModelFile,
    data: str,
    output: Path = Path("runs/clean"),
    level: Level = "images",
    find: tuple[Literal["duplicates", "mixed", "outliers"], ...] = (
        *("duplicates", "mixed", "outliers"),
    ),
    network: str | None = None,
    step: Which = "latest",
    onnx_options: OmitArgPrefixes[OnnxOptions] = _OF_ITSELF,
    batch_size: int = 64,
    seed: Count = 0,
    reading: How = AS_FOUND,
) -> Values:
    """Finds people under two labels, labels with two people, and images under a wrong label.

    Args:
      model: A run's workdir, a hub folder, PyTorch weights or an ONNX file.
      data: A training set, as in --data.path of `train`.
      output: Folder for the embeddings, duplicates.csv, mixed.csv, images.csv, clean.json, and
        report.html to review them on; rerun the same command to resume.
      level: Embed all images; or search duplicates among the class centers of a run, and embed 5
        images of each candidate.
      find: What to search for; among class centers only duplicates.
      network: The network of PyTorch weights; by default detected by names and shapes.
      step: The checkpoint of a run to use.
      onnx_options: Properties of an ONNX file that it does not state.
      batch_size: Images per forward pass, over all devices.
      seed: Random seed of the split halves of identities.
      reading: Properties of the set that its files do not state.
    """
    from arcface_jax.cleaning import pipeline, review

    if level == "centers" and "duplicates" not in find:
        raise UserError(
            f"--find {' '.join(find)} needs the embeddings of all images, and --level centers "
            "searches only for duplicates: use --level images"
        )
    opening = _Opening(model, network, step, onnx_options, batch_size)
    with own_options({"data.path": "--data"}):
        source = open_set(data, reading, output=output)
    if level == "images":
        options = {"kinds": find, "seed": seed}
        findings, files = pipeline.by_images(opening.open(), source, output, **options)
    else:
        centers, number = _centers(model, step, source)
        opened = opening._replace(step=number).open()
        findings, files = pipeline.by_centers(opened, centers, source, output, seed=seed)
    print(*_lines(findings), sep="\n")
    print(f"review them on {output / review.PAGE}")
    return {**_values(findings), "files": files}


def overlap(
    first: Annotated[Positional[str], tyro.conf.arg(metavar="A")],
    second: Annotated[Positional[str], tyro.conf.arg(metavar="B")],
    model: Path,
    output: Path = Path("runs/overlap"),
    network: str | None = None,
    step: Which = "latest",
    onnx_options: OmitArgPrefixes[OnnxOptions] = _OF_ITSELF,
    batch_size: int = 64,
    seed: Count = 0,
    reading: How = AS_FOUND,
) -> Values:
    """Finds people of a training set in another set, and photographs that are in both.

    Args:
      first: A training set, as in --data.path of `train`.
      second: Another training set, a .bin file, or a list of pairs: LIST:FOLDER.
      model: A run's workdir, a hub folder, PyTorch weights or an ONNX file.
      output: Folder for the embeddings and overlap.csv; for two training sets also merge.csv.
      network: The network of PyTorch weights; by default detected by names and shapes.
      step: The checkpoint of a run to use.
      onnx_options: Properties of an ONNX file that it does not state.
      batch_size: Images per forward pass, over all devices.
      seed: Random seed of the split halves of identities.
      reading: Properties of the sets that their files do not state.
    """
    from arcface_jax.cleaning import leaks
    from arcface_jax.data.pairs import lists

    opening = _Opening(model, network, step, onnx_options, batch_size)
    with own_options({"data.path": "A"}):
        training_set = open_set(first, reading, output=output)
    if second.endswith(".bin") or (":" in second and lists.split(second)):
        with own_options({"evaluation.targets": "B"}):
            found = leaks.in_pairs(opening.open(), training_set, second, output, seed=seed)
    else:
        with own_options({"data.path": "B"}):
            other = open_set(second, reading, output=output)
        found = leaks.in_set(opening.open(), training_set, other, output, seed=seed)
    print(
        f"{found.images:,} images of {found.people:,} people of the training set, "
        f"{found.photos:,} of them the same photograph; " + found.threshold.text()
    )
    if found.weak:
        print("warning: the model is too weak for this set, so these findings are unreliable")
    return {
        "images": found.images,
        "people": found.people,
        "same_photo": found.photos,
        "weak": found.weak,
        "files": found.files,
    }


def apply(
    path: TrainingSet,
    findings: Annotated[Positional[Path], tyro.conf.arg(metavar="FINDINGS")],
    output: Output,
    merge: bool = False,
    drop: bool = False,
    relabel: bool = False,
    force: bool = False,
    bad: Bad = "stop",
    threads: Count = 0,
    reading: How = AS_FOUND,
) -> Values:
    """Writes a copy of a training set with the decisions of `clean` applied.

    Args:
      path: The training set that was cleaned.
      findings: Output of `clean`, with the column `decision` reviewed.
      output: New folder for a record file; or a new list (.csv) for sets of image files.
      merge: Apply the decisions to merge identities.
      drop: Apply the decisions to drop images and identities.
      relabel: Apply the decisions to relabel images.
      force: Apply findings even if the model is too weak for the set.
      bad: What to do with an image that cannot be read or is not 112 x 112.
      threads: 0 for one per processor.
      reading: Properties of the set that its files do not state.
    """
    from arcface_jax.cleaning import apply as applying

    actions = applying.Actions(merge, drop, relabel)
    options = {"actions": actions, "force": force, "bad": bad, "threads": threads}
    done = applying.apply(open_set(path, reading, output=output), findings, output, **options)
    return _report(done, output)


def _centers(path: Path, which: Which, source: "Source") -> "tuple[np.ndarray, int]":
    """Reads the (C, D) class centers of a checkpoint, and returns its step too."""
    from arcface_jax.training import saved_runs

    config, number, _ = saved_runs.restore_dataset(path, which)
    centers, _ = saved_runs.restore_centers(path, number)
    subcenters = config.head.subcenters
    if len(centers) != source.num_classes * subcenters:
        raise UserError(
            f"{path} has centers of {len(centers) // subcenters:,} classes, and the training set "
            f"has {source.num_classes:,}: name the set of that run ({config.data.path})"
        )
    return centers.reshape(source.num_classes, subcenters, -1).mean(axis=1), number


def _lines(found: "Findings") -> list[str]:
    lines = []
    if (same := found.duplicates) is not None:
        merge = int(same.merge.sum())
        lines.append(
            f"duplicates: {merge:,} pairs to merge, {len(same.merge) - merge:,} to review; "
            + same.threshold.text()
        )
    if (two := found.mixed) is not None:
        lines.append(
            f"mixed identities: {int(two.mixed.sum()):,} of {len(two.mixed):,} listed; "
            + two.threshold.text()
        )
    if (wrong := found.outliers) is not None:
        proposed = int((wrong.suggested >= 0).sum())
        lines.append(
            f"wrong labels: {int(wrong.wrong.sum()):,} of {len(wrong.image):,} listed, "
            f"{proposed:,} with a proposed label; " + wrong.threshold.text()
        )
    rate = "unknown" if found.rank_one is None else f"{found.rank_one:.3f}"
    lines.append(f"separation: {rate} of half identities are nearest to their other half")
    if found.weak:
        lines.append(
            "warning: the model is too weak for this set, so these findings are unreliable and "
            "`data apply` needs --force; use a stronger model"
        )
    return lines


def _values(found: "Findings") -> Values:
    values: Values = {"rank_one": found.rank_one, "weak": found.weak}
    named = {
        "duplicates": found.duplicates and (found.duplicates.merge, found.duplicates.threshold),
        "mixed": found.mixed and (found.mixed.mixed, found.mixed.threshold),
        "outliers": found.outliers and (found.outliers.wrong, found.outliers.threshold),
    }
    for name, one in named.items():
        if one is not None:
            flags, threshold = one
            values[name] = int(flags.sum())
            values[f"{name}/listed"] = len(flags)
            values[f"{name}/expected_recall"] = threshold.recall
            values[f"{name}/expected_precision"] = threshold.precision
    return values


def _report(done: "Applied", output: Path) -> Values:
    """Prints and returns the changes made by `data apply`."""
    for text in done.skipped:
        print(f"left out: {text}")
    print(
        f"{output}: {done.images:,} images of {done.identities:,} identities; "
        f"{done.merged:,} identities merged into others, {done.dropped:,} images dropped, "
        f"{done.relabeled:,} relabeled"
    )
    if done.undecided:
        print(f"{done.undecided:,} findings are undecided (decision review) and were not applied")
    return {
        "images": done.images,
        "identities": done.identities,
        "merged": done.merged,
        "dropped": done.dropped,
        "relabeled": done.relabeled,
        "undecided": done.undecided,
        "skipped": len(done.skipped),
        "files": done.files,
    }
