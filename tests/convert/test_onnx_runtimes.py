"""Exports in ONNX Runtimes of other versions, each in an environment of its own (slow)."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.convert import parity, to_onnx
from arcface_jax.convert.onnx_graph import Form
from arcface_jax.inference.open_model import ModelChoice, open_network
from arcface_jax.training.network import Network

pytestmark = pytest.mark.slow
pytest.importorskip("onnxruntime")

OLDEST = {11: "1.15.1", 12: "1.17.3", 13: "1.20.1"}.get(sys.version_info.minor, "1.23.2")
RUN = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.onnx")):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.load(folder / f"{path.stem}.input.npy")
    np.save(folder / f"{path.stem}.output.npy", session.run(None, {"input": x})[0])
print(json.dumps(onnxruntime.__version__))
"""
BOUNDS = {"half": 5e-3, "int8": 0.15}


@pytest.fixture(scope="module")
def folder(workdir, faces, tmp_path_factory) -> Path:
    """Files, what each is given, and what JAX gives."""
    folder = tmp_path_factory.mktemp("files")
    tiny = open_network(ModelChoice(workdir=workdir))
    vit = Network("vit_t", *parity.settled("vit_t", faces), batch_size=16, devices=1)
    exports = {
        "default": (tiny, {}),
        "opset13": (tiny, {"form": Form(opset=13)}),
        "pixels": (tiny, {"form": Form(input="uint8-nhwc")}),
        "half": (tiny, {"precision": "float16"}),
        "int8": (tiny, {"precision": "int8", "calibration": faces}),
        "vit": (vit, {}),
        "vit13": (vit, {"form": Form(opset=13)}),
    }
    for name, (model, options) in exports.items():
        to_onnx.export(model, folder / f"{name}.onnx", **options)
        x = faces[:3]
        if name != "pixels":
            x = ((x.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)
        np.save(folder / f"{name}.input.npy", x)
        np.save(folder / f"{name}.jax.npy", model(faces[:3]))
    return folder


@pytest.mark.parametrize("version", [OLDEST, "1.20.1", "newest"])
def test_every_runtime_gives_jaxs_embeddings(folder, tmp_path, version):
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    wanted = ["onnxruntime"] if version == "newest" else [f"onnxruntime=={version}", "numpy<2"]
    pip = [python, "-m", "pip", "install", "-q", "--only-binary", ":all:", *wanted]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"ONNX Runtime {version} cannot be installed: {installed.stderr[-300:]}")
    ran = subprocess.run([python, "-c", RUN, folder], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert version in ("newest", json.loads(ran.stdout))
    for path in sorted(folder.glob("*.onnx")):
        out, jax = (np.load(folder / f"{path.stem}.{kind}.npy") for kind in ("output", "jax"))
        error = parity.largest_error(out, jax)
        print(f"{json.loads(ran.stdout)} {path.stem} {error:.1e}")
        assert error < BOUNDS.get(path.stem, 1e-5)
