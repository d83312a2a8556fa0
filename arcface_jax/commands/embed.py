"""What the inference command does with an image, a folder or a pair, printed in words.

Each function returns what the command's RESULT line says.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arcface_jax.data import faces, point_files
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation import calibration as calibrations
from arcface_jax.evaluation.calibration import Calibration
from arcface_jax.evaluation.embed import Model
from arcface_jax.inference import bulk
from arcface_jax.inference.embedder import Embedder

_SHOWN = 10


@dataclass(frozen=True)
class Request:
    """What the command takes beside the network."""

    img: Path | None = None
    """An image, or a folder of them; seeded noise when not given."""
    output: Path | None = None
    """Where embeddings are saved: a .npy file for an image, a folder of shards for a folder."""
    points: tuple[str, ...] = ()
    """To align by: ten numbers x1 y1 ... x5 y5, or a file of lines `image x1 y1 ... x5 y5`."""
    verify: tuple[Path, Path] | None = None
    """Two images to compare instead."""
    threshold: float | None = None
    """The lowest cosine that --verify calls the same."""
    calibration: Path | None = None
    """Or the JSON file of calibrate.py, for this model."""
    normalized: bool = False
    """Whether embeddings are of length 1; the network's own length when not."""
    flip: bool = False
    """Whether to add the embeddings of the mirrored faces."""
    shard_size: int = 10_000
    """Images per shard of a folder."""
    batch_size: int = 64
    """Images per forward pass."""


def run(request: Request, *, open_model: Callable[..., Model]) -> dict:
    """Does what was asked for and returns what RESULT says.

    Args:
      request: the options.
      open_model: opens the network, given `batch_size` and `devices`.

    Raises:
      UserError: options that exclude each other, or as the functions below.
    """
    threshold, flip = request.threshold, request.flip
    if request.calibration is not None:
        if threshold is not None or request.verify is None:
            raise UserError("--calibration goes with --verify, and without --threshold")
        threshold = calibrations.read(request.calibration)
        flip = threshold.flip
    one = request.verify is not None or not (request.img and request.img.is_dir())
    batch_size, devices = (1, 1) if one else (request.batch_size, None)
    model = open_model(batch_size=batch_size, devices=devices)
    embedder = Embedder(model, flip=flip, other_size="resize", batch_size=batch_size)
    if request.verify is not None:
        return verify(embedder, request.verify, points=request.points, threshold=threshold)
    how = {name: getattr(request, name) for name in ("points", "normalized", "output")}
    if one:
        return embed_image(embedder, request.img, **how)
    assert request.img is not None  # it is a folder
    return embed_folder(embedder, request.img, shard_size=request.shard_size, **how)


def embed_image(
    embedder: Embedder,
    image: Path | None,
    *,
    points: Sequence[str],
    normalized: bool,
    output: Path | None,
) -> dict:
    """Prints the embedding of one image, or saves it as (1, D) .npy.

    Args:
      embedder: the network.
      image: the file; None for seeded noise, and it says so.
      points: see `points_of`.
      normalized: as `Embedder.__call__`.
      output: the .npy file.

    Raises:
      UserError: the output is no .npy file or cannot be written.
      DataError: as `Embedder.__call__`.
    """
    if output is not None and output.suffix != ".npy":
        raise UserError(f"--output {output}: the embedding of one image is saved as a .npy file")
    if image is None:
        print("no --img was given: embedding a seeded noise image", file=sys.stderr)
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        embedding = embedder(noise, normalized=normalized)
    else:
        five = points_of(points, image)
        embedding = embedder(image, points=five, normalized=normalized)
    norm = float(np.linalg.norm(embedding))
    result = {"shape": list(embedding.shape), "norm": norm, "files": []}
    if output is None:
        with np.printoptions(threshold=sys.maxsize, linewidth=100, precision=6, suppress=True):
            print(embedding)
        return result
    try:
        np.save(output, embedding)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    print(f"{output}: {embedding.shape} float32, norm {norm:.4f}")
    return {**result, "files": [str(output)]}


def embed_folder(
    embedder: Embedder,
    folder: Path,
    *,
    points: Sequence[str],
    normalized: bool,
    output: Path | None,
    shard_size: int,
) -> dict:
    """Embeds a folder into shards, or prints a line per image where there is no output.

    Args:
      embedder: the network.
      folder: the images.
      points: empty, or one file as `point_files` reads it.
      normalized: as `Embedder.__call__`.
      output: the folder of the shards.
      shard_size: images per shard.

    Raises:
      UserError: as `bulk.embed_folder`.
      DataError: as `bulk.embed_folder` and, without output, as `Embedder.__call__`.
    """
    if len(points) > 1:
        raise UserError("--points for a folder: name a file of lines `image x1 y1 ... x5 y5`")
    listed = point_files.one_by_name(Path(points[0])) if points else None
    if output is None:
        names = faces.find(folder)
        for name in names:
            five = None if listed is None else _listed(listed, [name], points[0])
            (row,) = embedder(folder / name, points=five, normalized=normalized)
            print(name, *(f"{value:.6f}" for value in row))
        return {"embedded": len(names), "files": []}
    summary = embedder.embed_folder(
        folder, output, shard_size=shard_size, points=listed, normalized=normalized
    )
    print(
        f"{output}: {summary.embedded:,} embeddings in {summary.shards} shards, "
        f"{summary.kept} of which were there already"
    )
    if summary.skipped:
        print(f"skipped {len(summary.skipped)} images:")
        for name, reason in list(summary.skipped.items())[:_SHOWN]:
            print(f"  {name}: {reason}")
        if len(summary.skipped) > _SHOWN:
            print("  ... (all of them: `skipped` in the ids-*.json)")
    return {
        "embedded": summary.embedded,
        "skipped": len(summary.skipped),
        "shards": summary.shards,
        "kept": summary.kept,
        "files": [str(path) for path in bulk.shards(output)],
    }


def verify(
    embedder: Embedder,
    pair: tuple[Path, Path],
    *,
    points: Sequence[str],
    threshold: float | Calibration | None,
) -> dict:
    """Prints the cosine of two images and, by a threshold, whether they show one person.

    Args:
      embedder: the network.
      pair: the files.
      points: empty, or one file as `point_files` reads it with lines for both.
      threshold: as `Embedder.verify`; None to print the cosine alone.

    Raises:
      UserError, DataError: as `Embedder.verify`.
    """
    if len(points) > 1:
        raise UserError("--points for two images: name a file of lines `image x1 y1 ... x5 y5`")
    first, second = (embedder(path, points=points_of(points, path)) for path in pair)
    if threshold is None:
        cosine = float(embedder.similarity(first, second)[0, 0])
        print(f"cosine {cosine:.4f}; for a verdict give --threshold or --calibration")
        return {"cosine": cosine, "files": []}
    verdict = embedder.verify(first, second, threshold=threshold)
    cosine, same = float(verdict.score[0]), bool(verdict.same[0])
    words = "the same person" if same else "different people"
    print(f"{words}: cosine {cosine:.4f}, threshold {verdict.threshold:.4f}")
    if isinstance(threshold, Calibration):
        print(
            f"calibrated on {threshold.set_name}: FAR {threshold.far:.2e} "
            f"({threshold.far_low:.2e} to {threshold.far_high:.2e}), TAR {threshold.tar:.4f}"
        )
    return {"cosine": cosine, "threshold": verdict.threshold, "same": same, "files": []}


def points_of(words: Sequence[str], image: Path) -> np.ndarray | None:
    """The five points of one image, from the words behind --points.

    Args:
      words: ten numbers, or the name of a file as `point_files` reads it, or none.
      image: the image, which the file lists by this path or by its name alone.

    Raises:
      DataError: they are neither, or the file does not list the image.
    """
    if len(words) != 1:
        return point_files.parse(words) if words else None
    return _listed(point_files.one_by_name(Path(words[0])), [str(image), image.name], words[0])


def _listed(points: dict[str, np.ndarray], names: Sequence[str], source: str) -> np.ndarray:
    for name in names:
        if name in points:
            return points[name]
    raise DataError(f"{source} has no points for {names[0]}: add a line that begins with its name")
