"""Shared memory of workers: what a killed run leaves, a full /dev/shm, a suspended worker."""

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from multiprocessing import active_children, shared_memory
from pathlib import Path

import numpy as np
import pytest
from commands import HANG, ROOT

from arcface_jax.config import DataConfig
from arcface_jax.data import pipeline
from arcface_jax.data.source import Source
from arcface_jax.errors import UserError
from arcface_jax.runtime import shared_memory as owned

pytestmark = pytest.mark.skipif(not owned.FOLDER.is_dir(), reason="needs /dev/shm")

READS = """
import sys
from arcface_jax.config import DataConfig
from arcface_jax.data import pipeline
from arcface_jax.data.synthetic.source import SyntheticSource

if __name__ == "__main__":
    source = SyntheticSource(seed=0, identities=8, images_per_identity=4)
    data = DataConfig(global_batch_size=8, workers=1)
    reader = pipeline.batches(source, data, seed=0, start=0, stop=1000)
    next(reader)
    print("read", flush=True)
    sys.stdin.read()
"""


def objects(pid: int) -> list[str]:
    """Of /dev/shm, those that a process owns."""
    return sorted(name for name in os.listdir(owned.FOLDER) if f"-{pid}-" in name)


def test_what_a_killed_process_group_leaves_is_removed_at_the_next_start(tmp_path: Path, capsys):
    script = tmp_path / "reads.py"
    script.write_text(READS)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin and process.stdout
    assert process.stdout.readline() == b"read\n"
    assert owned.remove_leftovers()[0] == 0 or objects(process.pid)  # those in use are kept
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(HANG)
    process.stdin.close()
    process.stdout.close()
    left = objects(process.pid)
    assert any("sem." in name for name in left) and any("sem." not in name for name in left)
    capsys.readouterr()
    count, size = owned.remove_leftovers()
    assert count >= len(left) and size >= 8 * 112 * 112 * 3
    assert objects(process.pid) == []
    assert f"removed {count} objects" in capsys.readouterr().err
    assert owned.remove_leftovers() == (0, 0)


def test_only_objects_of_ended_processes_are_removed(tmp_path: Path):
    mine = owned.name_of_owner(os.getpid())
    prefix, namespace, pid, started = mine.split("-")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(HANG)
    kept = [f"{mine}-a", f"sem.{mine}-b", f"{prefix}-1-{ended.pid}-5-c", "psm_abc", "arcface_jax-x"]
    stale = [f"{prefix}-{namespace}-{ended.pid}-5-d", f"{prefix}-{namespace}-{pid}-{started}1-e"]
    for name in (*kept, *stale):
        (tmp_path / name).write_bytes(bytes(4096))
    assert owned.remove_leftovers(tmp_path)[0] == 2
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_full_dev_shm_is_named(monkeypatch):
    def no_room(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_memory, "SharedMemory", shared_memory.SharedMemory)
    owner = owned.name_of_owner(os.getpid())
    # Workers that earlier tests killed leave objects until the next start.
    before = objects(os.getpid())
    owned.name_blocks(owner)
    block = shared_memory.SharedMemory(create=True, size=4096)
    assert block.name.startswith(owner)
    block.close()
    block.unlink()
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(UserError, match=r"/dev/shm is full: a batch needs 2\.0 MiB.*--shm-size"):
        shared_memory.SharedMemory(create=True, size=2**21)
    assert not set(objects(os.getpid())) - set(before)


SMALL = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$0" "$@"'


@pytest.mark.slow
def test_a_worker_in_a_container_with_a_small_dev_shm_ends_in_one_line(
    tmp_path: Path, tiny_recipe: Path
):
    alone = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]).returncode:
        pytest.skip("needs a mount namespace (unshare --mount)")
    more = ["--workdir", str(tmp_path / "run"), "--data.workers", "1"]
    done = subprocess.run(
        [*alone, "sh", "-c", SMALL, sys.executable, "scripts/train.py", str(tiny_recipe), *more],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: /dev/shm is full: a batch needs" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


class Blank(Source):
    """Black images."""

    num_classes = 4

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.zeros((112, 112, 3), np.uint8), index % 4


def test_a_suspended_worker_is_reported(monkeypatch, capsys):
    report, reported = pipeline._report_stopped, []

    def resume(pid: int) -> None:
        report(pid)
        reported.append(pid)
        os.kill(pid, signal.SIGCONT)

    monkeypatch.setattr(pipeline, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(pipeline, "_report_stopped", resume)
    data = DataConfig(global_batch_size=8, workers=1, prefetch_batches=1, threads=1)
    reader = pipeline.batches(Blank(), data, seed=0, start=0, stop=200)
    with closing(reader):
        next(reader)
        (worker,) = active_children()
        assert worker.pid
        os.kill(worker.pid, signal.SIGSTOP)
        rest = list(reader)  # waits until the worker is resumed
    assert len(rest) == 199 and reported == [worker.pid]
    assert f"kill -CONT {worker.pid}" in capsys.readouterr().err
    assert "workers" not in {thread.name for thread in threading.enumerate()}
