"""What `data clean`, `overlap` and `apply` do with sets and models that are open."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from arcface_jax.config.choices import OnnxOptions, Which
from arcface_jax.errors import UserError

if TYPE_CHECKING:
    from arcface_jax.cleaning.apply import Applied
    from arcface_jax.cleaning.pipeline import Findings
    from arcface_jax.data.source import Source
    from arcface_jax.evaluation.embed import Model

Values = dict[str, Any]
Level = Literal["images", "centers"]


class Opening(NamedTuple):
    """What opens a model."""

    path: Path
    network: str | None
    step: Which
    onnx_options: OnnxOptions
    batch_size: int

    def open(self) -> "Model":
        """Opens it."""
        from arcface_jax.inference.open_model import open_path

        return open_path(
            self.path,
            network=self.network,
            step=self.step,
            onnx_options=self.onnx_options,
            batch_size=self.batch_size,
        )


def clean(
    model: Opening,
    source: "Source",
    output: Path,
    *,
    level: Level,
    kinds: Sequence[Literal["duplicates", "mixed", "outliers"]],
    seed: int,
) -> Values:
    """Looks for label errors, and prints what was found and what is expected of it."""
    from arcface_jax.cleaning import pipeline, review

    if level == "images":
        options = {"kinds": kinds, "seed": seed}
        findings, files = pipeline.by_images(model.open(), source, output, **options)
    else:
        centers = _centers(model.path, source)
        findings, files = pipeline.by_centers(model.open(), centers, source, output, seed=seed)
    print(*_lines(findings), sep="\n")
    print(f"review them on {output / review.PAGE}")
    return {**_values(findings), "files": files}


def _centers(path: Path, source: "Source"):
    from arcface_jax.training import saved_runs

    centers, _ = saved_runs.restore_centers(path)
    config, _, _ = saved_runs.restore_dataset(path)
    subcenters = config.head.subcenters
    if len(centers) != source.num_classes * subcenters:
        raise UserError(
            f"{path} has centers of {len(centers) // subcenters:,} classes, and the training set "
            f"has {source.num_classes:,}: name the set of that run ({config.data.path})"
        )
    return centers.reshape(source.num_classes, subcenters, -1).mean(axis=1)


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


def overlap(
    model: Opening, first: "Source", second: "Source | str", output: Path, *, seed: int
) -> Values:
    """Looks for people of a training set in another set; the second is a source or a pair set."""
    from arcface_jax.cleaning import leaks

    opened = model.open()
    if isinstance(second, str):
        found = leaks.in_pairs(opened, first, second, output, seed=seed)
    else:
        found = leaks.in_set(opened, first, second, output, seed=seed)
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


def report(done: "Applied", output: Path) -> Values:
    """Prints and returns what `data apply` did."""
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
