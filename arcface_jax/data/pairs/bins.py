"""Verification sets: pairs of faces, and whether each pair shows one person."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arcface_jax.data import plain_pickle
from arcface_jax.data.aligner import Aligner
from arcface_jax.data.images import IMAGE_SIZE, decode_any_size, square
from arcface_jax.data.pairs import flags
from arcface_jax.errors import DataError, meant
from arcface_jax.runtime import foreign

_LARGE, _EXPANSION = 3 << 28, 200  # bytes that any set may take; factor on its encoded size


class Listing(NamedTuple):
    """Account of a list of pairs."""

    account: str
    """One line for the terminal."""
    images: int
    """Number of distinct images in the pairs."""
    ignored: dict[str, int]
    """Lines that are not pairs, by kind."""


class PairSet(NamedTuple):
    """A verification set in memory."""

    name: str
    """The set's name, as in `eval/NAME/accuracy`."""
    images: np.ndarray
    """(2 n, 112, 112, 3) uint8 RGB; images 2 i and 2 i + 1 are pair i."""
    same: np.ndarray
    """(n,) bool: whether pair i shows one person."""
    listing: Listing | None = None
    """Account of the list, if a list defines the set."""

    def account(self) -> str:
        """One line about what was used from the file and what was ignored."""
        if self.listing:
            return self.listing.account
        same = int(np.sum(self.same))
        return (
            f"{self.name}: {len(self.same):,} pairs ({same:,} of one person) of "
            f"{len(self.images):,} images used, 0 ignored"
        )

    def counts(self) -> dict[str, int]:
        """Returns the account's numbers, as `eval/NAME/images` and `eval/NAME/ignored`."""
        images, ignored = len(self.images), 0
        if self.listing:
            images, ignored = self.listing.images, sum(self.listing.ignored.values())
        return {f"eval/{self.name}/images": images, f"eval/{self.name}/ignored": ignored}


def read_bin(path: Path, *, aligner: Aligner | None = None) -> PairSet:
    """Reads insightface's `.bin`: a pickle of (2 n encoded images, n booleans).

    The pickle is not trusted: only tuples, lists, bytes, strings, numbers, booleans and NumPy
    arrays are unpickled. Pickles of Python 2 and 3 are supported. The format's images are aligned:
    other sizes are cropped to their middle square and resized.

    Args:
      path: the file.
      aligner: aligns images of another size if it has a detector.

    Raises:
      DataError: the file does not exist, or has another format.
    """
    if not foreign.is_file(path):
        there = sorted(p.name for p in path.parent.glob("*.bin"))
        raise DataError(
            f"no verification set at {path} (in that folder: {', '.join(there) or 'no .bin file'})"
            f": {meant(path.name, there)}name an existing set with --evaluation.targets"
        )
    try:
        data = foreign.read(path)
        encoded, same = plain_pickle.load(data, what="verification set")
        encoded = [_encoded(item) for item in encoded]
        same = np.array(
            [_flag(x) for x in (same.values if isinstance(same, plain_pickle.Array) else same)]
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:
        # pickle raises nearly any exception on damaged input.
        raise DataError(
            f"{path} is not a verification set, a pickle of (images, is-same list): "
            f"{repr(error)[:200]}"
        ) from error
    if len(encoded) != 2 * len(same) or not len(same):
        raise DataError(
            f"{path}: {len(encoded)} images for {len(same)} pairs; there should be two images a "
            "pair, and a pair at least: recreate the set, or fetch it again"
        )
    different = {id(data): len(data) for data in encoded}
    check_reuse(len(encoded), len(different), size=sum(different.values()), where=str(path))
    decoded: dict[int, np.ndarray] = {}
    for number, data in enumerate(encoded):
        if id(data) not in decoded:
            decoded[id(data)] = _decoded(data, f"{path}, image {number}", aligner)
    return PairSet(path.stem, np.stack([decoded[id(data)] for data in encoded]), same)


def _decoded(data: bytes, where: str, aligner: Aligner | None) -> np.ndarray:
    if aligner is not None and aligner.detects:
        return aligner(decode_any_size(data, where=where), where=where)
    return square(data, where=where)


def check_reuse(count: int, different: int, *, size: int, where: str) -> None:
    """Refuses a set whose pairs take far more memory than its images explain.

    Args:
      count: number of images in all pairs.
      different: number of distinct images among them.
      size: encoded bytes of the distinct images.
      where: the set, for the message.

    Raises:
      DataError: the pairs take more than 200 times `size`, and more than 768 MiB.
    """
    memory = count * IMAGE_SIZE * IMAGE_SIZE * 3
    if memory > max(_LARGE, _EXPANSION * size):
        raise DataError(
            f"{where}: {count:,} images of pairs, of which {different:,} are different, take "
            f"{memory / 2**30:.1f} GiB in memory, and {size:,} bytes in files: split the pairs "
            "into sets of 10,000, or compare all images by `arcface-jax protocol all-to-all`"
        )


def _encoded(item: Any) -> bytes:
    if isinstance(item, plain_pickle.Array) and item.values.dtype.kind in "biuf":
        return item.values.astype(np.uint8).tobytes()
    if not isinstance(item, bytes):
        raise DataError(f"an image is of type {type(item).__name__}; there should be its bytes")
    return item


def _flag(value: Any) -> bool:
    same = flags.parse(value)
    if same is None:
        raise DataError(f"{value!r} does not tell whether a pair shows one person: use 1 or 0")
    return same
