"""List the images of another set that show people of a training set (`overlap`)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.cleaning import embedding, files, overlap, photos, separation
from arcface_jax.cleaning.identities import Identities
from arcface_jax.cleaning.overlap import Overlap
from arcface_jax.cleaning.thresholds import Threshold
from arcface_jax.data.pairs.opening import open_file
from arcface_jax.data.source import Source
from arcface_jax.errors import DataError, ImageError
from arcface_jax.evaluation.embed import Model


class Leaks(NamedTuple):
    """Summary of an overlap and its file."""

    images: int
    """Images of the other set that show a person of the training set."""
    people: int
    """Identities of the training set among them."""
    photos: int
    """Images that are the same photograph as one of the training set."""
    threshold: Threshold
    weak: bool
    """Whether the model is too weak, as judged by `separation`."""
    files: list[Path]


def in_pairs(model: Model, train: Source, target: str, output: Path, *, seed: int) -> Leaks:
    """Finds people of a training set in a verification set.

    Args:
      model: the network.
      train: the training set.
      target: a `.bin` file, or a list of pairs with the folder of its images.
      output: folder for the embeddings and overlap.csv.
      seed: random seed of the search for the training set's own duplicates.
    """
    pairs = open_file(target)
    images = embedding.of_pairs(pairs)
    embedded = embedding.embed(model, images, output / "embeddings-b", name=pairs.name)
    own = _embedded(model, train, output / "embeddings-a", name="the training set")
    found = overlap.find(own, embedded.embeddings, seed=seed)
    rows, same = _rows(
        found,
        train,
        name=pairs.name,
        where=lambda i: f"{target}, image {i}",
        image=lambda i: pairs.images[i],
    )
    return _write(found, rows, same, own, output, seed=seed)


def in_set(model: Model, train: Source, other: Source, output: Path, *, seed: int) -> Leaks:
    """Finds people that two training sets share; writes merge.csv too, for `data merge --same`.

    Args:
      model: the network.
      train: the training set.
      other: another one.
      output: folder for the embeddings, overlap.csv and merge.csv.
      seed: random seed of the split halves.
    """
    first = _embedded(model, train, output / "embeddings-a", name="the first set")
    second = _embedded(model, other, output / "embeddings-b", name="the second set")
    found = overlap.find(first, second.embeddings, seed=seed)
    rows, same = _rows(found, train, name="b", where=other.where, image=lambda i: other[i][0])
    leaks = _write(found, rows, same, first, output, seed=seed)
    shared = overlap.shared(first, second, seed=seed)
    decided = zip(shared.pairs.tolist(), shared.score, shared.mutual, strict=True)
    merged = (
        (a, b, float(score), "merge" if mutual else "review") for (a, b), score, mutual in decided
    )
    return leaks._replace(files=[*leaks.files, files.write(output, files.MERGE, merged)])


def left_out(path: Path, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Returns the image numbers that overlap.csv flags, except `keep`, by verification set.

    Args:
      path: path of overlap.csv.
      sizes: number of images of each set.

    Raises:
      DataError: it is not such a file, or lists images of none of these sets.
    """
    rows = files.read(path, files.OVERLAP)
    listed = {row["set"] or "" for row in rows}
    if listed and not listed & sizes.keys():
        raise DataError(
            f"{path} lists images of {', '.join(sorted(listed))[:200]}, not of "
            f"{', '.join(sizes)}: name the overlap.csv of a set that is evaluated"
        )
    kept = [row for row in rows if row["decision"] != "keep"]
    return {
        name: np.array(
            [files.number(path, row, "index", below=n) for row in kept if row["set"] == name],
            np.int64,
        )
        for name, n in sizes.items()
    }


def _embedded(model: Model, source: Source, folder: Path, *, name: str) -> Identities:
    found = embedding.embed(model, embedding.of_source(source), folder, name=name)
    return found.identities(source.labels(), source.num_classes)


def _rows(
    found: Overlap,
    train: Source,
    *,
    name: str,
    where: Callable[[int], str],
    image: Callable[[int], np.ndarray],
) -> tuple[list[tuple], int]:
    rows, same = [], 0
    for index, label, score, nearest in zip(
        found.image.tolist(),
        found.label.tolist(),
        found.score,
        found.nearest.tolist(),
        strict=True,
    ):
        photo = _is_one_photo(train, nearest, lambda index=index: image(index))
        same += photo
        place = (label, nearest, train.where(nearest))
        rows.append((name, index, where(index), *place, float(score), int(photo), "drop"))
    return rows, same


def _is_one_photo(train: Source, number: int, other: Callable[[], np.ndarray]) -> bool:
    try:
        return photos.correlation(train[number][0], other()) >= photos.SAME
    except ImageError:
        return False


def _write(
    found: Overlap, rows: list[tuple], same: int, train: Identities, output: Path, *, seed: int
) -> Leaks:
    rate = separation.rank_one(train, seed=seed)
    return Leaks(
        images=len(rows),
        people=len(set(found.label.tolist())),
        photos=same,
        threshold=found.threshold,
        weak=rate is None or rate < separation.ENOUGH,
        files=[files.write(output, files.OVERLAP, rows)],
    )
