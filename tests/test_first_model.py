"""Every command of docs/first_model.md, typed as it stands there."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pages
import pytest

from arcface_jax import config as configs
from arcface_jax.convert import parity
from arcface_jax.convert.onnx_graph import Form, write
from arcface_jax.data.faces import TEMPLATE
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.training import checkpoint
from arcface_jax.training.network import Network

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first_model.md"
PEOPLE, IMAGES, LEFT, TOP = 30, 10, 70, 40
# Finds the face where the photographs have it, and none in the others.
DETECTOR = f"""
import numpy as np
from arcface_jax.data.faces import TEMPLATE

def find(image):
    points = (TEMPLATE + ({LEFT}, {TOP}))[None]
    return points if image.shape[:2] == (200, 260) else points[:0]
"""


def test_the_page_goes_from_photographs_to_a_verdict():
    text = "\n".join(pages.lines(PAGE))
    steps = (
        "align, inspect, split, pairs, import, train small_own, evaluate, calibrate, export onnx"
    )
    for step in f"{steps}, embed, verify".split(", "):
        assert re.search(rf"arcface-jax (data )?{step} ", text), step


def photographs(folder: Path) -> None:
    """300 drawn faces in larger pictures, and one picture of nobody."""
    for person in range(PEOPLE):
        (folder / f"person {person}").mkdir(parents=True)
        for number in range(IMAGES):
            picture = np.full((200, 260, 3), 90, np.uint8)
            face = draw_face(seed=5, identity=person, index=number)
            picture[TOP : TOP + 112, LEFT : LEFT + 112] = face[..., ::-1]
            cv2.imwrite(str(folder / f"person {person}" / f"{number}.png"), picture)
    cv2.imwrite(str(folder / "person 0" / "nobody.png"), np.zeros((99, 99, 3), np.uint8))


def weights(folder: Path) -> None:
    """r_tiny with random weights, as an ONNX file."""
    params, batch_stats = parity.settled("r_tiny", parity.drawn_faces())
    path = folder / "given"
    config = configs.replace(configs.Config(), workdir=str(path), model__network="r_tiny")
    checkpoint.save_weights(config, params, batch_stats)
    write(folder / "weights.onnx", Network.from_workdir(path, devices=1), Form())


@pytest.mark.slow
def test_the_commands_run_as_they_stand(tmp_path: Path):
    photographs(tmp_path / "photographs")
    weights(tmp_path)
    (tmp_path / "detector.py").write_text(DETECTOR)
    assert TEMPLATE.shape == (5, 2)
    shown = [line for line in pages.lines(PAGE) if not line.startswith("export ")]
    printed = pages.run(
        shown,
        tmp_path,
        PHOTOS="photographs",
        WEIGHTS="weights.onnx",
        NETWORK="--model.network r_tiny",
        DETECTOR="detector:find",
        FIRST="runs/faces/person 0/0.jpg",
        SECOND="runs/faces/person 0/1.jpg",
    )
    results = re.findall(r"^RESULT (.*)$", printed, re.MULTILINE)
    assert len(results) == len(shown)
    assert re.search(rf"{PEOPLE * IMAGES} faces in runs/faces.*, 1 rejected", printed)
    for page in ("runs/faces/align.html", "runs/inspect/index.html", "runs/report/index.html"):
        assert "<svg" in (tmp_path / page).read_text(), page
    assert (tmp_path / "runs/own/backbone.pth").exists()
    trained = next(line for line in map(json.loads, results) if "before/own/accuracy" in line)
    assert trained["eval/own/accuracy"] > trained["before/own/accuracy"]
