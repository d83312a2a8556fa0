"""States and checkpoints that do not fit into memory are refused before they are allocated."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import ROOT, run_process, script

from arcface_jax import config as c
from arcface_jax.errors import CheckpointError, ConfigError
from arcface_jax.models import registry
from arcface_jax.runtime import devices as meshes
from arcface_jax.runtime import memory
from arcface_jax.training import checkpoint, room, saved_runs, step

GIB = 2**30
TINY = c.replace(
    c.Config(),
    model__network="r_tiny",
    model__embedding_size=64,
    model__bn_batch_size=8,
    data__global_batch_size=8,
)


def requirement(classes: int, *, devices: int) -> Callable[[], None]:
    """The check for a state of so many classes."""
    mesh = meshes.make(devices)
    abstract = step.abstract_state(TINY, num_classes=classes, mesh=mesh)
    program = step.compile_init(TINY, num_classes=classes, mesh=mesh)
    return partial(room.require, abstract, program, mesh=mesh)


def test_the_bytes_of_all_cpu_devices_count_against_the_host(monkeypatch):
    classes = 2**22  # 1 GiB of centers, as much momentum, and what drawing them takes
    require = requirement(classes, devices=2)
    monkeypatch.setattr(memory, "free_on_host", lambda: 2 * GIB)
    with pytest.raises(ConfigError) as error:
        require()
    text = str(error.value)
    assert "\n" not in text
    assert "on the host" in text and "class centers 1.0, their optimizer 1.0" in text
    assert "2.0 GiB are free" in text and "arcface-jax plan" in text
    monkeypatch.setattr(memory, "free_on_host", lambda: 16 * GIB)
    require()


def test_of_several_processes_the_one_with_least_memory_stops_all(monkeypatch):
    require = requirement(100, devices=1)
    answers = np.array([[100, 200], [100, 60], [100, 90]])
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(room.multihost_utils, "process_allgather", lambda mine: answers)
    monkeypatch.setattr(memory, "free_on_host", lambda: 200 * GIB)  # this process has enough
    with pytest.raises(ConfigError, match=r"needs 0\.1 GiB .* 0\.1 GiB are free in process 1"):
        require()


def test_a_failed_allocation_is_one_line():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nX")
    matching = pytest.raises(ConfigError, match="Out of memory allocating 9 bytes")
    with matching as raised, room.reporting_exhaustion():
        raise error
    assert "\n" not in str(raised.value)
    with pytest.raises(jax.errors.JaxRuntimeError), room.reporting_exhaustion():
        raise jax.errors.JaxRuntimeError("INTERNAL: another error")


def test_a_checkpoint_that_does_not_fit_is_not_read(tmp_path, monkeypatch):
    params, batch_stats = registry.build("r_tiny", embedding_size=64).init(0)
    run = c.replace(TINY, workdir=str(tmp_path / "run"))
    checkpoint.save_weights(run, params, batch_stats)
    monkeypatch.setattr(memory, "free_on_host", lambda: 2**20)
    with pytest.raises(CheckpointError, match=r"reading .*run needs .* GiB, and 0\.0 GiB are free"):
        saved_runs.restore_backbone(tmp_path / "run")


def noise_classes() -> int:
    """So many classes that their centers take ten times this machine's memory."""
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return 10 * total // (4 * 512)


def words(workdir: Path) -> list[str]:
    recipe = str(ROOT / "configs" / "demo.py")
    data = ["--data.path", "noise", "--data.noise.classes", str(noise_classes())]
    options = ["--model.embedding-size", "512", "--devices", "1"]
    return [recipe, *data, *options, "--evaluation.targets", "--workdir", str(workdir)]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs the size of the memory")
def test_the_command_refuses_ten_times_this_machines_memory(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        script("train").main(words(tmp_path / "run"))
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the training state needs") and "on the host" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs the size of the memory")
def test_so_does_a_process_of_its_own(tmp_path):
    done = run_process(["scripts/train.py", *words(tmp_path / "run")])
    assert done.returncode == 2 and done.stderr.startswith("error: the training state needs")
