"""`data.py inspect`: summarize a training set, and find problems in it."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.data import colors
from arcface_jax.data.images import IMAGE_SIZE, decode_any_size
from arcface_jax.data.source import Source
from arcface_jax.data.tools import pictures, reading
from arcface_jax.errors import ImageError
from arcface_jax.runtime.files import write_atomic

_SHOWN = 10  # examples in the report
FEW = 10
"""Mean number of images per identity below which margin losses have little to learn from."""


class _Look(NamedTuple):
    size: tuple[int, int]
    digest: bytes
    label: int
    gray: bool
    lean: float
    """Color lean of an aligned face; NaN for other images."""


@dataclass
class Report:
    """Findings of `inspect`. Lists contain places, as `Source.where` names them."""

    identities: int
    images: int
    looked_at: int
    per_identity: np.ndarray
    """(identities,) number of images by label."""
    bad_labels: int
    """Number of images with an invalid label."""
    bytes_stored: int = 0
    """Bytes of the images that were read."""
    sizes: Counter = field(default_factory=Counter)
    """Number of images by (width, height)."""
    unreadable: list[str] = field(default_factory=list)
    """Error of each image that cannot be read."""
    unreadable_kinds: Counter[str] = field(default_factory=Counter)
    """Number of unreadable images by error."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Groups of images that are identical, byte for byte, under one label."""
    conflicts: list[list[str]] = field(default_factory=list)
    """Groups of identical images under several labels."""
    duplicate_numbers: list[list[int]] = field(default_factory=list)
    """Image numbers of `duplicates`."""
    conflict_numbers: list[list[int]] = field(default_factory=list)
    """Image numbers of `conflicts`."""
    gray: int = 0
    """Number of images whose three channels are equal."""
    is_bgr: bool = False
    """Whether the aligned faces seem to have red and blue exchanged."""

    def summary(self) -> dict[str, Any]:
        """Returns the keys of RESULT."""
        counts = self.per_identity
        present = counts[counts > 0]
        return {
            "identities": self.identities,
            "images": self.images,
            "looked_at": self.looked_at,
            "images_per_identity_mean": round(float(self.images / max(1, self.identities)), 2),
            "images_per_identity_median": float(np.median(present)) if present.size else 0.0,
            "identities_without_images": int(np.sum(counts == 0)),
            "identities_with_one_image": int(np.sum(counts == 1)),
            "unreadable": len(self.unreadable),
            "bad_labels": self.bad_labels,
            "other_sizes": sum(n for size, n in self.sizes.items() if size != (112, 112)),
            "duplicates": sum(len(group) - 1 for group in self.duplicates),
            "label_conflicts": len(self.conflicts),
            "gray": self.gray,
            "looks_bgr": self.is_bgr,
        }


def inspect(source: Source, *, most: int = 0, seed: int = 0, threads: int = 0) -> Report:
    """Reads every image once.

    Args:
      source: the training set.
      most: if not 0, read only this many images, chosen at random; all labels are counted.
      seed: random seed of this choice.
      threads: 0 for one per processor.
    """
    labels = source.labels()
    known = labels[labels >= 0]
    report = Report(
        identities=source.num_classes,
        images=len(source),
        looked_at=0,
        per_identity=np.bincount(known, minlength=source.num_classes),
        bad_labels=int(len(labels) - len(known)),
    )
    numbers = np.arange(len(source))
    if 0 < most < len(source):
        numbers = np.sort(np.random.default_rng(seed).permutation(len(source))[:most])

    def look(number: int) -> tuple[_Look, int]:
        data, label = source.read(number)
        image = decode_any_size(data, where=source.where(number))
        digest = hashlib.blake2b(data, digest_size=12).digest()
        return _look(image, digest, label), len(data)

    leans: list[float] = []
    same: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    with reading.in_order(numbers, look, what="looking", threads=threads) as results:
        for number, found in results:
            report.looked_at += 1
            if isinstance(found, ImageError):
                report.unreadable.append(str(found))
                report.unreadable_kinds[found.kind] += 1
                continue
            seen, stored = found
            report.sizes[seen.size] += 1
            report.bytes_stored += stored
            report.gray += seen.gray
            leans.append(seen.lean)
            same[seen.digest].append((number, seen.label))
    report.is_bgr = colors.lean_is_bgr(np.array(leans)[~np.isnan(leans)])
    _add_copies(report, source, same.values())
    return report


def _look(image: np.ndarray, digest: bytes, label: int) -> _Look:
    aligned = image.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE)
    lean = float(colors.color_lean(image[None])[0]) if aligned else math.nan
    size = (image.shape[1], image.shape[0])
    return _Look(size, digest, label, colors.is_gray(image), lean)


def _add_copies(
    report: Report, source: Source, groups: Iterable[Sequence[tuple[int, int]]]
) -> None:
    """Adds the groups of two or more equal images, each a (number, label)."""
    for group in groups:
        if len(group) > 1:
            numbers = [number for number, _ in group]
            places = [source.where(number) for number in numbers]
            if len({label for _, label in group}) == 1:
                report.duplicates.append(places)
                report.duplicate_numbers.append(numbers)
            else:
                report.conflicts.append(places)
                report.conflict_numbers.append(numbers)


def in_words(report: Report) -> list[str]:
    """Returns the report as lines of text, warnings last."""
    facts = report.summary()
    sizes = ", ".join(f"{w} x {h}: {n:,}" for (w, h), n in report.sizes.most_common(4))
    lines = [
        f"{report.images:,} images of {report.identities:,} identities, "
        f"{facts['images_per_identity_mean']} each on average, "
        f"{facts['images_per_identity_median']:g} median",
        f"read {report.looked_at:,} images, {report.bytes_stored / 2**20:,.1f} MiB; sizes {sizes}",
        *_histogram(report.per_identity),
    ]
    return lines + [f"warning: {text}" for text in warnings(report)]


def _histogram(counts: np.ndarray) -> list[str]:
    """Returns lines with the number of identities by number of images, in powers of two."""
    edges = [0, 1, 2]
    while edges[-1] <= counts.max(initial=0):
        edges.append(2 * edges[-1])
    identities, _ = np.histogram(counts, [*edges, np.inf])
    lines = ["images of an identity   identities"]
    for low, high, n in zip(edges, [*edges[1:], None], identities.tolist(), strict=True):
        if n:
            span = f"{low}" if high is None or high == low + 1 else f"{low} - {high - 1}"
            bar = "#" * max(1, round(40 * n / identities.max()))
            lines.append(f"{span:>20} {n:>12,}  {bar}")
    return lines


def warnings(report: Report) -> list[str]:
    """Lists the problems found, each with its count and a fix."""
    facts = report.summary()
    few = report.images / max(1, report.identities)
    found = [
        (
            few < FEW,
            f"{few:.2f} images an identity, fewer than {FEW}: a class center sees too little; "
            "merge sets, drop identities with few images (`arcface-jax data split --min-images`), "
            "or lower the margin and the scale",
        ),
        (
            facts["identities_with_one_image"],
            f"{facts['identities_with_one_image']:,} identities have a single image: they teach "
            "what others are not, and nothing of how one person varies",
        ),
        (
            facts["identities_without_images"],
            f"{facts['identities_without_images']:,} labels have no image: gaps only cost memory "
            "of the head; `arcface-jax data pack --renumber` closes them",
        ),
        (facts["bad_labels"], f"{facts['bad_labels']:,} images have an invalid label"),
        (
            report.unreadable,
            f"{len(report.unreadable):,} images cannot be read: " + _some(report.unreadable),
        ),
        (
            facts["other_sizes"],
            f"{facts['other_sizes']:,} images are not 112 x 112, so they are not aligned faces, "
            "and training skips or refuses them: align them with `arcface-jax data align`",
        ),
        (
            report.gray and 2 * report.gray > report.looked_at,
            f"{report.gray:,} of {report.looked_at:,} images are gray: a network trained on "
            f"them learns no color, and is best suited for gray cameras",
        ),
        (
            report.is_bgr,
            "the faces are bluer than red, as if they were stored as BGR: every image is read as "
            "RGB, so write them again with red and blue exchanged (cv2.imwrite takes BGR, "
            "cv2.cvtColor(image, cv2.COLOR_RGB2BGR))",
        ),
        (
            report.duplicates,
            f"{facts['duplicates']:,} images are copies within their identity: "
            + _some([" = ".join(group) for group in report.duplicates]),
        ),
        (
            report.conflicts,
            f"{len(report.conflicts):,} images are under several identities: "
            + _some([" = ".join(group) for group in report.conflicts]),
        ),
    ]
    return [text for wrong, text in found if wrong]


def _some(places: list[str]) -> str:
    more = f", and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    # A file's name may contain a line break.
    return "; ".join(places[:_SHOWN]).replace("\n", "\\n") + more


def write(report: Report, source: Source, folder: Path, *, seed: int = 0) -> list[Path]:
    """Writes the report as JSON, and the histogram and a sheet of samples as pictures.

    Returns:
      The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = report.summary() | {
        "sizes": {f"{w}x{h}": n for (w, h), n in report.sizes.most_common()},
        "unreadable": report.unreadable,
        "duplicates": report.duplicates,
        "label_conflicts": report.conflicts,
    }
    file = folder / "inspect.json"
    write_atomic(file, json.dumps(content, indent=1) + "\n")
    histogram = pictures.histogram(report.per_identity, folder / "images_per_identity.png")
    return [file, histogram, pictures.sheet(source, folder / "samples.png", seed=seed)]
