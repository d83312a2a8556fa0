"""The fuzzer runs, and no reader crashes under it, nor is a crash passed over."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install atheris"
    ),
]


def fuzz(corpus: Path, *options: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command; `fault` is code that runs in its processes before anything else."""
    (corpus / "site").mkdir()
    (corpus / "site" / "sitecustomize.py").write_text(fault)
    path = os.pathsep.join([str(corpus / "site"), *filter(None, sys.path)])
    command = [sys.executable, "tests/fuzz/readers.py", "--corpus", str(corpus), *options]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_no_input_crashes_a_reader(tmp_path: Path):
    done = fuzz(tmp_path, "--seconds", "20")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    for reader in ("recordio", "bin", "pairs"):
        assert result[f"{reader}/runs"] > 100
        assert result[f"{reader}/branches"] > 50  # the seeds reach the middle of the readers


FAULT = """
import numpy
def loadtxt(*_, **__):
    raise IndexError("not a declared error")
numpy.loadtxt = loadtxt
"""


def test_an_error_that_is_not_declared_is_a_crash(tmp_path: Path):
    done = fuzz(tmp_path, "--seconds", "3", "--readers", "recordio", fault=FAULT)
    assert done.returncode == 1
    assert "not a declared error" in done.stderr and "recordio crashed" in done.stderr
    (crash, *_) = (tmp_path / "recordio").glob("crash-*")
    again = ["--readers", "recordio", "--replay", str(crash)]
    (tmp_path / "replay").mkdir()
    done = fuzz(tmp_path / "replay", *again, fault=FAULT)
    assert "IndexError: not a declared error" in done.stderr
