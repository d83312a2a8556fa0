"""Write every network in every format of weights, read it back, and compare embeddings.

python -m benchmarks.weight_forms r50 [--faces lfw_dev.bin]   measures one network and prints JSON
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from arcface_jax.convert import (
    from_onnx,
    hub,
    model_card,
    onnx_graph,
    parity,
    twins,
    weight_files,
    weights,
)
from arcface_jax.convert.weight_files import StateDict
from arcface_jax.data.images import IMAGE_SIZE
from arcface_jax.models.registry import Arrays
from arcface_jax.training import step
from arcface_jax.training.network import Network
from benchmarks import modelzoo

BEGIN = "<!-- begin: scripts/modelzoo.py --forms -->"
# torch's exporter through TorchScript, the source of most published files.
_TORCHSCRIPT = {"dynamo": False, "opset_version": 14}
_NOT_FOLDED = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}


class _Written(NamedTuple):
    """Input for writing a form."""

    network: str
    state: StateDict
    model: Network
    folder: Path


def measure(network: str, faces: np.ndarray) -> dict[str, Any]:
    """Measures a network with fresh weights and the statistics of a training pass.

    Args:
      network: a name in `arcface_jax.models.registry.NETWORKS` that has a torch twin.
      faces: (n, 112, 112, 3) uint8 RGB.

    Returns:
      For each form that can be read back, the largest relative difference between the embeddings
      of the weights before and after.
    """
    with tempfile.TemporaryDirectory() as folder:
        params, batch_stats = parity.settled(network, faces)
        state = weights.to_state_dict(params, batch_stats)
        model = Network(network, params, batch_stats, batch_size=len(faces), devices=1)
        written = _Written(network, state, model, Path(folder))
        embed = step.make_embed(model.backbone)  # one program for all forms
        embeddings = np.asarray(embed(params, batch_stats, jnp.asarray(faces)))
        errors = {}
        for form, (_, through) in _FORMS.items():
            if form in _ONNX_FORMS and not twins.has_layer_sequence(network):
                continue
            again = np.asarray(embed(*through(written), jnp.asarray(faces)))
            errors[form] = parity.largest_error(again, embeddings)
    return {"network": network, **errors}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    titles = [title for title, _ in _FORMS.values()]
    lines = [f"| network | {' | '.join(titles)} |", "|---|" + "--:|" * len(titles)]
    for row in rows:
        lines.append(f"| `{row['network']}` | {' | '.join(_cell(row, form) for form in _FORMS)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], form: str) -> str:
    if form not in row:
        return "refused"
    return f"{row[form]:.1e}" if row[form] else "0"


def _torch_file(written: _Written, *, suffix: str) -> tuple[Arrays, Arrays]:
    path = written.folder / f"weights{suffix}"
    weight_files.write(path, written.state)
    found = weights.load(path, written.network)
    return found.params, found.batch_stats


def _hub_folder(written: _Written) -> tuple[Arrays, Arrays]:
    hub.export(written.model, written.folder / "hub", card=model_card.Card(name=written.network))
    found = hub.read(written.folder / "hub")
    return found.params, found.batch_stats


def _own_onnx(written: _Written) -> tuple[Arrays, Arrays]:
    path = written.folder / "own.onnx"
    onnx_graph.write(path, written.model, onnx_graph.Form())
    return _read_onnx(written, path)


def _torch_onnx(written: _Written, options: dict[str, Any]) -> tuple[Arrays, Arrays]:
    path = written.folder / "torch.onnx"
    module = twins.load(written.network, written.state).eval()
    images = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's exporter is deprecated but widely used
        torch.onnx.export(module, (images,), str(path), **(_TORCHSCRIPT | options))
    return _read_onnx(written, path)


def _read_onnx(written: _Written, path: Path) -> tuple[Arrays, Arrays]:
    found = from_onnx.load(path, written.network)
    path.unlink()
    return found.params, found.batch_stats


_FORMS: dict[str, tuple[str, Callable[[_Written], tuple[Arrays, Arrays]]]] = {
    "pth": (".pth", lambda written: _torch_file(written, suffix=".pth")),
    "safetensors": ("safetensors", lambda written: _torch_file(written, suffix=".safetensors")),
    "hub": ("hub folder", _hub_folder),
    "onnx": ("ONNX of this project", _own_onnx),
    "folded": ("ONNX, folded", lambda written: _torch_onnx(written, {})),
    "not_folded": ("ONNX, not folded", lambda written: _torch_onnx(written, _NOT_FOLDED)),
}
_ONNX_FORMS = ("onnx", "folded", "not_folded")


if __name__ == "__main__":
    modelzoo.main(sys.argv[1:], measure, prog="python -m benchmarks.weight_forms")
