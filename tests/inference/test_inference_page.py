"""Every command of docs/inference.md, typed as it stands there."""

from pathlib import Path

import cv2
import pages
import pytest

from arcface_jax import config as configs
from arcface_jax.convert import parity
from arcface_jax.convert.onnx_graph import Form, write
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.training import checkpoint
from arcface_jax.training.network import Network

PAGE = pages.ROOT / "docs" / "inference.md"
# What the page's reader brings, but for the run and the faces.
BROUGHT = [
    "arcface-jax export torch --workdir runs/lfw_tiny --output runs/lfw_tiny/backbone.pth",
    "arcface-jax data pairs people lfw_dev.bin --pairs 200",
    "cp lfw_dev.bin lfw.bin",
]


@pytest.mark.slow
def test_the_commands_run_as_they_stand(tmp_path: Path):
    run = tmp_path / "runs" / "lfw_tiny"
    params, batch_stats = parity.settled("r_tiny", parity.drawn_faces())
    config = configs.replace(configs.Config(), workdir=str(run), model__network="r_tiny")
    checkpoint.save_weights(config, params, batch_stats)
    write(tmp_path / "other.onnx", Network.from_workdir(run, devices=1), Form())
    (tmp_path / "faces").mkdir()
    for person in range(10):
        folder = tmp_path / "people" / str(person)
        folder.mkdir(parents=True)
        for index in range(6):
            face = draw_face(seed=3, identity=person, index=index)[..., ::-1]
            cv2.imwrite(str(folder / f"{index}.png"), face)
            if person < 2:
                name = f"{('ada', 'grace')[person]}_{index + 1}.png"
                cv2.imwrite(str(tmp_path / "faces" / name), face)
    printed = pages.run([*BROUGHT, *pages.lines(PAGE)], tmp_path)
    assert printed.count("RESULT ") == len(BROUGHT) - 1 + len(pages.lines(PAGE))
    assert (tmp_path / "my-model" / "model.safetensors").exists()
