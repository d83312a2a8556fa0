"""The pictures: where ink lies, and which pairs are shown."""

import json
from pathlib import Path

import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.evaluation.report import plots


def ink(path: Path, *, left: float = 0.0, right: float = 1.0) -> float:
    """Share of a PNG's pixels, between two fractions of its width, that are not white."""
    image = matplotlib.image.imread(path)[..., :3]
    width = image.shape[1]
    return float(np.mean(image[:, int(left * width) : int(right * width)].min(2) < 0.95))


def write_log(workdir: Path, *, evaluations: bool) -> None:
    lines: list[dict[str, float]] = [{"step": 0, "baseline/raw": 0.55}]
    for step in range(10, 110, 10):
        line = {"train/loss": 40.0 / step, "train/accuracy": step / 100, "train/lr": 0.1}
        lines.append({"step": step, **line})
        if evaluations and step % 50 == 0:
            names = {"accuracy": 0.9, "accuracy_std": 0.1, "threshold": 1.5}
            lines.append({"step": step} | {f"eval/lfw/{k}": v for k, v in names.items()})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_curves_show_loss_accuracy_and_rate(tmp_path: Path):
    write_log(tmp_path, evaluations=False)
    path = plots.training_curves(tmp_path)
    assert path == tmp_path / "eval" / "curves.png"
    plain = [ink(path, left=k / 3, right=(k + 1) / 3) for k in range(3)]
    assert min(plain) > 0.01
    write_log(tmp_path, evaluations=True)
    plots.training_curves(tmp_path)
    evaluated = [ink(path, left=k / 3, right=(k + 1) / 3) for k in range(3)]
    assert evaluated[1] > plain[1]  # one curve more, and its line in the legend
    assert evaluated[0] == pytest.approx(plain[0], rel=0.05)


def test_without_a_step_there_are_no_curves(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "baseline/raw": 0.5}\n')
    assert plots.training_curves(tmp_path) is None
    assert not (tmp_path / "eval").exists()


def panels(path: Path, *, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) bool: where a dark image stands."""
    image = matplotlib.image.imread(path)[..., :3].max(2)
    height, width = image.shape
    cells = image[: height - height % rows, : width - width % columns]
    cells = cells.reshape(rows, height // rows, columns, width // columns)
    return (cells < 0.5).mean((1, 3)) > 0.2


def test_the_sheet_shows_each_kind_of_pair_as_far_as_there_are_any(tmp_path: Path):
    same = np.array([True] * 12 + [False] * 4)
    pairs = PairSet("made", np.full((32, 112, 112, 3), 60, np.uint8), same)
    # 10 recognized, 2 missed; 3 told apart, 1 confused.
    distance = np.array([0.5] * 10 + [2.0] * 2 + [2.0] * 3 + [0.5])
    path = tmp_path / "eval" / "made_pairs.png"
    assert plots.pair_sheet(pairs, distance, threshold=1.0, path=path) == path
    shown = panels(path, rows=4, columns=5)
    assert shown.sum(1).tolist() == [5, 3, 2, 1]
    fewer = plots.pair_sheet(pairs, distance, threshold=1.0, path=path, examples=2)
    assert panels(fewer, rows=4, columns=2).sum(1).tolist() == [2, 2, 2, 1]


def test_the_sheet_is_spread_over_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    imshow = matplotlib.axes.Axes.imshow

    def record(axis, image):
        drawn.append(image)
        return imshow(axis, image)

    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", record)
    images = np.zeros((200, 112, 112, 3), np.uint8)
    images += np.arange(200, dtype=np.uint8)[:, None, None, None]
    pairs = PairSet("made", images, np.ones(100, bool))
    plots.pair_sheet(pairs, np.zeros(100), threshold=1.0, path=tmp_path / "a.png", examples=4)
    assert [image.shape for image in drawn] == [(112, 224, 3)] * 4
    assert [int(image[0, 0, 0]) for image in drawn] == [0, 50, 100, 150]
    assert [int(image[0, -1, 0]) for image in drawn] == [1, 51, 101, 151]
