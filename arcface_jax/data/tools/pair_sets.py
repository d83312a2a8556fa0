"""`data.py pairs`: a verification set made from labeled images, or from a list of pairs."""

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from arcface_jax.data.images import IMAGE_SIZE, decode_any_size, encode, square
from arcface_jax.data.pairs import lists
from arcface_jax.data.source import Source
from arcface_jax.data.tools import packing
from arcface_jax.errors import DataError, UserError
from arcface_jax.runtime.files import write_atomic

FOLDS = 10
_TRIES = 100  # draws per pair before giving up for lack of images


def draw(
    labels: np.ndarray, *, pairs: int, seed: int, disjoint: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses distinct pairs: ten folds, each half same and half different.

    Args:
      labels: (n,) identity of each image; those below 0 are skipped.
      pairs: number of pairs, a multiple of 20.
      seed: random seed of the choice.
      disjoint: whether an identity may be in one fold only, so that folds are independent.

    Returns:
      (pairs, 2) int64 image numbers, and (pairs,) bool: whether they show one person. Each fold has
      its same pairs first.

    Raises:
      UserError: the number of pairs does not make ten even folds.
      DataError: the images do not yield enough pairs.
    """
    _check_even(pairs)
    rng = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    people = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    people = [people[i] for i in rng.permutation(len(people))]
    groups = _share_out(people) if disjoint else [people]
    each = pairs // 2 // len(groups)
    same = [_same_pairs(group, each, rng, disjoint) for group in groups]
    different = [_different_pairs(group, each, rng, disjoint) for group in groups]
    # Fold by fold: its same pairs, then its different ones.
    both = [np.concatenate(kind).reshape(FOLDS, -1, 2) for kind in (same, different)]
    chosen = np.concatenate(both, axis=1).reshape(-1, 2)
    half = pairs // 2 // FOLDS
    return chosen, np.tile(np.repeat([True, False], half), FOLDS)


def choose(same: np.ndarray, *, pairs: int, seed: int) -> np.ndarray:
    """Chooses some of the pairs of a list: ten folds, each half same and half different.

    Args:
      same: (n,) bool: whether the listed pairs show one person.
      pairs: how many to choose, a multiple of 20.
      seed: random seed of the choice.

    Returns:
      (pairs,) int64 numbers of listed pairs. Each fold has its same pairs first.

    Raises:
      UserError: the number of pairs does not make ten even folds.
      DataError: the list has too few of either kind.
    """
    _check_even(pairs)
    rng = np.random.default_rng(seed)
    kinds = [rng.permutation(np.flatnonzero(same == kind)) for kind in (True, False)]
    if min(map(len, kinds)) < pairs // 2:
        raise DataError(
            f"the list has {len(kinds[0])} pairs of one person and {len(kinds[1])} of two, and "
            f"--pairs {pairs} needs {pairs // 2} of either kind: use fewer --pairs, or omit it "
            f"to use the whole list"
        )
    halves = [kind[: pairs // 2].reshape(FOLDS, -1) for kind in kinds]
    return np.concatenate(halves, axis=1).ravel()


def _check_even(pairs: int) -> None:
    if pairs < 2 * FOLDS or pairs % (2 * FOLDS):
        raise UserError(
            f"--pairs {pairs} must be a multiple of {2 * FOLDS}: ten folds, each half same and "
            f"half different; use {max(1, round(pairs / 20)) * 20}"
        )


def _share_out(people: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Deals people into ten groups, those with several images first to spread them evenly."""
    ordered = sorted(people, key=lambda images: len(images) < 2)
    return [ordered[fold::FOLDS] for fold in range(FOLDS)]


def _same_pairs(
    people: list[np.ndarray], count: int, rng: np.random.Generator, disjoint: bool
) -> np.ndarray:
    """Returns (count, 2): one pair of each person, then another of each, until there are enough."""
    several = [images for images in people if len(images) > 1]
    possible = sum(len(images) * (len(images) - 1) // 2 for images in several)
    if possible < count:
        raise _too_few(
            f"{possible} pairs of one person ({len(several)} identities have two images or more), "
            f"and {count} are needed",
            disjoint,
            most=0 if disjoint else 2 * possible // (2 * FOLDS) * (2 * FOLDS),
        )
    waiting = [_pairs_of(images, count, rng) for images in several]
    chosen: list[tuple[int, int]] = []
    while len(chosen) < count:
        found = [(person, next(person, None)) for person in waiting[: count - len(chosen)]]
        later = waiting[count - len(chosen) :]
        chosen += [pair for _, pair in found if pair is not None]
        waiting = later + [person for person, pair in found if pair is not None]
    return np.array(chosen, np.int64)


def _pairs_of(images: np.ndarray, most: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yields distinct pairs of one person's images, at random."""
    total = len(images) * (len(images) - 1) // 2
    for number in rng.choice(total, min(total, most), replace=False).tolist():
        # Pair number i (i - 1) / 2 + j consists of images j < i.
        i = int((1 + np.sqrt(1 + 8 * number)) / 2)
        yield int(images[i]), int(images[number - i * (i - 1) // 2])


def _different_pairs(
    people: list[np.ndarray], count: int, rng: np.random.Generator, disjoint: bool
) -> np.ndarray:
    """Returns (count, 2): each person in turn, paired with a random other person."""
    chosen: dict[tuple[int, int], None] = {}
    if len(people) > 1:
        for turn in range(_TRIES * count):
            if len(chosen) == count:
                break
            one = turn % len(people)
            other = (one + int(rng.integers(1, len(people)))) % len(people)
            a, b = (int(people[i][rng.integers(len(people[i]))]) for i in (one, other))
            if (b, a) not in chosen:
                chosen[a, b] = None
    if len(chosen) < count:
        found = f"{len(people)} identities, of which {count} pairs of two people cannot be drawn"
        raise _too_few(found, disjoint)
    return np.array(list(chosen), np.int64)


def _too_few(found: str, disjoint: bool, *, most: int = 0) -> DataError:
    whose = "a fold with identities of its own" if disjoint else "the set"
    fewer = f"use --pairs {most}" if most else "use fewer --pairs"
    way_out = fewer + (", or no --disjoint" if disjoint else "")
    return DataError(f"{whose} has {found}: {way_out}, or more images")


def from_source(source: Source, chosen: np.ndarray, same: np.ndarray, path: Path) -> None:
    """Writes drawn pairs with their images as stored.

    Args:
      source: the images.
      chosen: (n, 2) image numbers.
      same: (n,) bool.
      path: the `.bin` file.

    Raises:
      ImageError: an image cannot be read or is not 112 x 112.
    """
    write([packing.checked(source, int(n)).data for n in chosen.ravel()], same, path)


def from_list(pairs: Sequence[lists.Pair], path: Path) -> None:
    """Writes listed pairs: 112 x 112 images as stored, others as PNG of that size.

    Args:
      pairs: pairs whose files exist.
      path: the `.bin` file.

    Raises:
      DataError: naming an image that cannot be read.
    """
    files = [file for pair in pairs for file in (pair.left, pair.right)]
    encoded = {file: _fitting(file) for file in dict.fromkeys(files)}
    write([encoded[file] for file in files], np.array([pair.same for pair in pairs]), path)


def _fitting(file: Path) -> bytes:
    data = file.read_bytes()
    image = decode_any_size(data, where=str(file))
    if image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3):
        return data
    # insightface's reader only accepts square images.
    return encode(square(data, where=str(file)))


def write(encoded: list[bytes], same: np.ndarray, path: Path) -> None:
    """Writes a verification set in insightface's format: a pickle of (images, is-same list).

    Args:
      encoded: 2 n encoded images; 2 i and 2 i + 1 are pair i.
      same: (n,) bool.
      path: the `.bin` file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, pickle.dumps((encoded, [bool(x) for x in same]), protocol=4))
