"""The wheel: what is inside, and that it works without the checkout."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a package is called where it is declared, if not by the name that is imported.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in this environment, where a warning is an error."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-W", "error", "-m", "hatchling", "build", "-t", "wheel"]
    done = subprocess.run([*command, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stdout + done.stderr).lower()
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_the_package_with_recipes_and_notebooks_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"arcface_jax", info}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "arcface_jax").rglob("*.py")}
    for kind in ("*.typed", "*.txtpb"):
        expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "arcface_jax").rglob(kind)}
    for folder, kind in (("configs", "*.py"), ("notebooks", "*.ipynb")):
        expected |= {f"arcface_jax/{folder}/{path.name}" for path in (ROOT / folder).glob(kind)}
    inside = {name for name in names if name.startswith("arcface_jax/")}
    assert expected <= inside
    suffixes = {".py", ".typed", ".ipynb", ".html", ".css", ".js", ".txtpb"}
    assert {Path(name).suffix for name in inside} <= suffixes
    assert not [name for name in inside if "__pycache__" in name or "test" in Path(name).parts]


def test_its_metadata_names_authors_and_no_address(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
    fields = archive.read(name).decode().partition("\n\n")[0]
    assert "Author: arcface_jax authors" in fields
    assert "Classifier: Programming Language :: Python :: 3.13" in fields
    assert "Project-URL" not in fields and "Home-page" not in fields
    (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "arcface-jax = arcface_jax.cli:main" in archive.read(name).decode()


def imported() -> Iterator[tuple[str, str]]:
    """The packages that the library imports, each with a file that does."""
    for path in (ROOT / "arcface_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], path.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0], path.name


def test_every_imported_package_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in optional.values() for line in extra)]
    declared = {re.split(r"[\s<>=\[;]", line)[0].lower() for line in lines}
    ours = {"arcface_jax", *sys.stdlib_module_names}
    missing = {
        (DISTRIBUTIONS.get(name, name), file) for name, file in imported() if name not in ours
    }
    assert sorted((name, file) for name, file in missing if name.lower() not in declared) == []


@pytest.mark.slow
def test_it_works_from_an_empty_folder(wheel: Path, tmp_path: Path):
    """Trains, verifies, exports and embeds in an environment that has never seen the checkout."""
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    venv.create(environment, with_pip=True)
    (site,) = environment.glob("lib/python*/site-packages")
    # The packages of this environment, but not its link to the checkout: .pth files in a folder
    # that another .pth file names are not read.
    (site / "packages.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall"]
    subprocess.run([*install, "--ignore-installed", wheel], check=True, capture_output=True)
    empty.mkdir()
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def arcface_jax(*words: str) -> dict:
        done = subprocess.run(
            [environment / "bin" / "arcface-jax", *words],
            **{"cwd": empty, "env": variables, "capture_output": True, "text": True},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))

    where = "import arcface_jax; print(arcface_jax.__file__)"
    found = subprocess.run([python, "-c", where], cwd=empty, capture_output=True, text=True)
    assert found.stdout.startswith(str(site))

    short = ["--data.synthetic.identities", "12", "--data.synthetic.images-per-identity", "12"]
    short += ["--data.synthetic.pairs", "40", "--data.global-batch-size", "16"]
    short += ["--data.synthetic.pair-identities", "8", "--model.bn-batch-size", "16"]
    short += ["--devices", "1"]
    demo = arcface_jax("demo", *short)
    assert {"eval/synthetic/accuracy", "baseline/raw", "baseline/untrained"} <= demo.keys()
    arcface_jax("recipes", "demo", "--copy", "mine.py")
    trained = arcface_jax("train", "mine.py", *short, "--workdir", "w", "--seed", "1")
    assert trained["step"] == demo["step"] == 9 and "w/backbone.pth" in trained["files"]
    evaluated = arcface_jax("evaluate", "--checkpoint", "w")
    assert evaluated["eval/synthetic/accuracy"] == trained["eval/synthetic/accuracy"]
    assert arcface_jax("export", "torch", "--checkpoint", "w", "--output", "b.pth")["parity"] < 1e-4
    assert arcface_jax("export", "onnx", "--checkpoint", "w", "--output", "m.onnx")["parity"] < 1e-4
    embedded = arcface_jax("embed", "--onnx", "m.onnx", "--output", "noise.npy")
    assert embedded["shape"] == [1, 512] and embedded["files"] == ["noise.npy"]
    arcface_jax("notebooks", "--copy", "notebooks")
    made = {"b.pth", "m.onnx", "mine.py", "noise.npy", "notebooks", "runs", "w"}
    assert {path.name for path in empty.iterdir()} == made
