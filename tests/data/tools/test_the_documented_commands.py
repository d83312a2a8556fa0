"""Every command of docs/data.md, typed as it stands there."""

import importlib.util
import os
import sys
from pathlib import Path

import pages
import pytest

ROOT = Path(__file__).parents[3]
LFW = os.environ.get("ARCFACE_JAX_LFW", "")
PAGE = ROOT / "docs" / "data.md"
# Photographs of the page are faces already.
DETECTOR = """
from arcface_jax.data.faces import TEMPLATE

def find(image):
    return TEMPLATE[None]
"""
# The page's reader brings these two: faces by name, and a list of pairs of them.
THEIR_OWN = """
import pathlib, shutil
folder = pathlib.Path("lfw_aligned")
lines = ["5\\t6"]
people = sorted(path for path in pathlib.Path("runs/eval_faces").iterdir() if path.is_dir())[:5]
for number, person in enumerate(people):
    name = f"Person_{number}"
    (folder / name).mkdir(parents=True)
    for count, image in enumerate(sorted(person.iterdir())[:7], 1):
        shutil.copy(image, folder / name / f"{name}_{count:04}.jpg")
for fold in range(5):
    name, other = f"Person_{fold}", f"Person_{(fold + 1) % 5}"
    lines += [f"{name}\\t{a}\\t{a + 1}" for a in range(1, 7)]
    lines += [f"{name}\\t{a}\\t{other}\\t{a}" for a in range(1, 7)]
pathlib.Path("pairs.txt").write_text("\\n".join(lines) + "\\n")
"""


def test_the_page_has_commands_of_every_tool():
    text = "\n".join(pages.lines(PAGE))
    for tool in ("inspect", "pack", "to-tfds", "split", "pairs", "align", "merge", "bench"):
        assert f"arcface-jax data {tool} " in text, tool


@pytest.mark.slow
@pytest.mark.skipif(not LFW, reason="set ARCFACE_JAX_LFW to the folder of train.rec")
def test_the_commands_run_as_they_stand(tmp_path: Path):
    (tmp_path / "detector.py").write_text(DETECTOR)
    (tmp_path / "their_own.py").write_text(THEIR_OWN)
    lines = []
    for line in pages.lines(PAGE):
        if "lmdb" in line and importlib.util.find_spec("lmdb") is None:
            continue
        if "pairs.txt:" in line:
            lines.append("arcface-jax data pack runs/data/eval runs/eval_faces --format folder")
            lines.append("python their_own.py")
        lines.append(line)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pages.run(lines, tmp_path, LFW=LFW, DETECTOR="detector:find", PATH=path)
