"""One run in several processes, which meet on this machine's loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import HANG, ROOT, wait_until

from arcface_jax.config import DistributedConfig
from arcface_jax.errors import CheckpointError, ConfigError, DataError, UserError
from arcface_jax.runtime import launch

# Calm enough that another order of sums stays a rounding error for ten steps.
RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=24,
            synthetic=c.SyntheticConfig(
                identities=12, images_per_identity=10, pairs=20, pair_identities=4
            ),
        ),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32, bn_batch_size=6),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        optimizer=c.OptimizerConfig(learning_rate=0.005),
        schedule=c.ScheduleConfig(epochs=2),
        evaluation=c.EvaluationConfig(targets=("synthetic",), batch_size=24, every_epochs=0),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
"""


def start(workdir: Path, *more: str, processes: int, devices: int) -> list[subprocess.Popen]:
    """scripts/train.py in so many processes, of so many devices each."""
    recipe = workdir.parent / "recipe.py"
    recipe.write_text(RECIPE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "scripts/train.py", str(recipe), "--workdir", str(workdir), *more]
    several = ["--distributed.coordinator", coordinator, "--distributed.num-processes"]
    several = [*several, str(processes), "--distributed.process-id"]
    return [
        subprocess.Popen(
            [*command, *([*several, str(number)] if processes > 1 else [])],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(processes)
    ]


def finish(processes: list[subprocess.Popen], *, code: int = 0) -> list[str]:
    """Their outputs, when all have ended as they should."""
    try:
        texts = [process.communicate(timeout=HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, texts, strict=True):
        assert process.returncode == code, stderr[-3000:]
    return [stdout for stdout, _ in texts]


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def check_equal_to_one_process(folder: Path, *, processes: int, devices: int) -> None:
    texts = finish(start(folder / "many", processes=processes, devices=devices))
    finish(start(folder / "one", processes=1, devices=processes * devices))
    assert texts[0].splitlines()[-1].startswith("RESULT ")
    assert not any("RESULT" in text for text in texts[1:])
    many, one = losses(folder / "many"), losses(folder / "one")
    assert len(many) == len(one) == 10
    assert many[0] == pytest.approx(one[0], abs=1e-5)
    assert many == pytest.approx(one, abs=1e-3)
    assert len(json.loads((folder / "many" / "environment.json").read_text())) == 1
    assert (folder / "many" / "backbone.pth").exists()


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    check_equal_to_one_process(tmp_path, processes=2, devices=2)


@pytest.mark.slow
def test_four_processes_are_one_run(tmp_path):
    check_equal_to_one_process(tmp_path, processes=4, devices=1)


OWN_SOURCE = """
import jax
from arcface_jax.data.synthetic.source import SyntheticSource

def open_it(argument, data, *, seed):
    return SyntheticSource(seed=jax.process_index(), identities=12, images_per_identity=10)
"""


@pytest.mark.slow
def test_processes_that_read_other_data_are_named(tmp_path, monkeypatch):
    (tmp_path / "own_source.py").write_text(OWN_SOURCE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    path = ("--data.path", "own_source:open_it")
    running = start(tmp_path / "run", *path, processes=2, devices=2)
    texts = [process.communicate(timeout=HANG)[1] for process in running]
    assert "is not the same data in all processes" in texts[0]
    assert "seed: 0 in process 0" in texts[0] and "and 1 in process 1" in texts[0]
    assert [process.returncode for process in running] == [2, 2]


def stop(
    processes: list[subprocess.Popen], workdir: Path, *, behind: int, signals: tuple[int, ...]
) -> int:
    """SIGTERM to some of them, once the run is behind a step; how many steps it did in all."""
    history = workdir / "metrics.jsonl"
    wait_until(lambda: history.exists() and len(losses(workdir)) > behind, processes[0])
    for number in signals:
        processes[number].send_signal(signal.SIGTERM)
    finish(processes, code=85)
    return len(losses(workdir))


@pytest.mark.slow
def test_a_run_moves_between_numbers_of_processes(tmp_path):
    """One process of 4 devices, two of 2 each, one of 2; SIGTERM to one of two stops both."""
    # JAX looks for the signal once a second only: enough steps that some are left by then.
    epochs = ("--schedule.epochs", "6", "--checkpoint.requeue-exit-code", "85")
    finish(start(tmp_path / "undisturbed", *epochs, processes=1, devices=4))
    workdir = tmp_path / "moved"
    processes = start(workdir, *epochs, processes=1, devices=4)
    first = stop(processes, workdir, behind=0, signals=(0,))
    processes = start(workdir, *epochs, processes=2, devices=2)
    second = stop(processes, workdir, behind=first, signals=(1,))
    assert 0 < first < second < 30
    finish(start(workdir, *epochs, processes=1, devices=2))
    moved, undisturbed = losses(workdir), losses(tmp_path / "undisturbed")
    assert len(moved) == len(undisturbed) == 30
    print(first, second, "differences", [a - b for a, b in zip(moved, undisturbed, strict=True)])
    for number in (0, first, second):
        assert moved[number] == pytest.approx(undisturbed[number], abs=1e-3)
    assert moved[:10] == pytest.approx(undisturbed[:10], abs=1e-3)
    sessions = json.loads((workdir / "environment.json").read_text())
    assert [session["processes"] for session in sessions] == [1, 2, 1]


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (OPEN_MPI, "ompi"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({}, None),
    ],
)
def test_launchers_are_recognized(environment, cluster):
    assert launch.find_cluster(environment) == cluster


@pytest.mark.parametrize(
    ("cluster", "environment", "devices"),
    [
        ("slurm", {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, []),  # all of the host
        ("slurm", {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}, None),  # JAX gives one each
        ("ompi", {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ("ompi", {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, None),
        (None, {}, []),
    ],
)
def test_a_process_takes_its_hosts_devices_or_one(cluster, environment, devices):
    assert launch.local_devices(DistributedConfig(), cluster, environment) == devices
    chosen = DistributedConfig(local_devices=(1, 3))
    assert launch.local_devices(chosen, cluster, environment) == [1, 3]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistributedConfig(coordinator="a:1"), "must be set together, got 'a:1', None and None"),
        (DistributedConfig(num_processes=2), "must be set together"),
        (DistributedConfig(process_id=0), "must be set together"),
        (
            DistributedConfig(coordinator="a:1", num_processes=2, process_id=2),
            r"process_id 2 must be 0 to num_processes - 1 \(1\)$",
        ),
        (
            DistributedConfig(coordinator="a:1", num_processes=-2, process_id=0),
            "num_processes -2 must be greater than 0$",
        ),
        *(
            (
                DistributedConfig(coordinator=wrong, num_processes=2, process_id=1),
                f"^distributed.coordinator '{wrong}' must be HOST:PORT",
            )
            for wrong in ("a", "a:", ":1", "a:b", "a:0", "a:99999")
        ),
        (DistributedConfig(local_devices=(5,)), r"local_devices \(5,\) is for one of several"),
    ],
)
def test_incomplete_or_wrong_options_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        launch.join_processes(config)


@pytest.fixture
def in_three(monkeypatch):
    """Calls a function of the process number in three threads that act as processes.

    Returns what each call raised; one that waits for the others in vain raises BrokenBarrierError.
    """
    barrier, local, texts = threading.Barrier(3), threading.local(), {}

    def gather_text(text: str) -> list[str]:
        texts[local.number] = text
        barrier.wait(HANG)
        found = [texts[number] for number in range(3)]
        barrier.wait(HANG)
        return found

    monkeypatch.setattr(launch, "gather_text", gather_text)
    monkeypatch.setattr(launch, "is_first", lambda: local.number == 0)

    def call(function: Callable[[int], None]) -> list[Exception | None]:
        raised: list[Exception | None] = [None] * 3

        def run(number: int) -> None:
            local.number = number
            try:
                function(number)
            except Exception as error:
                raised[number] = error

        threads = [threading.Thread(target=run, args=[number]) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised

    return call


def test_the_first_process_goes_first_and_its_error_fails_all(in_three):
    order = []

    def run(number: int) -> None:
        with launch.first_process_first():
            order.append(number)

    assert in_three(run) == [None] * 3
    assert order[0] == 0 and sorted(order) == [0, 1, 2]

    def refuse(number: int) -> None:
        with launch.first_process_first():
            order.append(number)
            raise CheckpointError("model.network: it was r18: name another --workdir")

    order.clear()
    errors = in_three(refuse)
    assert order == [0]
    assert {(type(error), str(error)) for error in errors} == {
        (CheckpointError, "model.network: it was r18: name another --workdir")
    }


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DataError("no such: folder"), DataError, "no such: folder (in process 2)"),
        (OSError(28, "No space left"), UserError, "OSError: [Errno 28] No space left (in proc"),
    ],
)
@pytest.mark.parametrize("block", [launch.failing_together, launch.first_process_first])
def test_an_error_in_any_process_fails_all(in_three, block, error, kind, message):
    def run(number: int) -> None:
        with block():
            if number == 2:
                raise error

    *others, own = in_three(run)
    assert own is error
    for other in others:
        assert type(other) is kind and str(other).startswith(message)


@pytest.mark.slow
def test_a_run_that_cannot_resume_ends_in_all_its_processes(tmp_path):
    """One that wrote only its config.json, with another option; each process prints why."""
    finish(start(tmp_path / "run", "--schedule.epochs", "1", processes=1, devices=4))
    running = start(tmp_path / "run", "--head.margin", "0.3", processes=2, devices=2)
    texts = [process.communicate(timeout=HANG)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], texts
    assert all("head.margin: the stored run has 0.2" in text for text in texts)
