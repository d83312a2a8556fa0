"""Pages about a training set: the findings of `data inspect`, and the faces of `data align`."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from arcface_jax.data import faces
from arcface_jax.data.source import Source, account
from arcface_jax.data.tools import inspection, pictures
from arcface_jax.data.tools.inspection import Report
from arcface_jax.errors import DataError, ImageError
from arcface_jax.evaluation import page
from arcface_jax.evaluation.report import charts
from arcface_jax.evaluation.report.charts import Series

INSPECTED, ALIGNED = "index.html", "align.html"
_GROUPS, _MEMBERS = 24, 4  # groups of copies on a page, images per group
_LISTED = 200  # lines of a table
_REJECTS = 24  # rejected photographs to show
_EXTREMES = 8  # faces at the extreme of a measure
# Measures in faces.csv: their meaning, and the end at which faces are doubtful.
_MEASURES = {
    "score": ("score of the detector", "lowest"),
    "size": ("side of the crop in pixels of the photograph", "lowest"),
    "blur": ("blur, 0 is sharp", "highest"),
    "yaw": ("yaw in degrees", "farthest from 0"),
    "pitch": ("pitch in degrees", "farthest from 0"),
    "roll": ("roll in degrees", "farthest from 0"),
}


def inspected(
    folder: Path, report: Report, source: Source, *, name: str, made: datetime, seed: int = 0
) -> Path:
    """Writes FOLDER/index.html: counts, the histogram, samples, bad images and copies.

    Args:
      folder: created if missing.
      report: report of the set.
      source: the set.
      name: name of the set, as its title.
      made: date shown on the page.
      seed: random seed of the samples.

    Returns:
      The page.

    Raises:
      UserError: the folder cannot be written.
    """

    def groups(numbers: Sequence[Sequence[int]]) -> list[list[dict[str, str]]]:
        return [
            [_stored(source, number) for number in group[:_MEMBERS]] for group in numbers[:_GROUPS]
        ]

    rows = [
        {
            "name": _name(source, row.identity),
            "images": [_stored(source, number) for number in row.numbers],
        }
        for row in pictures.sample(source, seed=seed)
    ]
    path = folder / INSPECTED
    page.write(
        path,
        "report/inspect.html",
        name=name,
        made=made.strftime("%Y-%m-%d %H:%M"),
        account=account(source, unreadable=report.unreadable_kinds),
        title=pictures.title(report.per_identity),
        facts=_facts(report),
        warnings=[_with_code(text) for text in inspection.warnings(report)],
        chart=_images_per_identity(report.per_identity),
        rows=rows,
        unreadable=report.unreadable[:_LISTED],
        all_unreadable=len(report.unreadable),
        kinds=report.unreadable_kinds.most_common(),
        duplicates=groups(report.duplicate_numbers),
        all_duplicates=len(report.duplicates),
        conflicts=groups(report.conflict_numbers),
        all_conflicts=len(report.conflicts),
    )
    return path


def aligned(
    folder: Path,
    photographs: Path,
    rows: Sequence[Mapping[str, str]],
    rejected: Mapping[str, str],
    *,
    made: datetime,
) -> Path:
    """Writes FOLDER/align.html: the aligned faces, and the photographs without one.

    Args:
      folder: folder of the faces.
      photographs: the folder that they come from.
      rows: a row of faces.csv for each face: `face` is its file below the folder, `path` the
        photograph; the measures are plotted.
      rejected: reason for each rejected photograph, by path.
      made: date shown on the page.

    Returns:
      The page.

    Raises:
      UserError: the folder cannot be written.
    """
    people = Counter(row["face"].rpartition("/")[0] for row in rows)
    path = folder / ALIGNED
    page.write(
        path,
        "report/align.html",
        name=photographs.name,
        made=made.strftime("%Y-%m-%d %H:%M"),
        written=len(rows),
        people=len(people) if any(people) else 0,
        chart=_images_per_identity(np.array(list(people.values()), np.int64)),
        rows=_samples(folder, [row["face"] for row in rows]),
        measures=_measures(folder, rows),
        reasons=Counter(_general(reason) for reason in rejected.values()).most_common(),
        rejects=[
            _from_file(photographs / name, f"{name}: {reason}")
            for name, reason in list(rejected.items())[:_REJECTS]
        ],
        listed=list(rejected.items())[:_LISTED],
        rejected=len(rejected),
    )
    return path


def _facts(report: Report) -> list[tuple[str, str]]:
    sizes = ", ".join(f"{w} x {h}: {n:,}" for (w, h), n in report.sizes.most_common(4))
    summary = report.summary()
    return [
        ("identities", f"{report.identities:,}"),
        ("images", f"{report.images:,}"),
        ("images of an identity, mean", f"{summary['images_per_identity_mean']:g}"),
        ("median", f"{summary['images_per_identity_median']:g}"),
        ("identities with one image", f"{summary['identities_with_one_image']:,}"),
        ("looked at", f"{report.looked_at:,} ({report.bytes_stored / 2**20:,.1f} MiB)"),
        ("sizes", sizes or "none"),
        ("gray", f"{report.gray:,}"),
        ("unreadable", f"{len(report.unreadable):,}"),
        ("copies within an identity", f"{summary['duplicates']:,}"),
        ("images under several identities", f"{summary['label_conflicts']:,}"),
    ]


def _images_per_identity(counts: np.ndarray) -> Markup:
    found = pictures.bins(counts)
    heights = [one.identities for one in found]
    return charts.bars(
        [one.label for one in found],
        heights,
        x_label="images of an identity",
        y_label="identities",
        alt=f"Identities by their number of images; {pictures.title(counts)}",
        log=pictures.needs_log(heights),
    )


def _name(source: Source, identity: int) -> str:
    return str(identity) if source.names is None else source.names[identity]


def _stored(source: Source, number: int) -> dict[str, str]:
    where = source.where(number)
    try:
        image = page.picture(pictures.thumbnail(source, number))
    except ImageError:
        image = ""
    return {
        "image": image,
        "name": _name(source, int(source.labels()[number])),
        "alt": where,
        "file": re.split(r"[\\/]", where)[-1],
    }


def _from_file(path: Path, alt: str) -> dict[str, str]:
    try:
        image = page.picture(pictures.fitted(faces.read(path)))
    except DataError:
        image = ""
    return {"image": image, "alt": alt, "file": path.name}


def _samples(folder: Path, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Samples eight folders spread over all, with up to eight faces of each."""
    by_name: dict[str, list[str]] = {}
    for path in paths:
        by_name.setdefault(path.rpartition("/")[0], []).append(path)
    names = sorted(by_name)
    chosen = np.unique(np.linspace(0, len(names) - 1, 8).astype(int)).tolist() if names else []
    return [
        {
            "name": names[i],
            "images": [_from_file(folder / path, path) for path in by_name[names[i]][:8]],
        }
        for i in chosen
    ]


def _measures(folder: Path, rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Describes each measure: its histogram, and the faces at its doubtful end."""
    found = []
    for column, (label, end) in _MEASURES.items():
        values = _numbers([row.get(column, "") for row in rows])
        if values is None or np.ptp(values) == 0:
            continue
        low, high = float(values.min()), float(values.max())
        chart = charts.histogram(
            [Series(values, 0)],
            x_label=label,
            alt=f"{label}: from {low:.3g} to {high:.3g}",
        )
        rank = {"lowest": values, "highest": -values, "farthest from 0": -np.abs(values)}[end]
        order = np.argsort(rank, kind="stable")[:_EXTREMES].tolist()
        faces_there = [
            _from_file(folder / rows[i]["face"], rows[i]["face"]) | {"value": f"{values[i]:.3g}"}
            for i in order
        ]
        found.append({"name": column, "end": end, "chart": chart, "faces": faces_there})
    return found


def _numbers(cells: Sequence[str]) -> np.ndarray | None:
    """Returns (n,) float64; None if there are no cells, or one is not a finite number."""
    try:
        values = np.array(cells, np.float64)
    except ValueError:
        return None
    return values if values.size and np.isfinite(values).all() else None


def _with_code(text: str) -> Markup:
    """Marks commands between backquotes as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _general(reason: str) -> str:
    """Removes the numbers from a reason, so that similar ones are counted together."""
    return re.sub(r"\d+(\.\d+)?", "N", reason)
