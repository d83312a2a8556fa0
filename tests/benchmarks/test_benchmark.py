"""The benchmark runs as a user would start it, and its methods compute the same thing."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import script

from arcface_jax.errors import ConfigError
from arcface_jax.machine import timing
from arcface_jax.runtime import devices as meshes
from benchmarks import head
from benchmarks.head import Case

ROOT = Path(__file__).parents[2]


def benchmark(*options: str) -> None:
    script("benchmark").app.cli(args=[*options])


@pytest.mark.slow
def test_it_writes_a_table_a_file_and_a_plot(tmp_path, capsys):
    options = ["--classes", "300", "--batches", "16", "--devices", "1", "2", "--repeats", "2"]
    benchmark("head", *options, "--size", "32", "--output", str(tmp_path))
    printed = capsys.readouterr().out
    outcome = json.loads(printed.splitlines()[-1].removeprefix("RESULT "))
    assert all(method in printed for method in head.METHODS)
    assert outcome["matrix_product_gflops"] > 0
    rows = outcome["measurements"]
    assert len(rows) == 2 * len(head.METHODS) and all(row["seconds"] > 0 for row in rows)
    for row in rows:
        same = [other for other in rows if other["devices"] == row["devices"]]
        dense = min(other["seconds"] for other in same if other["method"] in head.DENSE)
        assert row["time_ratio"] == pytest.approx(row["seconds"] / dense)
    stored = json.loads((tmp_path / "head.json").read_text())
    assert stored["measurements"] == rows and stored["machine"]["jax"] == jax.__version__
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_all_methods_over_all_classes_take_the_same_step(devices):
    case = Case(classes=101, batch=16, devices=devices, size=16, block_size=8)
    mesh = meshes.make(devices)
    split, everywhere = meshes.split(mesh), meshes.replicated(mesh)
    rng = np.random.default_rng(0)
    stored = -(-101 // devices) * devices
    embeddings, rows, momentum = (
        rng.normal(size=(n, 16)).astype(np.float32) for n in (16, stored, stored)
    )
    labels = rng.integers(0, 101, 16).astype(np.int32)
    outcomes = []
    for name in ("data parallel", "model parallel", "blocked"):
        centers = everywhere if name == "data parallel" else split
        batch = jax.device_put((embeddings, labels), split)
        state = jax.device_put((rows, {"momentum": momentum}), centers)
        step = jax.device_put(jnp.int32(0), everywhere)
        compiled = head.compile_method(name, case)
        outcome = jax.tree.leaves(compiled.run(*batch, *state, step))
        outcomes.append([np.asarray(a) for a in outcome])
    for outcome in outcomes[1:]:
        for number, (ours, theirs) in enumerate(zip(outcome, outcomes[0], strict=True)):
            ours, theirs = (a[:101] if number > 1 else a for a in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_a_case_that_does_not_fit_is_compiled_and_not_run(monkeypatch):
    monkeypatch.setattr(timing, "free_memory", lambda: 1000)
    case = Case(classes=300, batch=16, devices=1, size=32)
    (row,) = head.measure(case, methods=("blocked",), repeats=1)
    assert row.seconds is None and row.temporary_bytes > 0


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ConfigError, match=r"unknown method 'dens'.*blocked"):
        head.check(("dens",), (16,), (1,))
    with pytest.raises(ConfigError, match=r"batch 16 .* 3 devices"):
        head.check(head.METHODS, (16,), (3,))


def test_a_folder_that_is_no_checkout_is_named(tmp_path, capsys):
    options = ["--classes", "30", "--batches", "8", "--repeats", "1", "--methods", "blocked"]
    with pytest.raises(SystemExit) as stop:
        benchmark("head", *options, "--reference", str(tmp_path), "--output", str(tmp_path / "out"))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "partial_fc_v2.py" in message and str(tmp_path) in message


@pytest.mark.slow
def test_blocks_are_timed_in_every_form(capsys):
    benchmark("blocks", "--batch", "1", "--count", "2", "--repeats", "1")
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert outcome["unrolled"]["ratio"] == 1
    for method in ("scanned", "rematerialized"):
        row = outcome[method]
        assert row["ratio"] == pytest.approx(row["seconds"] / outcome["unrolled"]["seconds"])


def test_the_arithmetic_of_evaluation_is_timed_part_by_part(tmp_path, capsys):
    options = ["--pairs", "40", "--scores", "2000", "--embedding-size", "8", "--repeats", "1"]
    benchmark("evaluation", *options, "--output", str(tmp_path))
    printed = capsys.readouterr().out
    outcome = json.loads(printed.splitlines()[-1].removeprefix("RESULT "))
    measured = outcome["measured"]
    for part in ("ten folds, 40", "flip sum", "TAR at 6 FARs, 2,000", "whole exact ROC curve"):
        assert sum(what.startswith(part) for what in measured) == 1
    assert min(measured.values()) > 0
    assert json.loads(Path(outcome["files"][0]).read_text())["seconds"] == measured


def test_the_command_needs_no_torch():
    """Machines with GPUs may lack it, and ONNX too; only what compares with them needs them."""
    lacking = ("torch", "onnx", "onnxruntime", "onnxscript")
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking})); import benchmarks.__main__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=600)
