"""Every reader of a file that may come from others: opened, and read as far as commands do."""

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_jax.config import DataConfig
from arcface_jax.errors import ImageError

_SOME = 8  # images that are read of a training set


class Reader(NamedTuple):
    """What reads a kind of file."""

    read: Callable[[Path], str]
    """Returns a word on what it found; raises UserError and nothing else."""
    modules: Sequence[str]
    """That are imported before anything is measured."""


def training_set(path: Path) -> str:
    """Opens it and reads labels and images by both ways."""
    from arcface_jax.data import fingerprint
    from arcface_jax.data.opening import open_source

    source = open_source(DataConfig(path=str(path)), seed=0)
    source.labels()
    count = min(len(source), _SOME)
    failed: Counter[str] = Counter()
    for index in range(count):
        try:
            source[index]
        except ImageError as error:
            assert "\n" not in str(error), str(error)
            failed[error.kind] += 1
    numbers = np.arange(count)
    images, labels = np.zeros((count, 112, 112, 3), np.uint8), np.zeros(count, np.int32)
    together = source.load(numbers, numbers, images, labels)
    assert len(together) == sum(failed.values()), (together, failed)
    fingerprint.of_source(source)
    if not failed:
        return f"{len(source)} images of {source.num_classes}"
    return "unreadable: " + ", ".join(f"{kind} {n}" for kind, n in failed.items())


def pairs(path: Path) -> str:
    """A verification set, by its ending."""
    from arcface_jax.data.pairs import opening

    return f"{len(opening.open_file(str(path)).same)} pairs"


def points(path: Path) -> str:
    """Five points an image."""
    from arcface_jax.data import point_files

    return f"{len(point_files.by_name(path))} images"


def photos(path: Path) -> str:
    """A folder of photos, as `embed` reads it."""
    from arcface_jax.data import faces, images

    found = faces.find(path)
    failed = 0
    for name in found[:_SOME]:
        try:
            images.decode_any_size(images.read_file(path / name), where=name)
        except ImageError:
            failed += 1
    return f"{len(found)} photos, {failed} unreadable"


def weights(path: Path) -> str:
    """torch's files and safetensors: the dict of tensors that is likeliest, then the backbone."""
    from arcface_jax.convert import state_dicts, weight_files

    weight_files.read(path)
    found = state_dicts.find(
        weight_files.contents(path), state_dicts.Where(network="r_tiny"), source=str(path)
    )
    return found.network


def onnx_model(path: Path) -> str:
    """Runs it on two faces, and takes it apart."""
    from arcface_jax.convert import onnx_layers
    from arcface_jax.convert.onnx_runner import onnx_embedder

    out = onnx_embedder(path)(np.zeros((2, 112, 112, 3), np.uint8))
    try:
        layers = f"{len(onnx_layers.read(path).layers)} layers"
    except onnx_layers.UnknownGraph:
        layers = "no sequence of layers"
    return f"{out.shape}, {layers}"


def hub_folder(path: Path) -> str:
    """A folder of weights with its description."""
    from arcface_jax.convert import hub

    return hub.read(path).network


def workdir(path: Path) -> str:
    """What evaluation reads of a run: configuration, sets, weights."""
    from arcface_jax.data.pairs.opening import open_for_runs
    from arcface_jax.training import checkpoint, saved_runs

    config = checkpoint.read_config(path)
    sets = open_for_runs([config], ())
    _, params, _, step = saved_runs.restore_backbone(path)
    return f"step {step}, {len(params)} arrays, {len(sets)} sets"


def calibration(path: Path) -> str:
    """A threshold."""
    from arcface_jax.evaluation import calibration

    return f"{calibration.read(path).threshold_cosine}"


def embeddings(path: Path) -> str:
    """The output of `embed`."""
    from arcface_jax.inference import bulk

    bulk.settings(path)
    return f"{bulk.read(path)[1].shape}"


def gallery(path: Path) -> str:
    """A gallery, searched."""
    from arcface_jax.inference.gallery import Gallery

    found = Gallery(path)
    return f"{found.search(np.ones((1, found.shape[1]), np.float32)).name}"


def centers(path: Path) -> str:
    """Class centers."""
    from arcface_jax.convert import centers

    return f"{centers.read(path).rows.shape}"


_TORCH = ("torch", "arcface_jax.convert.weights", "arcface_jax.convert.state_dicts")
_SET = ("arcface_jax.data.opening", "arcface_jax.data.fingerprint")
READERS: dict[str, Reader] = {
    "folder": Reader(training_set, _SET),
    "list": Reader(training_set, _SET),
    "RecordIO": Reader(training_set, _SET),
    "Parquet": Reader(training_set, (*_SET, "pyarrow.parquet")),
    "Arrow": Reader(training_set, (*_SET, "pyarrow.parquet")),
    "TFDS": Reader(training_set, (*_SET, "tensorflow_datasets")),
    "LMDB": Reader(training_set, (*_SET, "lmdb")),
    "WebDataset": Reader(training_set, _SET),
    "photos": Reader(photos, _SET),
    "pairs .bin": Reader(pairs, ("arcface_jax.data.pairs.opening",)),
    "pair list": Reader(pairs, ("arcface_jax.data.pairs.opening",)),
    "five points": Reader(points, ("arcface_jax.data.point_files",)),
    "torch .pth": Reader(weights, _TORCH),
    "safetensors": Reader(weights, (*_TORCH, "safetensors.torch")),
    "ONNX": Reader(onnx_model, ("onnx", "onnxruntime", "arcface_jax.convert.from_onnx")),
    "hub folder": Reader(hub_folder, (*_TORCH, "arcface_jax.convert.hub", "yaml")),
    "class centers": Reader(centers, (*_TORCH, "arcface_jax.convert.centers")),
    "workdir": Reader(
        workdir, ("arcface_jax.training.saved_runs", "arcface_jax.data.pairs.opening")
    ),
    "calibration": Reader(calibration, ("arcface_jax.evaluation.calibration",)),
    "embeddings": Reader(embeddings, ("arcface_jax.inference.bulk",)),
    "gallery": Reader(gallery, ("arcface_jax.inference.gallery",)),
}
"""By the name of the format."""


def preload(names: Sequence[str]) -> None:
    """Imports what the readers of some formats need; the forks of this process have it then."""
    for name in names:
        for module in READERS[name].modules:
            importlib.import_module(module)
