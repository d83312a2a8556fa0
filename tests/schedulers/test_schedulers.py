"""Two processes under a real Slurm and Open MPI, by the files that the documentation shows."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import HANG, ROOT

from arcface_jax import config as configs
from arcface_jax.config import loading
from arcface_jax.training import validation

SCHEDULERS = ROOT / "docs" / "schedulers"
WITH_SLURM = Path(__file__).parent / "with_slurm.sh"

needs_slurm = pytest.mark.skipif(
    os.getuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "unshare"))),
    reason="needs root and Slurm (apt-get install slurm-wlm munge)",
)
needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="needs Open MPI (apt-get install openmpi-bin)"
)

# Submits the run, lets a job of the partition `high` preempt it, and waits until it is complete.
PREEMPTED = """
set -eu
job=$(sbatch --parsable --output "$1/log" docs/schedulers/train.sbatch "${@:2}" --workdir "$1/run")
until [ "$(cat "$1/run/metrics.jsonl" 2> /dev/null | wc -l)" -gt 5 ]; do
    squeue --noheader --states RUNNING,PENDING,CONFIGURING --jobs $job | grep -q . || exit 3
    sleep 0.2
done
sbatch --partition high --nodes 2 --exclusive --output "$1/high" --wait --wrap hostname
while squeue --noheader --jobs $job | grep -q .; do sleep 0.2; done
scontrol show job $job
"""


def losses(workdir: Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def run(*command: str | Path, devices: int) -> str:
    """What a command prints, with so many CPU devices for each process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def one_process(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process with two devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    run(sys.executable, "scripts/train.py", tiny_recipe, "--workdir", workdir, devices=2)
    return losses(workdir)


def check_two_processes(workdir: Path, output: str, expected: list[float]) -> None:
    assert output.count("RESULT {") == 1
    assert losses(workdir)[0] == pytest.approx(expected[0], abs=1e-5)
    (session,) = json.loads((workdir / "environment.json").read_text())
    assert session["processes"] == 2 and len(session["devices"]) == 2
    print("first losses", losses(workdir)[0], expected[0])


@pytest.mark.slow
@needs_slurm
def test_srun_starts_two_processes_of_one_run(tmp_path: Path, tiny_recipe: Path, one_process):
    train = [sys.executable, "scripts/train.py", tiny_recipe, "--workdir", tmp_path / "run"]
    output = run(WITH_SLURM, tmp_path / "slurm", "srun", "-N2", "-n2", *train, devices=1)
    check_two_processes(tmp_path / "run", output, one_process)


@pytest.mark.slow
@needs_slurm
def test_a_preempted_job_saves_is_requeued_and_resumes(tmp_path: Path, tiny_recipe: Path):
    (tmp_path / "script").write_text(PREEMPTED)
    every = ["--evaluation.every-epochs", "0", "--checkpoint.every-epochs", "100"]
    options = [tiny_recipe, "--schedule.epochs", "60", *every]
    job = run(
        WITH_SLURM,
        tmp_path / "slurm",
        "bash",
        tmp_path / "script",
        tmp_path,
        *options,
        devices=1,
    )
    assert "JobState=COMPLETED" in job and "Restarts=1" in job and "ExitCode=0:0" in job
    log = (tmp_path / "log").read_text()
    stopped = re.search(r"stopped by SIGTERM at step (\d+)", log)
    assert stopped and f"resuming at step {stopped[1]}" in log
    assert (tmp_path / "high").read_text().strip() == "node1"
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, 181)) and 0 < int(stopped[1]) < 180
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 2
    print("stopped at step", stopped[1], "of 180")


@pytest.mark.slow
@needs_mpirun
def test_mpirun_starts_two_processes_of_one_run(tmp_path: Path, tiny_recipe: Path, one_process):
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    train = [SCHEDULERS / "mpirun.sh", tmp_path / "hosts", tiny_recipe]
    words = ["env", *(f"{k}={v}" for k, v in root.items()), *train, "--workdir", tmp_path / "run"]
    output = run(*words, devices=1)
    check_two_processes(tmp_path / "run", output, one_process)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize(
    ("name", "language"),
    [("train.sbatch", "bash"), ("mpirun.sh", "bash"), ("kubernetes.yaml", "yaml")],
)
def test_the_documentation_shows_the_tested_files(name: str, language: str):
    text = (ROOT / "docs" / "multi_host.md").read_text()
    assert (SCHEDULERS / name).read_text() in blocks(text, language)


@pytest.mark.parametrize(
    ("name", "devices"), [("train.sbatch", 2 * 8), ("mpirun.sh", 2 * 8), ("kubernetes.yaml", 4 * 8)]
)
def test_the_recipe_shown_runs_on_the_devices_shown(name: str, devices: int):
    text = (SCHEDULERS / name).read_text()
    counts = [int(n) for n in re.findall(r"(?:--nodes=|per-node=|completions: |gpu: )(\d+)", text)]
    assert not counts or math.prod(counts) == devices
    (recipe,) = re.findall(r"configs/(\w+)\.py", text)
    config = configs.replace(loading.read_recipe(recipe), workdir="run")
    validation.validate(config, num_devices=devices)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("jsonschema", "yaml"))), reason="jsonschema, PyYAML"
)
def test_the_kubernetes_manifest_fits_the_api():
    import jsonschema
    import yaml

    schemas = json.loads((Path(__file__).parent / "kubernetes.schema.json").read_text())
    documents = list(yaml.safe_load_all((SCHEDULERS / "kubernetes.yaml").read_text()))
    kinds = [document["kind"] for document in documents]
    assert kinds == ["Service", "ServiceAccount", "Role", "RoleBinding", "Job"]
    for document in documents:
        schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": schemas["$defs"]}
        jsonschema.validate(document, schema)
    job = documents[-1]["spec"]
    wrong = {**documents[-1], "spec": {**job, "paralelism": 4}}
    with pytest.raises(jsonschema.ValidationError, match="paralelism"):
        jsonschema.validate(wrong, schema)
    # What JAX needs to find the pods of an indexed job.
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    assert job["template"]["spec"]["subdomain"] == documents[0]["metadata"]["name"]
