"""Generate a small data set in the file formats of IJB-B and IJB-C from any labeled faces.

The real images cannot be redistributed. These sets run the whole protocol and show the files that
it reads; their figures are not comparable with IJB.
"""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from arcface_jax.config.choices import IjbProtocol
from arcface_jax.data import faces
from arcface_jax.data.images import encode_jpeg
from arcface_jax.data.source import Source
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation.protocols import ijb_files

_LARGEST = 8
"""Most images of a person to use."""
_FEWEST = 3
"""A gallery template and two probe templates with one image each."""
_FEWEST_SUBJECTS = 2
"""A person in each gallery, or one would be empty."""


class _Image(NamedTuple):
    """A line of the lists of images."""

    source: int
    """The image's number in the source."""
    template: int
    medium: int


class _Template(NamedTuple):
    number: int
    subject: int
    gallery: int | None
    """Number of the gallery, 0 or 1; None for a probe."""


def generate(
    source: Source,
    folder: Path,
    *,
    protocol: IjbProtocol = "ijbc",
    subjects: int = 40,
    pairs: int = 10_000,
    seed: int = 0,
) -> None:
    """Writes FOLDER/meta and FOLDER/loose_crop.

    Each person has a gallery template, in one of the two galleries, and two probe templates. A
    template's images are single photos and frames of videos. Faces are rotated, scaled and shifted
    in larger pictures, with the five points that undo it.

    Args:
      source: aligned faces with labels; people with three images or more are used.
      folder: created if missing; an existing meta/ is an error.
      protocol: prefix of the files' names.
      subjects: number of people, at least 2; the first ones with enough images.
      pairs: number of pairs of different people, at least 1; all pairs of one person are included.
      seed: random seed; determines the files.

    Raises:
      DataError: the source has too few people, or the folder already has a set.
      UserError: `subjects` or `pairs` is too small.
    """
    if subjects < _FEWEST_SUBJECTS:
        raise UserError(
            f"--subjects {subjects} must be at least {_FEWEST_SUBJECTS}: each of the two galleries "
            "needs a person"
        )
    if pairs < 1:
        raise UserError(f"--pairs {pairs} must be at least 1: FAR needs pairs of different people")
    meta = folder / ijb_files.META
    if meta.exists():
        raise DataError(f"{meta} exists already: name another folder, or delete this one")
    rng = np.random.default_rng([seed, subjects, pairs])
    people = _people(source, subjects)
    images, templates = _arrange(people, rng)
    loose = folder / ijb_files.IMAGES
    loose.mkdir(parents=True, exist_ok=True)
    points = [_write_crop(source, image, loose / _name(k), rng) for k, image in enumerate(images)]
    meta.mkdir()
    _write_lists(meta, protocol, images, points, rng)
    _write_pairs(meta / f"{protocol}_template_pair_label.txt", templates, pairs, rng)
    _write_csvs(meta, protocol, images, templates)


def _name(number: int) -> str:
    return f"{number + 1}.jpg"


def _people(source: Source, subjects: int) -> list[list[int]]:
    """Returns the image numbers of each person."""
    images: dict[int, list[int]] = defaultdict(list)
    full = 0
    for number in range(len(source)):
        label = source[number][1]
        if len(images[label]) < _LARGEST:
            images[label].append(number)
            full += len(images[label]) == _LARGEST
        if full == subjects:
            break
    people = [numbers for numbers in images.values() if len(numbers) >= _FEWEST]
    if len(people) < subjects:
        raise DataError(
            f"the source has {len(people)} people with {_FEWEST} images or more, and {subjects} "
            "are asked for: ask for fewer subjects, or name a larger source"
        )
    return people[:subjects]


def _arrange(
    people: list[list[int]], rng: np.random.Generator
) -> tuple[list[_Image], list[_Template]]:
    """Deals each person's images to a gallery template and two probe templates."""
    # As in the real sets, the numbers have gaps and are unordered.
    numbers = iter(rng.permutation(10 * len(people))[: 3 * len(people)] + 1)
    subject_numbers = rng.permutation(10 * len(people))[: len(people)] + 1
    images, templates = [], []
    medium = 0
    for place, owned in enumerate(people):
        # Templates with one image and with many.
        cuts = np.sort(rng.choice(np.arange(1, len(owned)), 2, replace=False))
        deal = np.split(rng.permutation(owned), cuts)
        for part, gallery in zip(deal, (place % 2, None, None), strict=True):
            template = _Template(int(next(numbers)), int(subject_numbers[place]), gallery)
            templates.append(template)
            for k, number in enumerate(part):
                # Every other image continues the video of the one before it.
                medium += 1 if k == 0 or rng.random() < 0.5 else 0
                images.append(_Image(int(number), template.number, medium))
    order = rng.permutation(len(images))
    return [images[k] for k in order], templates


def _write_crop(source: Source, image: _Image, path: Path, rng: np.random.Generator) -> np.ndarray:
    """Places a face in a larger picture; returns its five points, (5, 2) float64."""
    face, _ = source[image.source]
    side = int(rng.integers(190, 280))
    turn = rng.uniform(1.0, 1.5) * np.exp(1j * np.deg2rad(rng.uniform(-30, 30)))
    middle = complex(*(side / 2 + rng.uniform(-12, 12, 2)))
    shift = middle - turn * complex(*(length / 2 for length in face.shape[1::-1]))
    matrix = np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
    color = tuple(float(value) for value in face.mean(axis=(0, 1)))
    placed = cv2.warpAffine(face, matrix, (side, side), flags=cv2.INTER_CUBIC, borderValue=color)
    path.write_bytes(encode_jpeg(placed, quality=97))
    return faces.TEMPLATE @ matrix[:, :2].T + matrix[:, 2]


def _write_lists(
    meta: Path,
    protocol: IjbProtocol,
    images: list[_Image],
    points: list[np.ndarray],
    rng: np.random.Generator,
) -> None:
    with (
        (meta / f"{protocol}_name_5pts_score.txt").open("w") as five,
        (meta / f"{protocol}_face_tid_mid.txt").open("w") as tid_mid,
    ):
        for k, (image, five_points) in enumerate(zip(images, points, strict=True)):
            coordinates = " ".join(f"{value:.3f}" for value in five_points.ravel())
            five.write(f"{_name(k)} {coordinates} {rng.uniform(0.5, 1):.3f}\n")
            tid_mid.write(f"{_name(k)} {image.template} {image.medium}\n")


def _write_pairs(
    path: Path, templates: list[_Template], pairs: int, rng: np.random.Generator
) -> None:
    number = np.array([template.number for template in templates])
    subject = np.array([template.subject for template in templates])
    one, other = np.triu_indices(len(templates), 1)
    same = subject[one] == subject[other]
    different = np.flatnonzero(~same)
    chosen = rng.choice(different, min(pairs, len(different)), replace=False)
    rows = rng.permutation(np.concatenate([np.flatnonzero(same), chosen]))
    table = np.stack([number[one[rows]], number[other[rows]], same[rows]], axis=1)
    np.savetxt(path, table, fmt="%d")


def _write_csvs(
    meta: Path, protocol: IjbProtocol, images: list[_Image], templates: list[_Template]
) -> None:
    """Writes a line for each image, as in the real files."""
    names = [f"gallery_{name}" for name in ijb_files.GALLERIES[protocol]]
    for name, gallery in [*zip(names, (0, 1), strict=True), ("probe_mixed", None)]:
        chosen = {t.number: t.subject for t in templates if t.gallery == gallery}
        lines = [
            f"{image.template},{chosen[image.template]},{_name(k)}\n"
            for k, image in enumerate(images)
            if image.template in chosen
        ]
        heading = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"
        (meta / f"{protocol}_1N_{name}.csv").write_text(heading + "".join(lines))
