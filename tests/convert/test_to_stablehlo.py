"""StableHLO files: run by another process, at any batch, without this project."""

import subprocess
import sys

import numpy as np
import pytest

from arcface_jax.commands import export
from arcface_jax.convert import parity, to_stablehlo
from arcface_jax.errors import UserError
from arcface_jax.inference.open_model import ModelChoice, open_network

CALLER = """
import sys
from pathlib import Path
import jax.export
import numpy as np

program = jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
assert program.platforms == ("cpu", "cuda"), program.platforms
faces = np.load("faces.npy")
np.savez("out.npz", *[np.asarray(program.call(faces[:n])) for n in (1, 3, 5)])
assert "arcface_jax" not in sys.modules
"""


def test_another_process_gets_the_same_embeddings(workdir, faces, tmp_path, capsys):
    np.save(tmp_path / "faces.npy", faces)
    output = tmp_path / "model.stablehlo"
    export.stablehlo(["--checkpoint", str(workdir), "--output", str(output)])
    assert capsys.readouterr().out.splitlines()[-1].startswith('RESULT {"parity": ')
    subprocess.run([sys.executable, "-c", CALLER], cwd=tmp_path, check=True)
    reference = open_network(ModelChoice(workdir=workdir))(faces)
    outs = np.load(tmp_path / "out.npz")
    for name, count in zip(outs.files, (1, 3, 5), strict=True):
        assert outs[name].shape == (count, 512)
        assert parity.largest_error(outs[name], reference[:count]) < 1e-5


def test_what_does_not_fit_the_format_is_refused(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(to_stablehlo, "_LARGEST_FILE", 20_000_000)
    with pytest.raises(UserError, match="arcface-jax export onnx"):
        to_stablehlo.export(
            open_network(ModelChoice(workdir=workdir)), tmp_path / "model.stablehlo"
        )
    assert not list(tmp_path.iterdir())
