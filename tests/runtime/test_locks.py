"""One run holds a workdir, whatever becomes of its process or its machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import HANG, ROOT, TINY_RECIPE, script

from arcface_jax.errors import CheckpointError
from arcface_jax.runtime import locks

HOLDS = """
import sys
from pathlib import Path
from arcface_jax.runtime import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# Processes that take the lock in turn, in a block that notices a second one in it. A third of them
# ends in the block without releasing it.
CONTEND = """
import os, random, sys, time
from pathlib import Path
from arcface_jax.errors import CheckpointError
from arcface_jax.runtime import locks
workdir, inside = Path(sys.argv[1]), Path(sys.argv[2])

def contend(number):
    draw = random.Random(number)
    for _ in range(6):
        while True:
            try:
                with locks.held(workdir):
                    try:
                        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        os._exit(1)
                    time.sleep(draw.uniform(0, 0.01))
                    inside.unlink()
                    if draw.random() < 0.3:
                        os._exit(0)
                break
            except CheckpointError:
                time.sleep(draw.uniform(0, 0.01))
    os._exit(0)

children = []
for number in range(8):
    if not (child := os.fork()):
        contend(number)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(max(codes))
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def change(path: Path, *, age: float = 0.0, **fields) -> None:
    """Change a lock file as another machine would have written it, `age` seconds ago."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    os.utime(path, (time.time() - age,) * 2)


def test_a_second_run_is_refused_and_told_who_holds_the_workdir(holder, tmp_path, capsys):
    """Before it opens its data, which does not exist, and without a trace in the folder."""
    workdir = tmp_path / "run"
    (tmp_path / "recipe.py").write_text(TINY_RECIPE)
    words = [str(tmp_path / "recipe.py"), "--workdir", str(workdir), "--data.path", "/nowhere"]
    with pytest.raises(SystemExit) as stop:
        script("train").main(words)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"error: --workdir {workdir} is in use by another run: process ")
    assert f"process {holder.pid} on {os.uname().nodename}, since 20" in message
    assert f"kill {holder.pid}" in message and "\n" not in message
    assert os.listdir(workdir) == [locks.LOCK]
    found = locks.find(workdir)
    assert found is not None and found[0].pid == holder.pid and found[1]


def test_a_killed_holder_is_followed_with_a_message(holder, tmp_path, capsys):
    workdir = tmp_path / "run"
    holder.send_signal(signal.SIGKILL)
    stat = Path(f"/proc/{holder.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    with locks.held(workdir):  # not even its parent has noticed yet
        assert f"was left locked by process {holder.pid} " in capsys.readouterr().err
        with locks.held(workdir):
            pass  # a process may hold it twice
    assert not workdir.exists() or not os.listdir(workdir)
    assert capsys.readouterr().err == ""


def test_another_process_with_the_holders_number_is_not_taken_for_it(holder, tmp_path):
    change(tmp_path / "run" / locks.LOCK, started="1")
    with locks.held(tmp_path / "run"):
        pass


@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"machine": "another boot"}])
@pytest.mark.parametrize("becomes", ["moves", "stays", "is old", "is released"])
def test_on_another_machine_the_heartbeat_decides(tmp_path, monkeypatch, where, becomes):
    workdir = tmp_path / "run"
    path = workdir / locks.LOCK
    with locks.held(workdir):
        text = path.read_text()
    workdir.mkdir()
    path.write_text(text)
    change(path, age=1000.0 if becomes == "is old" else 60.0, pid=1, token="other", **where)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if becomes == "moves" and sum(slept) == 7:
            os.utime(path)
        if becomes == "is released" and sum(slept) == 7:
            path.unlink()

    monkeypatch.setattr(locks.time, "sleep", sleep)
    if becomes == "moves":
        with pytest.raises(CheckpointError, match="in use by another run: process 1 on"):
            locks.held(workdir).__enter__()
        assert json.loads(path.read_text())["token"] == "other"
    else:
        with locks.held(workdir):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    seconds = {"moves": 7, "stays": locks.STALE_SECONDS - 60, "is old": 0, "is released": 7}
    assert abs(sum(slept) - seconds[becomes]) <= 2
    assert [name for name in os.listdir(workdir) if name != locks.LOCK] == []


def test_an_unreadable_lock_and_litter_are_replaced_once_they_are_old(tmp_path):
    for name, content in {locks.LOCK: '{"token": "../x"}', f"{locks.LOCK}.ab.part": "{"}.items():
        (tmp_path / name).write_text(content)
        os.utime(tmp_path / name, (1e9, 1e9))
    with locks.held(tmp_path):
        assert os.listdir(tmp_path) == [locks.LOCK]
    assert os.listdir(tmp_path) == []


def test_a_holder_that_lost_its_lock_saves_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    path = tmp_path / locks.LOCK
    with locks.held(tmp_path):
        locks.require(tmp_path)
        path.unlink()  # by hand
        while not path.exists():
            time.sleep(0.001)
        change(path, token="other")
        hold = locks._holds[tmp_path.resolve()]
        while hold.lost_to is None:
            time.sleep(0.001)
        with pytest.raises(CheckpointError, match="was taken over by process"):
            locks.require(tmp_path)
    assert json.loads(path.read_text())["token"] == "other"


@pytest.mark.parametrize("links", [True, False])
def test_of_many_contenders_one_holds_it(tmp_path, links):
    """Also while some of them are killed in it, and without hard links."""
    code = CONTEND
    if not links:
        code = CONTEND.replace(
            "workdir, inside",
            "def link(*_): raise PermissionError(1, 'no links')\nos.link = link\nworkdir, inside",
            1,
        )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "inside")]
    done = subprocess.run(command, cwd=ROOT, timeout=HANG, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "was left locked by" in done.stderr


def test_a_folder_of_something_else_is_refused_and_keeps_its_files(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    (tmp_path / "recipe.py").write_text(TINY_RECIPE)
    words = [str(tmp_path / "recipe.py"), "--workdir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        script("train").main(words)
    assert "is not empty and holds no config.json" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == ["thesis.txt"]
