"""How a run ends that is asked to, hangs, or loses its data, through the real command."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from commands import HANG, ROOT, result, run_process, wait_until

from arcface_jax.commands import Result, command
from arcface_jax.config import CheckpointConfig
from arcface_jax.data.synthetic import faces
from arcface_jax.runtime import signals

# Six steps an epoch.
RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        devices=1,
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(
                identities=6, images_per_identity=8, pairs=PAIRS, pair_identities=20
            ),
        ),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32, bn_batch_size=8),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(epochs=EPOCHS),
        evaluation=c.EvaluationConfig(batch_size=8, every_epochs=1),
        checkpoint=c.CheckpointConfig(every_epochs=0),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
"""


class Run:
    """scripts/train.py in a process of its own; killed when a test is done with it."""

    def __init__(self, folder: Path, *options: str, epochs: int = 1000, pairs: int = 20):
        (folder / "recipe.py").write_text(
            RECIPE.replace("EPOCHS", str(epochs)).replace("PAIRS", str(pairs))
        )
        self.workdir = folder / "run"
        words = [str(folder / "recipe.py"), "--workdir", str(self.workdir), *options]
        # `nohup make test` ignores SIGHUP, and a shell's background job SIGINT.
        start = ["env", "--default-signal=HUP,INT"]
        self.process = subprocess.Popen(
            [*start, sys.executable, "scripts/train.py", *words],
            **{"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for(self, ready: Callable[[], bool]) -> None:
        wait_until(ready, self.process)

    def steps(self) -> int:
        return max(
            (line["step"] for line in lines(self.workdir) if "train/loss" in line), default=0
        )

    def wait_for_handlers(self) -> None:
        """Until the process notes SIGHUP instead of ending by it."""
        status = Path(f"/proc/{self.process.pid}/status")
        bit = 1 << (signal.SIGHUP - 1)

        def caught() -> bool:
            found = [x for x in status.read_text().splitlines() if x.startswith("SigCgt:")]
            return bool(found) and bool(int(found[0].split()[1], 16) & bit)

        self.wait_for(caught)

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=HANG)[1]
        return self.process.returncode, said


def lines(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # being written
            continue
    return found


def evaluated(workdir: Path) -> list[int]:
    return [line["step"] for line in lines(workdir) if "eval/synthetic/accuracy" in line]


def saved(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.parametrize("by", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_start_up_ends_the_run_in_one_line(tmp_path, by):
    """Before the heavy imports, or right after them."""
    with Run(tmp_path, "--checkpoint.requeue-exit-code", "85") as run:
        run.wait_for_handlers()
        run.process.send_signal(by)
        code, said = run.end()
    assert code == (85 if by is signal.SIGTERM else 128 + by), said
    assert said == (
        f"stopped by {by.name} before the first step; rerun the same command; it starts over, "
        "because no checkpoint is complete yet\n"
    )
    assert not run.workdir.exists()


def test_other_commands_end_on_ctrl_c_in_one_line(capsys):
    @command
    def body() -> Result:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        body()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_whose_output_is_cut_ends_without_a_traceback():
    """`arcface-jax recipes | head -n 1`, with a pipe that is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "arcface_jax", "recipes"]
    done = subprocess.run(words, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=HANG)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def loaded(run: Run, name: str) -> bool:
    """Whether a library is in the memory of the process."""
    return name in Path(f"/proc/{run.process.pid}/maps").read_text()


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_in_order_and_the_run_resumes(tmp_path):
    """Start-up's phases, the first compilation, steps, the last evaluation and the export."""
    moments: dict[str, Callable[[Run], bool]] = {
        "imports": lambda run: loaded(run, "jaxlib"),
        "data": lambda run: (run.workdir / "run.lock").exists(),
        "state": lambda run: (run.workdir / "config.json").exists(),
        "compilation": lambda run: (run.workdir / "run.txt").exists(),
        "steps": lambda run: run.steps() >= 2,
        "evaluation": lambda run: run.steps() == 12,
        "export": lambda run: 12 in evaluated(run.workdir),
    }
    by = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
    options = ("--evaluation.targets", "synthetic")
    codes = {}
    for number, (moment, reached) in enumerate(moments.items()):
        sent = by[number % len(by)]
        with Run(tmp_path, *options, epochs=2, pairs=100) as run:
            run.wait_for(partial(reached, run))
            run.process.send_signal(sent)
            codes[moment], said = run.end()
        assert codes[moment] == 128 + sent, (moment, said)
        assert "Traceback" not in said and f"stopped by {sent.name}" in said, (moment, said)
        assert not (run.workdir / "run.lock").exists(), moment
        assert not list(run.workdir.glob("**/*.part")), moment
        assert not list(run.workdir.glob("checkpoints/*tmp*")), moment
    with Run(tmp_path, *options, epochs=2, pairs=100) as run:
        code, said = run.end()
    assert code == 0, said
    assert [line["step"] for line in lines(run.workdir) if "train/loss" in line] == [*range(1, 13)]
    assert 12 in evaluated(run.workdir) and saved(run.workdir)[-1] == 12


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_trains_on_and_saves_at_sighup(tmp_path):
    with Run(tmp_path) as run:
        run.wait_for(lambda: run.steps() >= 1)
        run.process.stdout.close()
        run.process.stderr.close()
        seen = run.steps()
        run.wait_for(lambda: run.steps() >= seen + 20)
        run.process.send_signal(signal.SIGHUP)
        code = run.process.wait(HANG)
        run.process.stdout = run.process.stderr = None
    assert code == 128 + signal.SIGHUP
    assert saved(run.workdir) == [run.steps()]


@pytest.mark.slow
def test_of_two_runs_in_one_workdir_the_second_ends(tmp_path):
    """And the first is what status reports; after a kill -9 the next run takes over."""
    with Run(tmp_path) as first:
        first.wait_for(lambda: first.steps() >= 1)
        with Run(tmp_path) as second:
            code, said = second.end()
        assert code == 2 and f"in use by another run: process {first.process.pid} on" in said
        assert "Traceback" not in said
        seen = result(run_process(["scripts/status.py", str(first.workdir)]).stdout)
        assert (seen["holder"], seen["pid"]) == ("alive", first.process.pid)
        assert seen["step"] >= 1 and seen["total_steps"] == 6000
        first.process.kill()
        first.process.wait()
    seen = result(run_process(["scripts/status.py", str(first.workdir)]).stdout)
    assert seen["holder"] == "stale"
    with Run(tmp_path) as third:
        third.wait_for(lambda: third.steps() > seen["step"])
        third.process.send_signal(signal.SIGTERM)
        code, said = third.end()
    assert code == 128 + signal.SIGTERM
    assert f"was left locked by process {first.process.pid} on" in said


@pytest.mark.slow
def test_a_signal_leaves_an_evaluation_which_is_made_up_for(tmp_path):
    """One of 800 pairs, 400 batches, of which a few are enough to notice the signal."""
    targets = ("--evaluation.targets", "synthetic")
    options = {"epochs": 2, "pairs": 800}
    with Run(tmp_path, *targets, **options) as run:
        run.wait_for(lambda: run.steps() == 6)
        time.sleep(1)  # into the evaluation
        run.process.send_signal(signal.SIGTERM)
        code, said = run.end()
    assert code == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM at step 6" in said
    assert evaluated(run.workdir) == [] and saved(run.workdir) == [6]
    with Run(tmp_path, *targets, **options) as run:
        run.wait_for((run.workdir / "run.txt").exists)
        code, said = run.end()
    assert code == 0, said
    assert evaluated(run.workdir) == [6, 12]
    assert "resuming at step 6 of 12" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "options", "expected"),
    [
        (signal.SIGTERM, ("--checkpoint.requeue-exit-code", "85"), 85),
        (signal.SIGTERM, (), 128 + signal.SIGTERM),
        (signal.SIGINT, ("--checkpoint.requeue-exit-code", "85"), 128 + signal.SIGINT),
    ],
    ids=["requeue", "sigterm", "sigint"],
)
def test_a_save_that_outlasts_the_deadline_is_given_up(tmp_path, by, options, expected):
    """A save that never ends: its checksums go to pipes that nobody reads, but for one step's."""
    slow = tmp_path / "run" / "checksums"
    more = ("--checkpoint.deadline-seconds", "3", "--checkpoint.every-epochs", "1")
    with Run(tmp_path, *options, *more) as run:
        run.wait_for(lambda: run.steps() >= 1)
        slow.mkdir(exist_ok=True)
        for step in range(7, 3000):
            os.mkfifo(slow / f"{step}.json.{platform.node()}-{run.process.pid}.part")
        run.wait_for(lambda: run.steps() >= 8)
        run.process.send_signal(by)
        code, said = run.end()
    assert code == expected, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"{by.name}: shutdown exceeded checkpoint.deadline_seconds=3; exiting")
    assert "it resumes from step 6 " in last
    assert "Traceback" not in said and saved(run.workdir) == [6]


def image_folder(folder: Path) -> Path:
    """48 drawn faces of six people."""
    for identity in range(6):
        (folder / f"person{identity}").mkdir(parents=True)
        for index in range(8):
            face = faces.draw_face(seed=0, identity=identity, index=index)
            cv2.imwrite(str(folder / f"person{identity}" / f"{index}.png"), face[:, :, ::-1])
    return folder


STALLING = "tests.support.stalling_faces:make:"


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(tmp_path):
    stalled = tmp_path / "stalled"
    with Run(tmp_path, "--data.path", f"{STALLING}{stalled}") as run:
        run.wait_for(lambda: run.steps() >= 1)
        stalled.touch()
        time.sleep(3)
        run.process.send_signal(signal.SIGTERM)
        time.sleep(2)
        assert run.process.poll() is None, "a step hangs, and the run waits for it"
        run.process.send_signal(signal.SIGTERM)
        code, _ = run.end()
    assert code == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("abort", [False, True], ids=["says it", "ends it"])
def test_a_step_that_hangs_is_found_by_the_watchdog(tmp_path, abort):
    """Images cannot be read any more; the first step compiles, and is no hang."""
    stalled = tmp_path / "stalled"
    options = ("--logging.watchdog-seconds", "30", "--logging.watchdog-abort", str(abort))
    with Run(tmp_path, "--data.path", f"{STALLING}{stalled}", *options) as run:
        run.wait_for(lambda: run.steps() >= 1)
        stalled.touch()
        if abort:
            code, said = run.end()
            assert code == 1
        else:
            time.sleep(40)
            assert run.process.poll() is None
            run.process.kill()
            _, said = run.end()
    assert "Timeout (0:00:30)!" in said
    assert "most recent call first" in said and "arcface_jax/train.py" in said
    assert "arcface_jax/data/" in said  # the threads that read, too


@pytest.mark.slow
def test_images_that_vanish_are_replaced_up_to_the_share(tmp_path):
    data = image_folder(tmp_path / "data")
    images = sorted(data.rglob("*.png"))
    options = ("--data.path", str(data), "--data.max-bad-share", "0.1")  # 4 of 48
    with Run(tmp_path, *options) as run:
        run.wait_for(lambda: run.steps() >= 1)
        for path in images[:3]:
            path.unlink()
        count = "data/bad_images"
        run.wait_for(lambda: lines(run.workdir)[-1].get(count) == 3)
        for path in images[10:14]:
            path.unlink()
        code, said = run.end()
    assert code == 2, said
    message = said.strip().splitlines()[-1]
    assert message.startswith("error: ") and "of 48 training images cannot be read" in message
    assert "bad_images.jsonl" in message and "Traceback" not in said
    listed = [json.loads(x) for x in (run.workdir / "bad_images.jsonl").read_text().splitlines()]
    assert len(listed) >= 5
    assert {Path(line["where"]) for line in listed} <= {*images[:3], *images[10:14]}
    assert saved(run.workdir) == [run.steps()]
    (gone := tmp_path / "gone").mkdir()
    data.rename(gone / "data")
    with Run(tmp_path, *options) as run:
        code, said = run.end()
    assert code == 2 and "does not exist" in said and str(data) in said
    assert "Traceback" not in said and saved(run.workdir) == [run.steps()]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_after_fifty_steps(tmp_path):
    from faults.kill_and_resume import weights

    arrays = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with Run(tmp_path / name, epochs=9) as run:
            code, said = run.end()
        assert code == 0 and saved(run.workdir) == [54], said
        arrays.append(weights(run.workdir))
    one, two = arrays
    assert one.keys() == two.keys() and len(one) > 50
    for name, array in one.items():
        assert array.dtype == two[name].dtype and array.tobytes() == two[name].tobytes(), name
    with Run(tmp_path, "--seed", "1", epochs=9) as run:
        assert run.end()[0] == 0
    other = weights(run.workdir)
    moved = [name for name in one if not np.array_equal(one[name], other[name], equal_nan=True)]
    assert len(moved) > len(one) / 2, "another seed gives others: the comparison can fail"


def test_a_run_in_processes_takes_a_sigterm_from_before_they_connected(tmp_path, monkeypatch):
    """JAX, which watches for SIGTERM from then on, gets it again."""
    came = []
    monkeypatch.setattr(signals, "_remembered", [signal.SIGTERM])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "kill", lambda *args: came.append(args))
    with signals.watched(CheckpointConfig(), workdir=tmp_path) as stop:
        assert stop.forwarded is signal.SIGTERM and not stop
    assert came == [(os.getpid(), signal.SIGTERM)]


def test_a_run_in_another_thread_does_not_handle_signals(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_remembered", [signal.SIGHUP])
    before, found = [signal.getsignal(s) for s in signals._SIGNALS], []

    def watch() -> None:
        with signals.watched(CheckpointConfig(deadline_seconds=60), workdir=tmp_path) as stop:
            found.append(([signal.getsignal(s) for s in signals._SIGNALS], stop.signals))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert found == [(before, [signal.SIGHUP])]
