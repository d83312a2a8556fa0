"""Every notebook runs top to bottom, and what is stored of it is whole and small."""

from pathlib import Path

import nbformat
import pytest

from arcface_jax import config as c
from arcface_jax.train import train
from scripts import notebooks

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> Path:
    """A run as the demo's, too short to be any good."""
    folder = tmp_path_factory.mktemp("notebooks") / "run"
    drawn = c.SyntheticConfig(identities=24, images_per_identity=12, pairs=200)
    train(
        c.Config(
            workdir=str(folder),
            devices=1,
            data=c.DataConfig(path="synthetic", global_batch_size=48, synthetic=drawn),
            model=c.ModelConfig(network="r_tiny", dtype="float32", bn_batch_size=48),
            head=c.HeadConfig(loss="arcface", margin=0.4, scale=32.0, dtype="float32"),
            optimizer=c.OptimizerConfig(kind="adamw", learning_rate=1e-3),
            schedule=c.ScheduleConfig(epochs=1),
            evaluation=c.EvaluationConfig(targets=("synthetic",)),
            logging=c.LoggingConfig(tensorboard=False),
        )
    )
    return folder


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow, id=path.stem) for path in NOTEBOOKS],
)
def test_it_runs_top_to_bottom(path: Path, workdir: Path, monkeypatch):
    monkeypatch.setenv("ARCFACE_JAX_WORKDIR", str(workdir))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if "import onnxruntime" in path.read_text():
        pytest.importorskip("onnxruntime")
    notebooks.execute(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_whole_and_small(path: Path):
    """In the order of its cells, without errors or warnings, with figures, and of no machine."""
    text = path.read_text()
    assert len(text) < 500_000
    assert not any(word in text for word in ("/root/", "/tmp/", "/work/", "/home/"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert "ARCFACE_JAX_WORKDIR" in text
