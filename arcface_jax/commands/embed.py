"""Embed images, or compare two of them.

Three command lines share this module: `arcface-jax embed`, `arcface-jax verify`, and a checkout's
`scripts/inference.py`, which has the options of both.
"""

import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from arcface_jax.commands import Result, command, refuse_changed
from arcface_jax.config import command_line
from arcface_jax.config.choices import AlignOptions
from arcface_jax.errors import DataError, UserError
from arcface_jax.inference.open_model import ModelChoice, open_model

if TYPE_CHECKING:
    import numpy as np

    from arcface_jax.evaluation.calibration import Calibration
    from arcface_jax.inference.embedder import Embedder

_EMBED = """Embed an image, or a folder of images.

    arcface-jax embed --workdir WORKDIR --img face.jpg --output face.npy
    arcface-jax embed --weight backbone.pth --img FOLDER --output FOLDER
"""
_VERIFY = """Compare two images: their cosine and, given a threshold, whether they show one person.

    arcface-jax verify a.jpg b.jpg --workdir WORKDIR --threshold 0.3
    arcface-jax verify a.jpg b.jpg --onnx model.onnx --calibration c.json
"""
_INFERENCE = """Embed faces, or compare two images.

    python scripts/inference.py --workdir WORKDIR --img face.jpg
    python scripts/inference.py --weight backbone.pth --img FOLDER --output FOLDER
    python scripts/inference.py --onnx model.onnx --verify a.jpg b.jpg --calibration c.json
"""
_SHOWN = 10
_VERDICTS = {
    "same": "the same person",
    "check": "to be checked by a person",
    "other": "different people",
}


@dataclass(frozen=True)
class Images:
    """Images to embed, and how."""

    img: Path | None = None
    """An image, or a folder of them; by default seeded noise."""
    output: Path | None = None
    """Output for the embeddings: a .npy file for an image, a folder of shards for a folder."""
    points: tuple[str, ...] = ()
    """Five points to align by: ten numbers x1 y1 ... x5 y5, or a file of
    lines `image x1 y1 ... x5 y5`."""
    align: OmitArgPrefixes[AlignOptions] = field(default_factory=AlignOptions)
    normalized: bool = False
    """Scale embeddings to length 1; by default they keep the network's length."""
    flip: bool = False
    """Add the embeddings of the flipped faces."""
    shard_size: int = 10_000
    """Images per shard of a folder."""
    batch_size: int = 64
    """Images per forward pass."""


@dataclass(frozen=True)
class Decision:
    """When two images count as one person."""

    threshold: float | None = None
    """Lowest cosine of one person."""
    calibration: Path | None = None
    """Or the JSON file of `calibrate`, for this model."""


@dataclass(frozen=True)
class EmbedArguments:
    """Options of `embed`."""

    model: OmitArgPrefixes[ModelChoice]
    images: OmitArgPrefixes[Images]


@dataclass(frozen=True)
class VerifyArguments:
    """Options of `verify`."""

    first: Annotated[Positional[Path], tyro.conf.arg(metavar="FIRST")]
    """An image."""
    second: Annotated[Positional[Path], tyro.conf.arg(metavar="SECOND")]
    """The image to compare it with."""
    model: OmitArgPrefixes[ModelChoice]
    decision: OmitArgPrefixes[Decision]
    points: tuple[str, ...] = ()
    """Five points to align by: a file of lines `image x1 y1 ... x5 y5`."""
    align: OmitArgPrefixes[AlignOptions] = field(default_factory=AlignOptions)
    flip: bool = False
    """Add the embeddings of the flipped faces; a calibration sets this itself."""


@dataclass(frozen=True)
class InferenceArguments:
    """Options of `scripts/inference.py`."""

    model: OmitArgPrefixes[ModelChoice]
    images: OmitArgPrefixes[Images]
    decision: OmitArgPrefixes[Decision]
    verify: tuple[Path, Path] | None = None
    """Two images to compare instead."""


@command
def embed(words: Sequence[str], *, prog: str = "arcface-jax embed") -> Result:
    """Prints or saves embeddings."""
    arguments = command_line.parse(
        EmbedArguments, words, prog=prog, description=_EMBED, options_only=True
    )
    return _embed(arguments.model, arguments.images)


@command
def verify(words: Sequence[str], *, prog: str = "arcface-jax verify") -> Result:
    """Prints the cosine of two images, and the verdict."""
    arguments = command_line.parse(VerifyArguments, words, prog=prog, description=_VERIFY)
    return _verify(
        arguments.model,
        (arguments.first, arguments.second),
        arguments.decision,
        arguments,
    )


@command
def inference(words: Sequence[str], *, prog: str = "inference.py") -> Result:
    """Embeds or compares images."""
    arguments = command_line.parse(
        InferenceArguments, words, prog=prog, description=_INFERENCE, options_only=True
    )
    images, decision = arguments.images, arguments.decision
    if arguments.verify is not None:
        refuse_changed(
            images,
            *("img", "output", "normalized", "shard_size", "batch_size"),
            because="does not go with --verify, which only compares two images: give one of the "
            "two",
        )
        return _verify(arguments.model, arguments.verify, decision, images)
    refuse_changed(
        decision,
        *("threshold", "calibration"),
        because="goes with --verify: name two images to compare, or leave the option out",
    )
    return _embed(arguments.model, images)


def _embed(choice: ModelChoice, images: Images) -> Result:
    folder = images.img if images.img is not None and images.img.is_dir() else None
    batch_size, devices = (1, 1) if folder is None else (images.batch_size, None)
    embedder = open_embedder(choice, images, batch_size=batch_size, devices=devices)
    how = {name: getattr(images, name) for name in ("points", "normalized", "output")}
    with notes():
        if folder is None:
            return embed_image(embedder, images.img, **how)
        return embed_folder(embedder, folder, shard_size=images.shard_size, **how)


def _verify(
    choice: ModelChoice,
    pair: tuple[Path, Path],
    decision: Decision,
    how: Images | VerifyArguments,
) -> Result:
    from arcface_jax.evaluation import calibration

    threshold, flip = decision.threshold, how.flip
    if decision.calibration is not None:
        if threshold is not None:
            raise UserError(
                f"--threshold {threshold:g} does not go with --calibration {decision.calibration}, "
                "which has a threshold: give one of the two"
            )
        threshold = calibration.read(decision.calibration)
        if flip and not threshold.flip:
            raise UserError(
                f"--flip does not go with --calibration {decision.calibration}, whose threshold is "
                "for single embeddings: omit --flip, or calibrate with it"
            )
        flip = threshold.flip
    how = dataclasses.replace(how, flip=flip)
    embedder = open_embedder(choice, how, batch_size=1, devices=1)
    with notes():
        return compare(embedder, pair, points=how.points, threshold=threshold)


class Alignment(Protocol):
    """Options of commands that align faces."""

    @property
    def align(self) -> AlignOptions: ...
    @property
    def flip(self) -> bool: ...


def open_embedder(
    choice: ModelChoice, how: Alignment, *, batch_size: int, devices: int | None
) -> "Embedder":
    """Opens the named network, for aligned faces and images that can be aligned.

    Args:
      choice: the network.
      how: the command's options.
      batch_size: images per forward pass.
      devices: as `open_model`.

    Raises:
      UserError: as `open_model`, or the detector does not exist.
    """
    from arcface_jax.data import aligner
    from arcface_jax.inference.embedder import Embedder

    model = open_model(choice, batch_size=batch_size, devices=devices)
    if how.align.detector is not None:
        print(aligner.in_words(how.align.choose), file=sys.stderr)
    return Embedder(
        model,
        flip=how.flip,
        detector=how.align.detector,
        choose=how.align.choose,
        detector_size=how.align.detector_size,
        batch_size=batch_size,
    )


@contextmanager
def notes() -> Iterator[None]:
    """Prints the library's warnings as notes, each once."""
    with warnings.catch_warnings():
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield


def embed_image(
    embedder: "Embedder",
    image: Path | None,
    *,
    points: Sequence[str],
    normalized: bool,
    output: Path | None,
) -> Result:
    """Prints the embedding of one image, or saves it as (1, D) .npy.

    Args:
      embedder: the network.
      image: the file; None for seeded noise, which is printed.
      points: as in `points_of`.
      normalized: as `Embedder.__call__`.
      output: the .npy file.

    Raises:
      UserError: the output is not a .npy file or cannot be written.
      DataError: as `Embedder.__call__`.
    """
    import numpy as np

    from arcface_jax.data.images import IMAGE_SIZE
    from arcface_jax.runtime.files import atomic

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
    values = {"shape": list(embedding.shape), "norm": norm}
    if output is None:
        with np.printoptions(threshold=sys.maxsize, linewidth=100, precision=6, suppress=True):
            print(embedding)
        return Result(values)
    try:
        with atomic(output, "wb") as file:
            np.save(file, embedding)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    print(f"{output}: {embedding.shape} float32, norm {norm:.4f}")
    return Result(values, [output])


def embed_folder(
    embedder: "Embedder",
    folder: Path,
    *,
    points: Sequence[str],
    normalized: bool,
    output: Path | None,
    shard_size: int,
) -> Result:
    """Embeds a folder into shards, or prints a line per image without an output folder.

    Args:
      embedder: the network.
      folder: the images.
      points: empty, or one file in a format of `point_files`.
      normalized: as `Embedder.__call__`.
      output: the folder of the shards.
      shard_size: images per shard.

    Raises:
      UserError: as `bulk.embed_folder`.
      DataError: as `bulk.embed_folder` and, without output, as `Embedder.__call__`.
    """
    from arcface_jax.data import faces, point_files
    from arcface_jax.inference import bulk

    if len(points) > 1:
        raise UserError("--points for a folder: name a file of lines `image x1 y1 ... x5 y5`")
    listed = point_files.one_by_name(Path(points[0])) if points else None
    if output is None:
        names = faces.find(folder)
        for name in names:
            five = None if listed is None else _listed(listed, [name], points[0])
            face = embedder.prepare(folder / name, five, in_identity_folder="/" in name)
            (row,) = embedder.embed_aligned(face[None], normalized=normalized)
            print(name, *(f"{value:.6f}" for value in row))
        return Result({"embedded": len(names)})
    summary = embedder.embed_folder(
        folder, output, shard_size=shard_size, points=listed, normalized=normalized
    )
    print(
        f"{output}: {summary.embedded:,} embeddings in {summary.shards} shards, "
        f"{summary.kept} of which already existed"
    )
    if summary.skipped:
        print(f"skipped {len(summary.skipped)} images:")
        for name, reason in list(summary.skipped.items())[:_SHOWN]:
            print(f"  {name}: {reason}")
        if len(summary.skipped) > _SHOWN:
            print("  ... (all of them: `skipped` in the ids-*.json)")
    values = {
        "embedded": summary.embedded,
        "skipped": len(summary.skipped),
        "shards": summary.shards,
        "kept": summary.kept,
    }
    return Result(values, bulk.shards(output))


def compare(
    embedder: "Embedder",
    pair: tuple[Path, Path],
    *,
    points: Sequence[str],
    threshold: "float | Calibration | None",
) -> Result:
    """Prints the cosine of two images and, by a threshold, whether they show one person.

    Args:
      embedder: the network.
      pair: the files.
      points: empty, or one file in a format of `point_files` with lines for both.
      threshold: as `Embedder.verify`; None to print only the cosine.

    Raises:
      UserError, DataError: as `Embedder.verify`.
    """
    from arcface_jax.evaluation.calibration import Calibration

    if len(points) > 1:
        raise UserError("--points for two images: name a file of lines `image x1 y1 ... x5 y5`")
    first, second = (embedder(path, points=points_of(points, path)) for path in pair)
    if threshold is None:
        cosine = float(embedder.similarity(first, second)[0, 0])
        print(f"cosine {cosine:.4f}; for a verdict give --threshold or --calibration")
        return Result({"cosine": cosine})
    verdict = embedder.verify(first, second, threshold=threshold)
    cosine, same = float(verdict.score[0]), bool(verdict.same[0])
    found = str(verdict.verdict[0])
    check = verdict.threshold_check
    from_check = "" if check is None else f", to check from {check:.4f}"
    print(f"{_VERDICTS[found]}: cosine {cosine:.4f}, threshold {verdict.threshold:.4f}{from_check}")
    if isinstance(threshold, Calibration):
        print(
            f"calibrated on {threshold.set_name}: FAR {threshold.far:.2e} "
            f"({threshold.far_low:.2e} to {threshold.far_high:.2e}), TAR {threshold.tar:.4f}"
        )
    values = {"cosine": cosine, "threshold": verdict.threshold, "same": same, "verdict": found}
    return Result(values if check is None else {**values, "threshold_check": check})


def points_of(words: Sequence[str], image: Path) -> "np.ndarray | None":
    """Parses the five points of one image from the words after --points.

    Args:
      words: ten numbers, or a file in a format of `point_files`, or none.
      image: the image, which the file lists by this path or only by its name.

    Raises:
      DataError: they are neither, or the file does not list the image.
    """
    from arcface_jax.data import point_files

    if len(words) != 1:
        return point_files.parse(words) if words else None
    return _listed(point_files.one_by_name(Path(words[0])), [str(image), image.name], words[0])


def _listed(points: "dict[str, np.ndarray]", names: Sequence[str], source: str) -> "np.ndarray":
    for name in names:
        if name in points:
            return points[name]
    raise DataError(f"{source} has no points for {names[0]}: add a line that begins with its name")
