"""Damage every kind of file in a workdir in every way, then read it and resume the run.

python -m tests.faults.matrix --write docs/reliability.md
python -m tests.faults.matrix --kinds config.json metrics.jsonl
python -m tests.faults.matrix --store outcomes.json --kinds config.json --write docs/reliability.md

One run of four steps is copied once for each kind of file and each damage. `read` opens the copy
as evaluation and export do; `resume` repeats the command. The program fails if anything ends in a
traceback, if weights differ from those of the undamaged run, or if metrics are lost without a word.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from arcface_jax import config as c
from arcface_jax import train
from arcface_jax.errors import UserError
from arcface_jax.training import saved_runs
from tests.support import damage

Damage = Callable[[Path], None]
BEGIN, END = "<!-- made by python -m tests.faults.matrix -->\n", "<!-- end -->"

FILES = {
    "config.json": "config.json",
    "environment.json": "environment.json",
    "metrics.jsonl": "metrics.jsonl",
    "metrics.csv": "metrics.csv",
    "run.txt": "run.txt",
    "bad_images.jsonl": "bad_images.jsonl",
    "failure_N.json": "failure_3.json",
    "backbone.pth": "backbone.pth",
    "eval/*": "eval/curves.png",
    "tensorboard/*": "tensorboard/events*",
    "checksums/N.json": "checksums/4.json",
    "checksums/config.json": "checksums/config.json",
    "N/_CHECKPOINT_METADATA": "checkpoints/4/_CHECKPOINT_METADATA",
    "N/commit_success.txt": "checkpoints/4/commit_success.txt",
    "N/dataset/metadata": "checkpoints/4/dataset/metadata",
    "N/metrics/metrics": "checkpoints/4/metrics/metrics",
    "N/backbone/_METADATA": "checkpoints/4/backbone/_METADATA",
    "N/backbone/_sharding": "checkpoints/4/backbone/_sharding",
    "N/backbone/manifest.ocdbt": "checkpoints/4/backbone/manifest.ocdbt",
    "N/backbone/d/*": "checkpoints/4/backbone/d/*",
    "N/backbone/array_metadatas/*": "checkpoints/4/backbone/array_metadatas/*",
    "N/backbone/ocdbt.*/d/*": "checkpoints/4/backbone/ocdbt*/d/*",
    "N/training/_METADATA": "checkpoints/4/training/_METADATA",
    "N/training/manifest.ocdbt": "checkpoints/4/training/manifest.ocdbt",
    "N/training/ocdbt.*/d/*": "checkpoints/4/training/ocdbt*/d/*",
    "M/_CHECKPOINT_METADATA": "checkpoints/2/_CHECKPOINT_METADATA",
    "M/metrics/metrics": "checkpoints/2/metrics/metrics",
    "M/backbone/_METADATA": "checkpoints/2/backbone/_METADATA",
}
"""A pattern in the workdir by the name of each kind of file; of several files the largest counts.

N is the newest of two checkpoints, M the other.
"""


def file_in_place(folder: Path) -> None:
    """Puts a file in the folder's place."""
    shutil.rmtree(folder)
    folder.write_text("not a folder\n")


def empty_folder(folder: Path) -> None:
    """Removes what is in the folder."""
    shutil.rmtree(folder)
    folder.mkdir()


def dangling_folder_link(folder: Path) -> None:
    """Puts a symbolic link to nothing in the folder's place."""
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name(folder.name + ".gone"))


FOLDERS = {
    "checkpoints": "checkpoints",
    "checkpoints/N": "checkpoints/4",
    "N/backbone": "checkpoints/4/backbone",
    "N/training": "checkpoints/4/training",
    "N/dataset": "checkpoints/4/dataset",
    "N/metrics": "checkpoints/4/metrics",
    "checksums": "checksums",
    "eval": "eval",
    "tensorboard": "tensorboard",
}
FOLDER_DAMAGES: dict[str, Damage] = {
    "deleted": shutil.rmtree,
    "emptied": empty_folder,
    "a file in its place": file_in_place,
    "dangling link": dangling_folder_link,
    "link elsewhere": damage.symlink_away,
}
FILE_DAMAGES: dict[str, Damage] = {
    "one bit": damage.flip_bit,
    "zero length": damage.empty,
    "cut": damage.truncate,
    "deleted": damage.delete,
    "wrong JSON": damage.wrong_json,
    "dangling link": damage.dangling_symlink,
    "link elsewhere": damage.symlink_away,
    "a folder in its place": damage.folder_in_place,
    "extra file": damage.extra_file,
}
STRAYS: dict[str, Damage] = {
    "checkpoints/999, a file": lambda run: (run / "checkpoints/999").write_text("") and None,
    "checkpoints/999, a folder": lambda run: (run / "checkpoints/999").mkdir(),
    "checkpoints/²": lambda run: (run / "checkpoints/²").mkdir(),
    "checkpoints/007": lambda run: (run / "checkpoints/007").mkdir(),
    "checkpoints/notes.txt": lambda run: (run / "checkpoints/notes.txt").write_text("") and None,
}

READ = ("N/", "M/", "checkpoints", "checksums", "config.json")
"""How the kinds begin that evaluation and export may look at."""
DRAWN = ("eval", "metrics.jsonl")
"""How the kinds begin that plots are made from, or take the place of; drawing takes long."""


class Outcome(NamedTuple):
    """What came of reading or resuming a damaged workdir."""

    text: str
    """For the table."""
    messages: tuple[str, ...]
    """Warnings, or the error."""
    bad: bool = False
    """A traceback, other weights, or a silent loss."""


class Undamaged(NamedTuple):
    """The run that every copy is compared with."""

    workdir: Path
    weights: dict[str, np.ndarray]
    losses: dict[int, float]
    backbone: dict[str, np.ndarray]
    """As readers see it."""


def config(workdir: Path) -> c.Config:
    """The tiny run: four steps on two devices, checkpoints of steps 2 and 4."""
    data = c.SyntheticConfig(identities=4, images_per_identity=4, pairs=20, pair_identities=4)
    return c.Config(
        workdir=str(workdir),
        devices=2,
        data=c.DataConfig(path="synthetic", global_batch_size=8, synthetic=data),
        model=c.ModelConfig(network="r_tiny", dtype="float32", embedding_size=32, bn_batch_size=8),
        head=c.HeadConfig(dtype="float32", margin=0.2, scale=16.0),
        schedule=c.ScheduleConfig(epochs=2),
        evaluation=c.EvaluationConfig(targets=("synthetic",), batch_size=8, every_epochs=1),
        checkpoint=c.CheckpointConfig(keep=3, best_metric="eval/synthetic/accuracy"),
        logging=c.LoggingConfig(every_steps=1, csv=True),
    )


def train_undamaged(workdir: Path) -> Undamaged:
    """The run, and beside what it writes the files of other commands and of runs that fail."""
    state = _arrays(train.train(config(workdir)).state)
    (workdir / "backbone.pth").write_bytes(bytes(1000))
    (workdir / "failure_3.json").write_text('{"step": 3}\n')
    lines = [{"step": n, "index": n, "where": f"image {n}", "problem": "cut"} for n in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "bad_images.jsonl").write_text(text)
    backbone = saved_runs.restore_backbone(workdir)[1]
    return Undamaged(workdir, state, _losses(workdir), _arrays(backbone))


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def _losses(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}


@contextlib.contextmanager
def damaged_copy(undamaged: Undamaged, pattern: str, harm: Damage) -> Iterator[Path]:
    """A copy of the workdir in which the largest file of a pattern is damaged.

    An empty pattern stands for the workdir.
    """
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(undamaged.workdir, Path(folder) / "run"))
        found = copy.glob(pattern) if pattern else [copy]
        harm(max(found, key=lambda path: path.stat().st_size))
        yield copy


def undrawn() -> contextlib.AbstractContextManager[object]:
    """Runs draw no plots in this context."""
    return mock.patch.object(train.evaluators, "draw", return_value=[])


def read(run: Path, undamaged: Undamaged) -> Outcome:
    """Open the newest weights, as evaluation and export do."""

    def check() -> str:
        _, params, _, step = saved_runs.restore_backbone(run)
        different = [] if step < 4 else _differences(_arrays(params), undamaged.backbone)
        return _differ(different) if different else f"step {step}"

    return _outcome(check)


def resume(run: Path, undamaged: Undamaged) -> Outcome:
    """Repeat the command."""

    def check() -> str:
        state = _arrays(train.train(config(run)).state)
        different = _differences(state, undamaged.weights)
        return _differ(different) if different else "equal"

    outcome = _outcome(check)
    if outcome.text != "equal":
        return outcome
    if any("falling back" in message for message in outcome.messages):
        outcome = outcome._replace(text="step 2")
    elif outcome.messages:
        outcome = outcome._replace(text="repaired")
    elif _losses(run) != undamaged.losses:
        outcome = outcome._replace(text="SILENT LOSS", bad=True)
    return outcome


def _differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[float]:
    """The largest difference of each array that is not bit-equal, largest first."""
    pairs = [(one[name].astype(float), other[name].astype(float)) for name in other]
    return sorted((float(abs(a - b).max()) for a, b in pairs if (a != b).any()), reverse=True)


def _differ(different: list[float]) -> str:
    return f"WEIGHTS DIFFER: {len(different)} ARRAYS BY UP TO {different[0]:.1E}"


def _outcome(check: Callable[[], str]) -> Outcome:
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            text = check()
    except UserError as error:
        return Outcome("refused", (str(error),), "\n" in str(error))
    except Exception:
        return Outcome("TRACEBACK", (traceback.format_exc(),), True)
    lines = output.getvalue().splitlines()
    return Outcome(text, tuple(x for x in lines if x.startswith("warning: ")), text.isupper())


def cells() -> Iterator[tuple[str, str, str, Damage]]:
    """Kind, damage, pattern and function of everything that is tried."""
    for kinds, damages in ((FILES, FILE_DAMAGES), (FOLDERS, FOLDER_DAMAGES)):
        for kind, pattern in kinds.items():
            for name, harm in damages.items():
                yield kind, name, pattern, harm
    for kind, harm in STRAYS.items():
        yield kind, "there", "", harm


def table(outcomes: dict[tuple[str, str], tuple[Outcome, Outcome]], which: int) -> str:
    """A table in Markdown: 0 of resuming, 1 of reading."""
    parts = []
    groups = ((FILES, FILE_DAMAGES), (FOLDERS, FOLDER_DAMAGES), (STRAYS, ("there",)))
    for kinds, damages in groups:
        rows = [["", *damages], ["---"] * (len(damages) + 1)]
        for kind in kinds:
            texts = [outcomes[kind, name][which].text for name in damages]
            if which == 0 or kind.startswith(READ):
                rows.append([f"`{kind}`", *texts])
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if anything is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", help="only these kinds of files and folders")
    parser.add_argument(
        "--store", type=Path, help="file of outcomes, of which --kinds replaces some"
    )
    parser.add_argument("--write", type=Path, help="the page whose tables are replaced")
    given = parser.parse_args(arguments)
    outcomes, bad = _stored(given.store), 0
    with TemporaryDirectory() as folder:
        undamaged = train_undamaged(Path(folder) / "run")
        for kind, name, pattern, harm in cells():
            if given.kinds and kind not in given.kinds:
                continue
            with damaged_copy(undamaged, pattern, harm) as run:
                seen = read(run, undamaged) if kind.startswith(READ) else Outcome("not read", ())
                with contextlib.nullcontext() if kind.startswith(DRAWN) else undrawn():
                    outcomes[kind, name] = (resume(run, undamaged), seen)
            for verb, outcome in zip(("resume", "read"), outcomes[kind, name], strict=True):
                bad += outcome.bad
                print(f"{kind}, {name}: {verb}: {outcome.text}", *outcome.messages, sep="\n    ")
            if given.store:  # at once: all of it takes an hour
                rows = [[*cell, *map(list, both)] for cell, both in outcomes.items()]
                given.store.write_text(json.dumps(rows, indent=1) + "\n")
    if given.write:
        _write(given.write, outcomes)
    print("RESULT " + json.dumps({"cells": len(outcomes), "bad": bad}))
    return 1 if bad else 0


def _stored(store: Path | None) -> dict[tuple[str, str], tuple[Outcome, Outcome]]:
    if store is None or not store.exists():
        return {}
    return {
        (kind, name): (Outcome(*resumed), Outcome(*seen))
        for kind, name, resumed, seen in json.loads(store.read_text())
    }


def _write(page: Path, outcomes: dict[tuple[str, str], tuple[Outcome, Outcome]]) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    tables = f"Resuming:\n\n{table(outcomes, 0)}\n\nReading:\n\n{table(outcomes, 1)}\n"
    page.write_text(before + BEGIN + tables + END + after)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    sys.exit(main())
