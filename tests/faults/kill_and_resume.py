"""Kills a training again and again, and compares its weights with those of one left alone.

python tests/faults/kill_and_resume.py --kills 50

Each start is scripts/train.py on drawn faces, with a checkpoint after every step, killed with
SIGKILL at a random moment: half of the time while a checkpoint is being written.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
RECIPE = """
from arcface_jax import config as c


def get_config():
    return c.Config(
        devices=1,
        compilation_cache="CACHE",
        data=c.DataConfig(
            path="synthetic",
            global_batch_size=8,
            synthetic=c.SyntheticConfig(identities=8, images_per_identity=5),
        ),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32, bn_batch_size=8),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0, sample_rate=0.5),
        schedule=c.ScheduleConfig(epochs=EPOCHS),
        evaluation=c.EvaluationConfig(batch_size=8, every_epochs=0),
        checkpoint=c.CheckpointConfig(every_epochs=0.2),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
"""


def start(recipe: Path, workdir: Path) -> subprocess.Popen:
    """The real command, on the CPU."""
    command = [sys.executable, "scripts/train.py", str(recipe), "--workdir", str(workdir)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with (workdir.parent / f"{workdir.name}.log").open("a") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def complete(workdir: Path) -> set[str]:
    """The checkpoints that a restart may take."""
    return {path.name for path in workdir.glob("checkpoints/*") if path.name.isdigit()}


def unfinished(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(not path.name.isdigit() for path in workdir.glob("checkpoints/*"))


def kill_once(process: subprocess.Popen, workdir: Path, draw: random.Random) -> str | None:
    """Kills it, and returns during what; None where it ended before.

    `start`: at any moment since its first step. `later`: some time after it has saved a checkpoint.
    `save`: in the middle of the next save behind that.
    """
    during = draw.choices(("start", "later", "save"), (1, 2, 3))[0]
    wait = draw.uniform(0, 1 if during != "save" else 0.02)
    before, metrics = complete(workdir), workdir / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns if metrics.exists() else 0

    def begun() -> bool:
        if during == "start":
            return metrics.exists() and metrics.stat().st_mtime_ns > written
        return bool(complete(workdir) - before) and (during == "later" or unfinished(workdir))

    while not begun():
        if process.poll() is not None:
            return None
        time.sleep(0.001)
    time.sleep(wait)
    saving = unfinished(workdir)
    os.killpg(process.pid, signal.SIGKILL)
    return None if process.wait() == 0 else "save" if saving else during


def finish(process: subprocess.Popen, workdir: Path) -> None:
    """Waits for a start that is left alone."""
    if process.wait() != 0:
        raise SystemExit((workdir.parent / f"{workdir.name}.log").read_text()[-3000:])


def weights(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint."""
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    arrays: dict[str, np.ndarray] = {}
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("backbone", "training"):
            tree = reader.metadata(newest / item).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            found = reader.restore(newest / item, restore_args=as_numpy)
            leaves = jax.tree_util.tree_leaves_with_path(found)
            arrays |= {f"{item}{jax.tree_util.keystr(k)}": np.asarray(v) for k, v in leaves}
    return arrays


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    draw = random.Random(asked.seed)
    begin = time.perf_counter()
    with TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.py"
        epochs = 20 + 2 * asked.kills
        text = RECIPE.replace("EPOCHS", str(epochs)).replace("CACHE", str(folder / "cache"))
        recipe.write_text(text)
        during: list[str] = []
        while len(during) < asked.kills:
            killed = kill_once(start(recipe, folder / "killed"), folder / "killed", draw)
            if killed is None:
                raise SystemExit((folder / "killed.log").read_text()[-3000:])
            during.append(killed)
            print(f"kill {len(during)} of {asked.kills}: {killed}", file=sys.stderr)
        for run in ("killed", "undisturbed"):
            finish(start(recipe, folder / run), folder / run)
        killed_weights, expected = (weights(folder / run) for run in ("killed", "undisturbed"))
        same = killed_weights.keys() == expected.keys() and all(
            np.array_equal(expected[name], killed_weights[name], equal_nan=True)
            for name in expected
        )
        resumed = (folder / "killed.log").read_text().count("resuming at step")
    result = {
        "kills": len(during),
        "during_a_save": during.count("save"),
        "resumed": resumed,
        "arrays": len(expected),
        "equal": same,
        "steps": 5 * epochs,
        "seconds": round(time.perf_counter() - begin, 1),
        "files": [],
    }
    print("RESULT " + json.dumps(result))
    # Of kills behind a save each is followed by a resumption.
    return 0 if same and resumed >= len(during) - during.count("start") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
