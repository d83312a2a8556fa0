"""One run through the real command: run.txt, metrics.csv, the profile; W&B; hosts compared."""

import csv
import gzip
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import HANG, ROOT, run_process

from arcface_jax.errors import ConfigError
from arcface_jax.runtime import metrics, profiling
from arcface_jax.runtime.metrics import MetricsFile
from arcface_jax.training import diagnostics, manifest, saved_runs

RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(identities=5, images_per_identity=8),
        ),
        model=c.ModelConfig(
            network="tests.support.small_network:make",
            dtype="float32",
            embedding_size=32,
            bn_batch_size=8,
        ),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(epochs=1),
        optimizer=c.OptimizerConfig(ema=0.5),
        logging=c.LoggingConfig(every_steps=1, csv=True, profile_steps=(3, 4)),
    )
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """The workdir of a finished run, and what it said on stderr."""
    folder = tmp_path_factory.mktemp("writes")
    (folder / "tiny.py").write_text(RECIPE)
    words = [str(folder / "tiny.py"), "--devices", "1", "--workdir", str(folder / "run")]
    done = run_process(["scripts/train.py", *words])
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


def test_the_header_marks_what_differs_and_counts_parameters(run):
    workdir, said = run
    text = (workdir / "run.txt").read_text()
    assert "  * data.global_batch_size = 8   (default 128)" in text
    assert "\n    seed = 0\n" in text
    assert "\n  head.block_size = 2048 (chosen for cpu)\n" in text
    assert "\n  head.block_form = 'unit' (chosen for cpu)\n" in text
    assert "  jax " in text and "process 0" in text
    _, params, batch_stats, _ = saved_runs.restore_backbone(workdir)
    count = sum(np.size(array) for array in params.values())
    assert f"  total: {count:,} in {len(params)} arrays" in text
    assert f"{count:,} parameters" in said and str(workdir / "run.txt") in said
    for name, array in params.items():
        shape = " x ".join(map(str, np.shape(array)))
        assert re.search(rf"{re.escape(name)} +{shape} +{np.size(array):,}\n", text)
    stages = re.findall(r"^  (\w+): ([\d,]+) in \d+ arrays$", text, re.MULTILINE)
    assert stages[-1][0] == "total"
    assert sum(int(n.replace(",", "")) for _, n in stages[:-1]) == count
    mean = 4 * (count + sum(np.size(array) for array in batch_stats.values()))
    assert re.search(rf"running_mean +{mean / 2**20:.2f} MiB", text)


def test_the_csv_says_what_the_jsonl_says(run):
    workdir, _ = run
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    with (workdir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items() if v} for row in rows] == lines
    timed = [line for line in lines if "perf/host_ms" in line]
    assert [line["step"] for line in timed] == [2, 3, 4, 5]  # the first was compiled
    for line in timed:
        assert 0 < line["perf/slowest_host_ms"] == line["perf/host_ms"]


def test_the_profile_is_there_and_says_how_to_open_it(run):
    workdir, said = run
    (path,) = (workdir / "profile").rglob("perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert f"profile of steps 3 to 4 in {workdir}/profile" in said and "perfetto.dev" in said


def test_a_resumed_csv_forgets_what_was_undone(tmp_path):
    for start, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        file = MetricsFile(tmp_path, start=start, tensorboard=False, csv=True)
        for number in steps:
            file.write(number, {"train/loss": start + 0.5})
        file.write(steps[-1], {"eval/x/accuracy": 1.0})
        file.close()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["step", "train/loss", "eval/x/accuracy"],
        *[["10", "0.5", ""], ["20", "0.5", ""], ["30", "20.5", ""], ["40", "20.5", ""]],
        ["40", "", "1.0"],
    ]


def test_wandb_keeps_one_run_for_a_workdir(tmp_path):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("the package wandb is not installed")
    code = (
        "import sys, pathlib; from arcface_jax.runtime.metrics import MetricsFile\n"
        "f = MetricsFile(pathlib.Path(sys.argv[1]), start=0, tensorboard=False, wandb='faces',"
        " settings={'seed': 3})\n"
        "f.write(1, {'train/loss': 0.5}); f.close()"
    )
    for _ in range(2):
        done = run_process(
            ["-c", code, str(tmp_path)],
            cwd=tmp_path,
            env=os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stderr
    known = (tmp_path / "wandb_id").read_text()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(known) for folder in folders)
    (kept, *_) = (path for folder in folders for path in folder.glob("*.wandb"))
    assert b"train/loss" in kept.read_bytes()


def test_wandb_that_is_not_installed_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'arcface-jax\[wandb\]'"):
        metrics.Wandb(tmp_path, project="faces", settings={})


def test_one_host_that_is_busy_longer_is_named():
    values, words = diagnostics.compare_hosts(np.array([10.0, 12.0, 60.0, 11.0]))
    assert values == {"perf/slowest_host_ms": 60.0, "perf/slowest_host": 2}
    assert (
        words is not None and "host 2/4" in words and "60 ms/step" in words and "vs. 11 ms" in words
    )
    assert diagnostics.compare_hosts(np.array([10.0, 12.0]))[1] is None  # 2 ms are not worth a word
    assert diagnostics.compare_hosts(np.array([1000.0, 1010.0]))[1] is None


HOST = """
import json, sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
from arcface_jax.training import diagnostics
print(json.dumps(diagnostics.slowest_host(float(sys.argv[3]))))
"""


def test_two_processes_agree_which_is_slower():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, port, str(number), own],
            **{"cwd": ROOT, "stdout": subprocess.PIPE, "text": True},
        )
        for number, own in enumerate(("80", "20"))
    ]
    said = [json.loads(host.communicate(timeout=HANG)[0].splitlines()[-1]) for host in hosts]
    assert said[0] == said[1]
    assert said[0][0] == {"perf/slowest_host_ms": 80.0, "perf/slowest_host": 0}
    assert "host 0/2" in said[0][1]


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_the_commit_is_that_of_a_repository_that_tracks_the_code(tmp_path, monkeypatch):
    """Not of the user's own, in which the virtual environment lies."""
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "theirs")
    code = tmp_path / "lib" / "manifest.py"
    code.parent.mkdir()
    code.write_text("")
    monkeypatch.setattr(manifest, "__file__", str(code))
    assert manifest._checkout() is None
    git(tmp_path, "add", "lib")
    git(tmp_path, "commit", "-m", "ours")
    code.write_text("changed")
    found = manifest._checkout()
    assert found is not None and len(found["commit"]) == 40
    assert found["changed"] == [" M lib/manifest.py"]


def test_deep_nesting_in_a_workdir_is_damage(tmp_path):
    deep = b"[" * 100_000
    (tmp_path / "environment.json").write_bytes(deep)
    assert manifest._earlier_starts(tmp_path / "environment.json") is None
    line = b'{"step": 1, "train/loss": null}\n'
    ((found,), length) = metrics.whole_lines(line + deep + b"\n")
    assert found["step"] == 1 and np.isnan(found["train/loss"]) and length == len(line)


def test_each_process_has_its_own_folder_of_the_profile(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path, **_: folders.append(path))
    for number in range(2):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        profiling.Trace(tmp_path, (1, 1)).before(1)
    assert folders == [tmp_path / "profile", tmp_path / "profile" / "process_1"]
