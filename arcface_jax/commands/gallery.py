"""Save the embeddings of a folder as a gallery, and find the most similar faces in it.

arcface-jax embed --workdir WORKDIR --img FACES --output EMBEDDINGS
arcface-jax gallery build EMBEDDINGS --output GALLERY --form int8
arcface-jax gallery search GALLERY --workdir WORKDIR --img face.jpg --k 5
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from arcface_jax.commands import Result, command, dispatch
from arcface_jax.commands.embed import notes, open_embedder, points_of
from arcface_jax.config import command_line
from arcface_jax.config.choices import AlignOptions
from arcface_jax.inference.open_model import ModelChoice

_BUILD = """Make a gallery of the embeddings that `arcface-jax embed` wrote; names are their files.

    {prog} EMBEDDINGS --output GALLERY
"""
_SEARCH = """Print the faces of a gallery that are most similar to an image, with their cosines.

    {prog} GALLERY --workdir WORKDIR --img face.jpg
"""


@dataclass(frozen=True)
class Build:
    """Options of `gallery build`."""

    source: Annotated[Positional[Path], tyro.conf.arg(metavar="EMBEDDINGS")]
    """Folder of shards from `embed`."""
    output: Path
    """Folder to create; new or empty."""
    form: Literal["float32", "int8"] = "float32"
    """What a search scans; int8 reads a quarter of the bytes, with the same results."""


@dataclass(frozen=True)
class Search:
    """Options of `gallery search`."""

    gallery: Annotated[Positional[Path], tyro.conf.arg(metavar="GALLERY")]
    """Folder of the gallery."""
    model: OmitArgPrefixes[ModelChoice]
    img: Path
    """Image to search for."""
    k: int = 5
    """Number of faces to print."""
    points: tuple[str, ...] = ()
    """Five points to align by, as in `embed --points`."""
    align: OmitArgPrefixes[AlignOptions] = field(default_factory=AlignOptions)
    flip: bool = False
    """Add the embeddings of the flipped faces, as in the gallery."""


def main(words: Sequence[str], *, prog: str = "arcface-jax gallery") -> int:
    """Builds or searches a gallery."""
    return dispatch({"build": build, "search": search}, words, prog=prog, description=__doc__ or "")


@command
def build(words: Sequence[str], *, prog: str = "arcface-jax gallery build") -> Result:
    """Makes a gallery from the shards of `embed`."""
    arguments = command_line.parse(Build, words, prog=prog, description=_BUILD.format(prog=prog))
    from arcface_jax.inference import bulk, gallery

    made = bulk.settings(arguments.source)
    names, embeddings = bulk.read(arguments.source)
    found = gallery.build(
        arguments.output,
        embeddings,
        names,
        model=made["gallery_model"],
        flip=made["flip"],
        form=arguments.form,
    )
    rows, size = found.shape
    print(f"{arguments.output}: {rows:,} faces, embeddings of {size} numbers, {found.form}")
    return Result({"rows": rows, "embedding_size": size}, sorted(arguments.output.iterdir()))


@command
def search(words: Sequence[str], *, prog: str = "arcface-jax gallery search") -> Result:
    """Prints the most similar faces."""
    arguments = command_line.parse(Search, words, prog=prog, description=_SEARCH.format(prog=prog))
    from arcface_jax.inference.gallery import Gallery

    found = Gallery(arguments.gallery)
    embedder = open_embedder(arguments.model, arguments, batch_size=1, devices=1)
    with notes():
        five = points_of(arguments.points, arguments.img)
        query = embedder(arguments.img, points=five)
    matches = embedder.search(found, query, k=arguments.k)
    (names,), (scores,) = matches.name, matches.score
    for name, score in zip(names, scores, strict=True):
        print(f"{score:.4f} {name}")
    return Result({"names": names, "cosines": [float(score) for score in scores]})
