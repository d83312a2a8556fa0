"""Inspect and convert training sets, and measure the speed of the input pipeline.

arcface-jax data inspect FOLDER --output runs/inspect
arcface-jax data pack FOLDER runs/packed --renumber
arcface-jax data clean RUN_OR_MODEL --data FOLDER --output runs/clean
arcface-jax data COMMAND --help
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from arcface_jax.commands import Result, cleaning, command, console, own_options
from arcface_jax.commands.training_sets import (
    AS_FOUND,
    OPTIONS,
    How,
    Output,
    TrainingSet,
    Values,
    notes,
    open_set,
)
from arcface_jax.config import AugmentConfig, DataConfig, command_line
from arcface_jax.config.choices import Bad, FaceChoice
from arcface_jax.config.command_line import Count, Positive, Quality, Share
from arcface_jax.errors import UserError

if TYPE_CHECKING:
    from arcface_jax.data.source import Source
    from arcface_jax.data.tools.aligning import Aligned
    from arcface_jax.data.tools.packing import Packed

Photographs = Annotated[Positional[Path], tyro.conf.arg(metavar="PATH")]


@command
def main(words: Sequence[str], *, prog: str = "arcface-jax data") -> Result:
    """Runs the tool that the first word names."""
    tools = {
        "inspect": inspect,
        "pack": pack,
        "to-tfds": to_tfds,
        "merge": merge,
        "split": split,
        "pairs": pairs,
        "align": align,
        "detector": detector,
        "clean": cleaning.clean,
        "overlap": cleaning.overlap,
        "apply": cleaning.apply,
        "bench": bench,
    }
    with own_options(OPTIONS):
        values = command_line.call_subcommand(tools, words, prog=prog, description=__doc__ or "")
    files = values.pop("files")
    return Result(values, files)


def inspect(
    path: TrainingSet,
    output: Path = Path("runs/inspect"),
    most: Count = 0,
    seed: Count = 0,
    threads: Count = 0,
    reading: How = AS_FOUND,
) -> Values:
    """Reads every image and reports counts, sizes, copies, damage, and a sheet of samples.

    Args:
      path: A training set, as in --data.path of `train`.
      output: Folder for index.html, inspect.json, images_per_identity.png and samples.png.
      most: Read only this many images, chosen at random; 0 for all.
      seed: Random seed of the choice and of the samples.
      threads: 0 for one per processor.
      reading: Properties of the set that its files do not state.
    """
    from arcface_jax.data.source import account
    from arcface_jax.data.tools import inspection
    from arcface_jax.evaluation.report import sets

    source = open_set(path, reading, output=output, quiet=True)
    output.mkdir(parents=True, exist_ok=True)  # before every image is read
    report = inspection.inspect(source, most=most, seed=seed, threads=threads)
    print(account(source, unreadable=report.unreadable_kinds), *notes(source), sep="\n")
    print(*inspection.in_words(report), sep="\n")
    files = inspection.write(report, source, output, seed=seed)
    title, made = Path(path).name or path, datetime.now()
    files.append(sets.inspected(output, report, source, name=title, made=made, seed=seed))
    print(f"page: {files[-1]}")
    by_kind = {"unreadable_by_kind": dict(report.unreadable_kinds)}
    return {**report.summary(), **_ignored(source), **by_kind, "files": files}


def pack(
    path: TrainingSet,
    output: Output,
    format: Literal[
        "recordio", "folder", "list", "parquet", "arrow", "webdataset", "lmdb"
    ] = "recordio",
    renumber: bool = False,
    bad: Bad = "stop",
    threads: Count = 0,
    reading: How = AS_FOUND,
) -> Values:
    """Writes a training set as train.rec for insightface, or in another format.

    Args:
      path: A training set, as in --data.path of `train`.
      output: Folder to write to, or the .csv file of a list; rerun the same command to resume.
      format: train.rec, train.idx and property; one folder for each identity; a list of path,label
        (for image files, which are not copied); train.parquet; an Arrow file in a folder like
        Hugging Face's save_to_disk; WebDataset tars; or an LMDB of (image, label) as MessagePack.
      renumber: Number the identities that have images from 0, without gaps.
      bad: What to do with an image that cannot be read or is not 112 x 112.
      threads: 0 for one per processor.
      reading: Properties of the set that its files do not state.
    """
    from arcface_jax.data import lists
    from arcface_jax.data.tools import (
        list_writing,
        lmdb_writing,
        packing,
        splitting,
        table_writing,
        webdataset_writing,
    )

    is_list = output.suffix.lower() in lists.SUFFIXES
    if format == "list" and not is_list:
        raise UserError(f"--format list writes a file: name {output}.csv")
    if is_list and format != "list":
        raise UserError(
            f"{output} has the name of a list, and --format {format} writes a folder: add --format "
            "list, or name a folder"
        )
    source = open_set(path, reading, output=output)
    selection = packing.select(source, renumber=renumber)
    write = {
        "recordio": packing.pack,
        "folder": splitting.write_folder,
        "list": list_writing.write,
        "parquet": table_writing.write_parquet,
        "arrow": table_writing.write_arrow,
        "webdataset": webdataset_writing.write,
        "lmdb": lmdb_writing.write,
    }[format]
    done = write(source, selection, output, bad=bad, threads=threads)
    return _packed(done, output) | _ignored(source)


def to_tfds(
    path: TrainingSet,
    output: Output,
    name: str = "faces",
    shard_images: Positive = 50_000,
    renumber: bool = False,
    bad: Bad = "stop",
    threads: Count = 0,
    reading: How = AS_FOUND,
) -> Values:
    """Writes a training set as ArrayRecord files; tfds.data_source(NAME, data_dir=OUTPUT) opens it.

    Args:
      path: A training set, as in --data.path of `train`.
      output: Data directory of TFDS; rerun the same command to resume.
      name: Name of the data set.
      shard_images: Images per file.
      renumber: Number the identities that have images from 0, without gaps.
      bad: What to do with an image that cannot be read or is not 112 x 112.
      threads: 0 for one per processor.
      reading: Properties of the set that its files do not state.
    """
    from arcface_jax.data.tools import packing, tfds_writing

    source = open_set(path, reading, output=output)
    selection = packing.select(source, renumber=renumber)
    options = {"name": name, "shard_images": shard_images, "bad": bad, "threads": threads}
    done = tfds_writing.write(source, selection, output, **options)
    return _packed(done, output / name) | _ignored(source)


def merge(
    output: Output,
    paths: tuple[str, ...],
    same: Path | None = None,
    bad: Bad = "stop",
    threads: Count = 0,
    reading: How = AS_FOUND,
) -> Values:
    """Writes several training sets as one record file; they share identities only by --same.

    Args:
      output: Folder to write to; rerun the same command to resume.
      paths: The training sets, two or more.
      same: merge.csv of `overlap`: identities of the first two sets that are one person.
      bad: What to do with an image that cannot be read or is not 112 x 112.
      threads: 0 for one per processor.
      reading: Properties of the set that its files do not state.
    """
    if len(paths) < 2:
        raise UserError(f"merge needs at least two training sets in --paths, got {paths}")
    from arcface_jax.data import opening
    from arcface_jax.data.tools import packing

    with own_options({"data.path": "--paths"}):
        parts = [open_set(path, reading, output=output) for path in paths]
    source = opening.JoinedSource(parts)
    selection = packing.select(source)
    if same is not None:
        from arcface_jax.cleaning import apply as applying

        selection = applying.select_merged(source, same, counts=[p.num_classes for p in parts[:2]])
    done = packing.pack(source, selection, output, bad=bad, threads=threads)
    return _packed(done, output) | _ignored(source)


def split(
    path: TrainingSet,
    output: Output,
    fraction: float = 0.1,
    min_images: Count = 1,
    same: Path | None = None,
    seed: Count = 0,
    bad: Bad = "stop",
    threads: Count = 0,
    reading: How = AS_FOUND,
) -> Values:
    """Divides the identities into record files to train and to evaluate on, numbered from 0.

    Args:
      path: A training set, as in --data.path of `train`.
      output: Folder for train/ and eval/.
      fraction: Share of the identities that go to eval.
      min_images: Leave out identities with fewer images.
      same: duplicates.csv of `clean`: identities of a group stay on one side.
      seed: Random seed of the choice.
      bad: What to do with an image that cannot be read or is not 112 x 112.
      threads: 0 for one per processor.
      reading: Properties of the set that its files do not state.
    """
    from arcface_jax.data.tools import packing, splitting

    source = open_set(path, reading, output=output)
    groups = None
    if same is not None:
        from arcface_jax.cleaning.apply import groups_in

        groups = groups_in(same, num_classes=source.num_classes)
    options = {"fraction": fraction, "seed": seed, "min_images": min_images}
    sides = splitting.divide(source.labels(), groups=groups, **options)
    result: Values = {"files": [], **_ignored(source)}
    for name, identities in zip(("train", "eval"), sides, strict=True):
        selection = packing.select(source, identities=identities)
        packed = packing.pack(source, selection, output / name, bad=bad, threads=threads)
        done = _packed(packed, output / name)
        result["files"] += done.pop("files")
        result |= {f"{name}/{key}": value for key, value in done.items()}
    return result


def pairs(
    path: TrainingSet,
    output: Output,
    pairs: Count = 0,
    disjoint: bool = False,
    seed: Count = 0,
    reading: How = AS_FOUND,
) -> Values:
    """Writes a verification set (.bin) that insightface reads.

    Args:
      path: A training set to draw balanced pairs from; or a list of pairs, LFW's pairs.txt or CSV,
        with the folder of its images: LIST:FOLDER.
      output: The .bin file.
      pairs: Number of pairs, a multiple of 20: ten folds, each half same and half different. By
        default 6,000 for a training set, and the whole list in its order.
      disjoint: Keep each identity within one fold; for training sets only.
      seed: Random seed of the choice.
      reading: Properties of the set that its files do not state.
    """
    import numpy as np

    from arcface_jax.data.pairs import lists
    from arcface_jax.data.tools import pair_sets

    if output.exists():
        raise UserError(f"{output} exists: name a new file")
    if ":" in path and (found := lists.split(path)):
        if disjoint:
            raise UserError(
                "--disjoint does not apply to pair lists, whose pairs are fixed; draw the pairs "
                "from the folder of their images instead"
            )
        with own_options({"evaluation.targets": "PATH"}):
            whole = lists.listed(*found)
        listed, ignored = whole.pairs, whole.ignored()
        print(whole.account(found[0].name))
        if pairs:
            kinds = np.array([pair.same for pair in listed])
            listed = [listed[i] for i in pair_sets.choose(kinds, pairs=pairs, seed=seed)]
        pair_sets.from_list(listed, output)
        same = np.array([pair.same for pair in listed])
        images = len({file for pair in listed for file in (pair.left, pair.right)})
    else:
        source = open_set(path, reading)
        ignored = dict(source.ignored)
        options = {"pairs": pairs or 6000, "seed": seed, "disjoint": disjoint}
        chosen, same = pair_sets.draw(source.labels(), **options)
        pair_sets.from_source(source, chosen, same, output)
        images = len(np.unique(chosen))
    print(f"{output}: {len(same):,} pairs, {int(same.sum()):,} of one person")
    counts = {"pairs": len(same), "images": images, **_counted(ignored)}
    return {**counts, "files": [output]}


def align(
    path: Photographs,
    output: Output,
    points: Path | None = None,
    detector: str = "",
    threshold: Share = 0.5,
    detector_size: int = 0,
    choose: FaceChoice = "auto",
    min_eyes: float = 0.0,
    quality: Quality = 95,
    format: Literal["jpeg", "png"] = "jpeg",
    threads: Count = 0,
) -> Values:
    """Aligns photographs to 112 x 112 by five points of each face.

    Args:
      path: Folder of photographs, in sub-folders or not.
      output: Folder for the faces, under the same names, faces.csv, rejects.csv and align.html;
        rerun the same command to resume.
      points: CSV of path,x1,y1,...,x5,y5, JSON of path: [[x, y], ...], or lines `path x1 y1 ...`.
      detector: SCRFD or YuNet ONNX file, or module:function.
      threshold: Lowest score of an accepted face.
      detector_size: The detector sees photographs with their longer side scaled to this, a multiple
        of 32; 0 is 1280 for YuNet, which never enlarges, and 640 for SCRFD.
      choose: Which face to take if there are several; auto takes the one nearest to the center in
        sub-folders, which are identities, and the largest otherwise.
      min_eyes: Reject faces whose eyes are fewer pixels apart.
      quality: Quality of the JPEG files.
      format: Format of the faces' files; PNG is lossless.
      threads: 0 for one per processor.
    """
    if (points is None) == (not detector):
        raise UserError("align needs either --points FILE or --detector NAME")
    from arcface_jax.data import aligner, detectors
    from arcface_jax.data.tools import aligning
    from arcface_jax.evaluation.report import sets

    if points is not None:
        find, origin = aligning.listed(points), detectors.identity(points)
    else:
        find = aligning.detected(detectors.load(detector, threshold=threshold, size=detector_size))
        origin = f"{detectors.identity(detector)} {threshold:g} {detector_size}"
    print(aligner.in_words(choose))
    done = aligning.align_folder(
        path,
        output,
        find,
        points=origin,
        choose=choose,
        min_eyes=min_eyes,
        quality=quality,
        format=format,
        threads=threads,
    )
    counts = _report_aligned(done, output)
    page = sets.aligned(
        output, path, aligning.read_rows(output), done.rejected, made=datetime.now()
    )
    print(f"page: {page}")
    return {**counts, "files": [done.report, output / aligning.FACES, page]}


def _report_aligned(done: "Aligned", output: Path) -> Values:
    """Prints a summary of all photographs; returns the numbers."""
    ignored, rejected = sum(done.ignored.values()), len(done.rejected)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in done.ignored.items())
    print(
        f"{done.written + rejected + ignored:,} files: {done.written:,} images used of "
        f"{done.identities:,} identities, {ignored:,} ignored{kinds and f' ({kinds})'}"
    )
    ways = ", ".join(f"{choice} {count:,}" for choice, count in done.choices.items())
    print(
        f"{done.written:,} faces in {output}{ways and f' ({ways})'}, {rejected:,} rejected: "
        f"{done.report}"
    )
    if done.kept or done.removed:
        print(f"{done.kept:,} kept from earlier runs, {done.removed:,} stale ones removed")
    return {
        "written": done.written,
        "kept": done.kept,
        "removed": done.removed,
        "choices": done.choices,
        "rejected": rejected,
        "identities": done.identities,
        **_counted(done.ignored),
    }


def detector(check: Path, img: Path | None = None, detector_size: int = 0) -> Values:
    """Verifies a detector's file: its SHA-256, that it opens, and that it finds five points.

    Args:
      check: SCRFD or YuNet ONNX file.
      img: A photograph to try it on, in addition to synthetic faces.
      detector_size: As `align --detector-size`.
    """
    from arcface_jax.data.tools import detector_check

    found = detector_check.check(check, photograph=img, size=detector_size)
    known, photograph = found.known, found.in_photograph
    print(f"{check}: SHA-256 {found.sha256}")
    print(
        f"{known.name}, from {known.source}; {known.license}"
        if known
        else "the SHA-256 is of no published file that is known here: compare it with its source's"
    )
    print(f"five points found in {found.found} of {detector_check.DRAWN} synthetic faces")
    if photograph is not None:
        print(f"{len(photograph.points)} faces in {img}:")
        for score, points in zip(photograph.scores, photograph.points, strict=True):
            print(f"  score {score:.3f}, points {points.round(1).tolist()}")
    if not (found.found or (photograph is not None and len(photograph.points))):
        raise UserError(
            f"--check {check} opens but found no face: give a photograph with --img, or take "
            "another file"
        )
    return {
        "sha256": found.sha256,
        "known": known is not None,
        "name": known.name if known else "",
        "synthetic_found": found.found,
        "synthetic": detector_check.DRAWN,
        "img_faces": None if photograph is None else len(photograph.points),
        "files": [],
    }


def bench(
    path: TrainingSet,
    workers: tuple[int, ...] = (0, 1, 2),
    threads: Count = 0,
    batch_size: int = 128,
    augment: tuple[Literal["dali", "adaface", "erasing"], ...] = (),
    rounds: int = 5,
    seconds: float = 2.0,
    reading: How = AS_FOUND,
) -> Values:
    """Measures images per second, stage by stage, and compares with two bare decode loops.

    Args:
      path: A training set, as in --data.path of `train`.
      workers: Numbers of worker processes to try; 0 reads in threads of this process.
      threads: Threads that read and decode, in each worker or in this process; 0 uses one per core,
        at most eight.
      batch_size: Images per batch.
      augment: As --data.augment.sets.
      rounds: Rounds over all stages; medians are reported.
      seconds: Time per stage in a round.
      reading: Properties of the set that its files do not state.
    """
    from arcface_jax.machine import input, timing
    from arcface_jax.runtime import tables

    data = DataConfig(
        path=path,
        threads=threads,
        global_batch_size=batch_size,
        augment=AugmentConfig(sets=augment),
        **asdict(reading),
    )
    found = input.measure(data, workers=workers, rounds=rounds, seconds=seconds)
    rates = found.rates
    heads = ["workers", "threads", "images/s", "of bare decode"]
    table = tables.new(None, heads, names=["stage"])
    for rate in rates:
        numbers = (rate.workers, rate.threads, round(rate.images_per_second))
        table.add_row(rate.stage, *map(str, numbers), f"{rate.of_bare:.2f}")
    console().print(table)
    bottleneck = input.bottleneck(rates)
    print(bottleneck)
    if found.damaged:
        print(
            f"{len(found.damaged):,} of {found.sampled:,} sampled images are damaged and were "
            f"skipped, the first is {found.damaged[0]}"
        )
    print(", ".join(f"{name} {value}" for name, value in timing.machine().items()))
    return {
        "rates": [rate._asdict() for rate in rates],
        "bottleneck": bottleneck,
        "damaged": len(found.damaged),
        "sampled": found.sampled,
        "files": [],
    }


def _ignored(source: "Source") -> Values:
    return _counted(source.ignored)


def _counted(ignored: Mapping[str, int]) -> Values:
    return {"ignored": sum(ignored.values()), "ignored_by_kind": dict(ignored)}


def _packed(done: "Packed", folder: Path) -> Values:
    for text in done.skipped:
        print(f"left out: {text}")
    print(f"{done.images:,} images of {done.identities:,} identities in {folder}")
    return {
        "images": done.images,
        "identities": done.identities,
        "skipped": len(done.skipped),
        "files": done.files,
    }
