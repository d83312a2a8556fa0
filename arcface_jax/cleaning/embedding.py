"""Embed a training set or pairs in one pass, into a store that can be resumed."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from arcface_jax.cleaning.identities import Identities
from arcface_jax.data import fingerprint, pipeline
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.data.source import Source
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation.embed import Model
from arcface_jax.evaluation.embeddings import normalize
from arcface_jax.evaluation.shards import Store
from arcface_jax.runtime import streams
from arcface_jax.runtime.sealed import array_digest
from arcface_jax.runtime.text import shown

SHARD = 2048
"""Images embedded together; an interrupted call loses its current shard."""
_THREADS = 4
Read = Callable[[np.ndarray], tuple[np.ndarray, dict[int, str]]]
"""(n,) image numbers -> (n, 112, 112, 3) uint8 RGB, and the errors by position."""


class Images(NamedTuple):
    """Images to embed."""

    number: int
    read: Read
    facts: Mapping[str, Any]
    """Plain JSON that identifies these images."""


class Embedded(NamedTuple):
    """Embeddings of a set of images."""

    embeddings: np.ndarray
    """(n, D) float32 of length 1; zeros for an unreadable image."""
    unreadable: dict[int, str]
    """Error of each unreadable image, by number."""

    def identities(self, labels: np.ndarray, num_classes: int) -> Identities:
        """Groups the embeddings by identity, without unreadable images."""
        known = labels.astype(np.int32, copy=True)
        known[list(self.unreadable)] = -1
        return Identities(self.embeddings, known, num_classes)


def of_source(source: Source, *, chosen: np.ndarray | None = None) -> Images:
    """Returns the images of a training set.

    Args:
      source: the training set.
      chosen: (n,) int64 numbers of the images; by default all.
    """
    numbers = np.arange(len(source)) if chosen is None else chosen

    def read(places: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        images, failed = pipeline.read_images(source, numbers[places], threads=_THREADS)
        return images, {row: str(error) for row, error in failed.items()}

    facts = {"data": fingerprint.digest(fingerprint.of_source(source))}
    if chosen is not None:
        facts["chosen"] = array_digest(numbers)
    return Images(len(numbers), read, facts)


def of_pairs(pairs: PairSet) -> Images:
    """Returns the images of a verification set."""
    facts = {"data": fingerprint.of_arrays(pairs.images)}
    return Images(len(pairs.images), lambda places: (pairs.images[places], {}), facts)


def embed(model: Model, images: Images, folder: Path, *, name: str) -> Embedded:
    """Embeds every image once; the same call resumes after an interruption.

    Args:
      model: the network.
      images: the images to embed.
      folder: folder of the shards; created if missing.
      name: name of the images, for the progress bar.

    Raises:
      DataError: the folder has embeddings of another model or other images, or an embedding is not
        finite.
      UserError: the folder cannot be written.
    """
    store = Store(folder, "embeddings-{:05d}.npy", beside="unreadable-{:05d}.json")
    settings = {"model": model.digest(), **images.facts, "images": images.number, "shard": SHARD}
    count = -(-images.number // SHARD)
    try:
        store.agree(settings)
        missing = store.missing(count)
        for number, pixels, wrong in _shards(images, missing, name=name):
            embeddings = normalize(_finite(model(pixels), name=name))
            embeddings[list(wrong)] = 0
            beside = {str(row): text for row, text in wrong.items()}
            store.write(number, embeddings, beside=beside)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return _read(store, count)


def _shards(
    images: Images, missing: list[int], *, name: str
) -> Iterator[tuple[int, np.ndarray, dict[int, str]]]:
    """Yields the images of each missing shard, reading the next one ahead."""

    def begin(number: int) -> tuple[np.ndarray, dict[int, str]]:
        return images.read(np.arange(number * SHARD, min((number + 1) * SHARD, images.number)))

    if not missing:
        return
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(begin, missing[0])
        places = track(
            range(len(missing)),
            f"embedding {escape(shown(name))}",
            console=Console(file=streams.plain(sys.stderr)),
        )
        for place in places:
            pixels, wrong = ahead.result()
            if place + 1 < len(missing):
                ahead = reader.submit(begin, missing[place + 1])
            yield missing[place], pixels, wrong


def _finite(embeddings: np.ndarray, *, name: str) -> np.ndarray:
    if not np.isfinite(embeddings).all():
        raise DataError(
            f"embeddings of {name} are not finite: the weights are damaged, or training diverged; "
            "use another checkpoint"
        )
    return embeddings


def _read(store: Store, count: int) -> Embedded:
    parts, unreadable = [], {}
    for number in range(count):
        parts.append(np.load(store.path(number)))
        wrong = json.loads(store.path_beside(number).read_bytes())
        unreadable |= {number * SHARD + int(row): text for row, text in wrong.items()}
    if unreadable:
        first = next(iter(unreadable.values()))
        print(f"left out {len(unreadable):,} unreadable images (first: {first})", file=sys.stderr)
    return Embedded(np.concatenate(parts), unreadable)
