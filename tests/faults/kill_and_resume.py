"""Kill a training again and again, and compare its final state with an undisturbed run's.

python tests/faults/kill_and_resume.py --kills 50
python tests/faults/kill_and_resume.py --kills 25 --processes 2 --folder kills
python tests/faults/kill_and_resume.py --kills 10 --teacher model.onnx

Each start is scripts/train.py on synthetic faces with AdamW, sampled negatives, a running mean of
the weights and micro-batches, and a checkpoint after every step. One of its processes, drawn at
random, is killed with SIGKILL: half of the time while a checkpoint is being written. The others get
`--grace` seconds to end by themselves, then they are killed too, as a launcher would do. With
--folder an interrupted series continues with its next kill when the command is repeated.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH = 5
LONGEST = 10_000
"""Epochs: no killed run gets that far. The rate is constant, so both runs can be cut short."""
RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        compilation_cache="CACHE",
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(identities=8, images_per_identity=5),
        ),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32, bn_batch_size=2),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0, sample_rate=0.5),
        optimizer=c.OptimizerConfig(
            kind="adamw", learning_rate=0.001, weight_decay=0.05, micro_batches=2, ema=0.99
        ),
        schedule=c.ScheduleConfig(kind="step", epochs=EPOCHS),
        evaluation=c.EvaluationConfig(batch_size=8, every_epochs=0),
        checkpoint=c.CheckpointConfig(every_epochs=0.2),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
"""


class Kill(NamedTuple):
    """One killed start."""

    during: str
    """`start`, `later` or `save`."""
    process: int
    """Which of the processes was killed."""
    others: str
    """How the others ended: `by themselves`, `killed`, or `none` where there are no others."""


def start(recipe: Path, workdir: Path, *options: str, processes: int) -> list[subprocess.Popen]:
    """The real command in so many processes, each with one CPU device."""
    command = [sys.executable, "scripts/train.py", str(recipe), "--workdir", str(workdir), *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for number in range(processes):
        more = ["--distributed.coordinator", coordinator, "--distributed.process-id", str(number)]
        more += ["--distributed.num-processes", str(processes)]
        with log(workdir, number).open("a") as output:
            running.append(
                subprocess.Popen(
                    [*command, *(more if processes > 1 else [])],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )
    return running


def log(workdir: Path, process: int = 0) -> Path:
    """What one of the processes has printed in all its starts."""
    return workdir.parent / f"{workdir.name}.{process}.log"


def complete(workdir: Path) -> set[str]:
    """The checkpoints that a restart may take."""
    return {path.name for path in workdir.glob("checkpoints/*") if path.name.isdigit()}


def unfinished(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(not path.name.isdigit() for path in workdir.glob("checkpoints/*"))


def kill_once(
    processes: list[subprocess.Popen], workdir: Path, draw: random.Random, *, grace: float
) -> Kill | None:
    """Kill one of the processes; None where one ended before.

    `start`: at any moment since its first step. `later`: some time after it has saved a checkpoint.
    `save`: in the middle of the next save after that.
    """
    during = draw.choices(("start", "later", "save"), (1, 2, 3))[0]
    wait = draw.uniform(0, 1 if during != "save" else 0.02)
    number = draw.randrange(len(processes))
    before, metrics = complete(workdir), workdir / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns if metrics.exists() else 0

    def begun() -> bool:
        if during == "start":
            return metrics.exists() and metrics.stat().st_mtime_ns > written
        return bool(complete(workdir) - before) and (during == "later" or unfinished(workdir))

    while not begun():
        if any(process.poll() is not None for process in processes):
            return None
        time.sleep(0.001)
    time.sleep(wait)
    saving = unfinished(workdir)
    kill(processes[number])
    if processes[number].returncode == 0:
        return None
    others = [process for i, process in enumerate(processes) if i != number]
    ended = [ends_by_itself(process, grace) for process in others]
    how = "none" if not others else "by themselves" if all(ended) else "killed"
    return Kill("save" if saving else during, number, how)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ends_by_itself(process: subprocess.Popen, grace: float) -> bool:
    """Whether a process ends within so many seconds; if not, it is killed."""
    try:
        process.wait(grace)
        return True
    except subprocess.TimeoutExpired:
        kill(process)
        return False


def finish(processes: list[subprocess.Popen], workdir: Path) -> None:
    """Wait for a start that is not disturbed."""
    if any([process.wait() for process in processes]):
        fail(workdir)


def fail(workdir: Path) -> None:
    """End this program with the last words of the run."""
    raise SystemExit(log(workdir).read_text()[-3000:])


def weights(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, those of the running mean included if there is one."""
    arrays: dict[str, np.ndarray] = {}
    handlers: dict = {
        item: ocp.PyTreeCheckpointHandler() for item in ("backbone", "ema", "training")
    }
    handlers["dataset"] = ocp.JsonCheckpointHandler()
    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=handlers) as manager:
        step = manager.latest_step()
        trees = manager.item_metadata(step)
        for item in {*trees} - {"dataset"}:
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), trees[item].tree
            )
            restore = {item: ocp.args.PyTreeRestore(restore_args=as_numpy)}
            found = manager.restore(step, args=ocp.args.Composite(**restore))[item]
            leaves = jax.tree_util.tree_leaves_with_path(found)
            arrays |= {f"{item}{jax.tree_util.keystr(k)}": np.asarray(v) for k, v in leaves}
    return arrays


def taught(asked: argparse.Namespace, folder: Path) -> list[str]:
    """The options of a run with a teacher, whose embeddings are computed once for all starts."""
    if not asked.teacher:
        return []
    return ["--distill.teacher", asked.teacher, "--distill.cache", str(folder / "teacher")]


def kill_repeatedly(asked: argparse.Namespace, folder: Path, recipe: Path) -> list[Kill]:
    """Start and kill the run until there are enough kills, those of an earlier call included."""
    journal = folder / "kills.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    kills = [Kill(*json.loads(line)) for line in lines]
    run = folder / "killed"
    while len(kills) < asked.kills:
        draw = random.Random(f"{asked.seed} {len(kills)}")
        processes = start(recipe, run, *taught(asked, folder), processes=asked.processes)
        try:
            killed = kill_once(processes, run, draw, grace=asked.grace)
        finally:
            for process in processes:
                kill(process)
        if killed is None:
            fail(run)
            break
        kills.append(killed)
        with journal.open("a") as file:
            file.write(json.dumps(killed) + "\n")
        print(f"kill {len(kills)} of {asked.kills}: {killed}", file=sys.stderr, flush=True)
    return kills


@contextlib.contextmanager
def chosen_folder(name: str) -> Iterator[Path]:
    """The folder of an earlier call, or a temporary one."""
    if not name:
        with TemporaryDirectory() as made:
            yield Path(made)
        return
    folder = Path(name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--grace", type=float, default=120.0)
    parser.add_argument("--teacher", default="", help="--distill.teacher of the run")
    parser.add_argument("--folder", default="")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    begin = time.perf_counter()
    with chosen_folder(asked.folder) as folder:
        recipe = folder / "recipe.py"
        text = RECIPE.replace("EPOCHS", str(LONGEST)).replace("CACHE", str(folder / "cache"))
        recipe.write_text(text)
        kills = kill_repeatedly(asked, folder, recipe)
        # A few steps after the last kill, both end.
        epochs = max(map(int, complete(folder / "killed")), default=0) // STEPS_PER_EPOCH + 1
        last = (*taught(asked, folder), "--schedule.epochs", str(epochs))
        for run, more in (("killed", ("--schedule.extend",)), ("undisturbed", ())):
            running = start(recipe, folder / run, *last, *more, processes=asked.processes)
            finish(running, folder / run)
        killed_weights, expected = (weights(folder / run) for run in ("killed", "undisturbed"))
        same = killed_weights.keys() == expected.keys() and all(
            np.array_equal(expected[name], killed_weights[name], equal_nan=True)
            for name in expected
        )
        resumed = log(folder / "killed").read_text().count("resuming at step")
    during = [kill.during for kill in kills]
    result = {
        "kills": len(kills),
        "processes": asked.processes,
        "during_a_save": during.count("save"),
        "first_process_killed": sum(kill.process == 0 for kill in kills),
        "others_ended_by_themselves": sum(kill.others == "by themselves" for kill in kills),
        "resumed": resumed,
        "arrays": len(expected),
        "equal": same,
        "steps": STEPS_PER_EPOCH * epochs,
        "seconds": round(time.perf_counter() - begin, 1),
        "files": [],
    }
    print("RESULT " + json.dumps(result))
    # Each kill after a save is followed by a resumption.
    return 0 if same and resumed >= len(kills) - during.count("start") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
