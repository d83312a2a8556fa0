"""Duplicates among the class centers of a run that was trained with them: drawn faces."""

import csv
from pathlib import Path

import numpy as np
import pytest
from commands import result, script

from arcface_jax.cleaning import files, pipeline
from arcface_jax.config import DataConfig, SyntheticConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.tools import packing
from arcface_jax.data.tools.packing import Selection
from arcface_jax.training import saved_runs

PEOPLE, SHOTS, TWICE = 400, 36, 40


def write_set(folder: Path) -> Path:
    """The demo's people; of the first 40 every other image has a label of its own."""
    drawn = SyntheticConfig(identities=PEOPLE, images_per_identity=SHOTS)
    source = open_source(DataConfig(path="synthetic", synthetic=drawn), seed=0)
    labels = source.labels().copy()
    for person in range(TWICE):
        labels[np.flatnonzero(labels == person)[1::2]] = PEOPLE + person
    order = np.argsort(labels, kind="stable")
    packing.pack(source, Selection(order, labels[order], PEOPLE + TWICE), folder)
    return folder


@pytest.mark.slow
def test_people_under_two_labels_are_found_from_the_centers_of_one_epoch(tmp_path, capsys):
    data, workdir = str(write_set(tmp_path / "set")), tmp_path / "run"
    recipe = Path(__file__).parents[2] / "configs" / "demo.py"
    words = [str(recipe), "--data.path", data, "--workdir", str(workdir)]
    assert script("train").main([*words, "--evaluation.targets", "--evaluation.no-baselines"]) == 0
    capsys.readouterr()
    found = tmp_path / "clean"
    words = ["clean", str(workdir), "--data", data, "--level", "centers", "--output", str(found)]
    assert script("data").main(words) == 0
    values = result(capsys.readouterr().out)

    truth = {(person, PEOPLE + person) for person in range(TWICE)}
    centers, _ = saved_runs.restore_centers(workdir)
    labels = open_source(DataConfig(path=data), seed=0).labels()
    candidates = pipeline.nearest_centers(centers, labels)
    proposed = truth & {(min(pair), max(pair)) for pair in candidates.tolist()}
    with (found / files.DUPLICATES).open(newline="") as file:
        rows = list(csv.DictReader(file))
    merged = {
        tuple(sorted((int(row["label_a"]), int(row["label_b"]))))
        for row in rows
        if row["decision"] == "merge"
    }
    with capsys.disabled():
        print(
            f"{len(proposed)} of {TWICE} among the candidates; {len(truth & merged)} merged, "
            f"{len(merged - truth)} wrongly; {values}"
        )
    assert len(proposed) == TWICE
    assert len(truth & merged) >= 38
    assert len(truth & merged) >= 0.9 * len(merged)
