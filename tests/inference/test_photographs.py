"""Photographs, and both forms of a threshold, in every command that embeds a face."""

import dataclasses
import json
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_jax import cli
from arcface_jax.commands import calibrate, embed, evaluate
from arcface_jax.data.synthetic import faces
from arcface_jax.evaluation import verification
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.inference import bulk

IMAGES, SAME = faces.verification_pairs(seed=3, first_identity=9, identities=6, pairs=40)
LISTED = "photographs.csv:photographs"
HOW = ("--detector", "two_faces:find")


class Blocks:
    """Means of blocks of 14 x 14 pixels, which differ in mirrored faces."""

    input = ModelInput(embedding_size=192, digest="a" * 64)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        blocks = images.reshape(len(images), 8, 14, 8, 14, 3).mean(axis=(2, 4))
        return (blocks.reshape(len(images), -1) - 127.5).astype(np.float32)

    def digest(self) -> str:
        return self.input.digest


@pytest.fixture
def run(tmp_path: Path, capsys, monkeypatch):
    """Runs a command on `Blocks` and gives RESULT with what was printed, or the error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embed, "open_model", lambda *_, **__: Blocks())
    monkeypatch.setattr(calibrate, "open_model", lambda *_, **__: Blocks())
    monkeypatch.setattr(evaluate, "open_models", lambda *_, **__: {"blocks": Blocks()})

    def command(*words: str) -> dict:
        try:
            assert cli.main(list(words)) == 0
        except SystemExit as stop:
            assert stop.code == 2
            return {"error": capsys.readouterr().err}
        printed = capsys.readouterr()
        last = printed.out.splitlines()[-1]
        return {**json.loads(last.removeprefix("RESULT ")), "out": printed.out, "err": printed.err}

    return command


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch) -> None:
    """The pairs as pairs.bin, and as photographs with the face off the middle."""
    encoded = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in IMAGES]
    (tmp_path / "pairs.bin").write_bytes(pickle.dumps((encoded, SAME.tolist()), protocol=4))
    folder = tmp_path / "photographs" / "ada"
    folder.mkdir(parents=True)
    for number, image in enumerate(IMAGES):
        photo = np.zeros((130, 140, 3), np.uint8)
        photo[10:122, 20:132] = image[..., ::-1]
        cv2.imwrite(str(folder / f"{number}.png"), photo)
    lines = [f"ada/{2 * i}.png,ada/{2 * i + 1}.png,{int(one)}" for i, one in enumerate(SAME)]
    (tmp_path / "photographs.csv").write_text("\n".join(lines))
    # Finds the face, and a larger one that is further from the middle.
    (tmp_path / "two_faces.py").write_text(
        "import numpy as np\n"
        "from arcface_jax.data.faces import TEMPLATE\n"
        "def find(image):\n"
        "    return np.stack([TEMPLATE + [20, 10], 1.2 * TEMPLATE - 60])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize(
    "words",
    [
        ("embed", "--img", "photographs/ada/0.png"),
        ("embed", "--img", "photographs"),
        ("verify", "photographs/ada/0.png", "photographs/ada/0.png"),
        ("calibrate", "--pairs", LISTED, "--far", "0.1", "--output", "c.json"),
        ("evaluate", "--targets", LISTED),
    ],
)
def test_a_photograph_without_points_is_refused_by_every_command(run, words):
    error = run(*words)["error"]
    assert (
        "ada/0.png is 140 x 130; expected an aligned face of 112 x 112: align it first "
        "(`arcface-jax data align`), or pass" in error
    )
    assert "--detector FILE" in error
    assert len(error.splitlines()) == 1
    assert not Path("c.json").exists()


@pytest.mark.usefixtures("photographs")
def test_one_detector_aligns_for_every_command(run):
    """The central crops are the aligned faces again; the largest face is another one."""
    photo, expected = "photographs/ada/0.png", Blocks()(IMAGES)
    run("embed", "--img", photo, "--output", "center.npy", *HOW, "--choose", "center")
    np.testing.assert_allclose(np.load("center.npy"), expected[:1], atol=0.5)
    run("embed", "--img", photo, "--output", "largest.npy", *HOW)
    assert np.abs(np.load("largest.npy") - expected[0]).max() > 20
    done = run("embed", "--img", "photographs", "--output", "shards", *HOW)
    assert "--choose auto: nearest to the center in an identity's folder" in done["err"]
    ids, rows = bulk.read(Path("shards"))
    numbers = [int(Path(name).stem) for name in ids]
    np.testing.assert_allclose(rows, expected[numbers], atol=0.5)
    verdict = run("verify", photo, "photographs/ada/1.png", *HOW, "--choose", "center")
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert verdict["cosine"] == pytest.approx(unit[0] @ unit[1], abs=1e-3)
    for command in (
        ["calibrate", "--far", "0.1", "--output", "x.json", "--pairs"],
        ["evaluate", "--targets"],
    ):
        aligned, detected = run(*command, "pairs.bin"), run(*command, LISTED, *HOW)
        (a,), (b,) = (
            [value for name, value in found.items() if name.endswith("threshold_cosine")]
            for found in (aligned, detected)
        )
        assert a == pytest.approx(b, abs=2e-3)
        assert "--choose auto" in detected["out"]


@pytest.mark.usefixtures("photographs")
def test_photographs_in_a_bin_are_aligned_where_a_detector_is_given(run):
    photos = [Path(f"photographs/ada/{i}.png").read_bytes() for i in range(len(IMAGES))]
    Path("loose.bin").write_bytes(pickle.dumps((photos, SAME.tolist()), protocol=4))
    found = run("evaluate", "--targets", "loose.bin", *HOW, "--choose", "center")
    listed = run("evaluate", "--targets", LISTED, *HOW)
    for name in ("accuracy", "auc", "threshold_cosine_single"):
        assert found[f"eval/loose/{name}"] == listed[f"eval/photographs/{name}"]


@pytest.mark.usefixtures("photographs")
def test_the_threshold_is_given_for_both_forms_by_name(run):
    found = run("evaluate", "--targets", "pairs.bin", "--report", "report")
    single, mirrored = Blocks()(IMAGES), Blocks()(IMAGES[:, :, ::-1])
    page = Path("report/index.html").read_text()
    cosines = []
    for name, rows in (("", single + mirrored), ("_single", single)):
        _, thresholds = verification.ten_fold(verification.pair_distances(rows), SAME)
        cosines.append(1 - thresholds.mean() / 2)
        assert found[f"eval/pairs/threshold_cosine{name}"] == pytest.approx(cosines[-1], abs=1e-6)
        assert f"<td>{cosines[-1]:.4f}</td>" in page
    assert "Single embeddings, f(image)" in page
    words = " ".join(found["out"].split())
    assert f"cosine threshold {cosines[0]:.4f} for f(image) + f(mirrored image)" in words
    assert f"{cosines[1]:.4f} for single embeddings" in words
    # The second table has the operating point that calibrate finds: the lowest score accepted, of
    # which calibrate goes half the way to the next.
    calibrated = run("calibrate", "--pairs", "pairs.bin", "--far", "0.1", "--output", "c.json")
    table = page[page.index("Single embeddings, f(image)") :]
    cells = re.search(r">1e-1</th>\s*<td>([0-9.]+)</td><td>[0-9.]+</td><td>([0-9.]+)", table)
    assert cells and float(cells[2]) == pytest.approx(calibrated["tar"], abs=1e-4)
    score = 1 - verification.pair_distances(single) / 2
    below = score[score < float(cells[1]) - 1e-4].max()
    assert calibrated["threshold_cosine"] == pytest.approx((float(cells[1]) + below) / 2, abs=1e-4)


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize("stored", [True, False])
def test_the_form_of_a_calibration_is_the_models_own(run, monkeypatch, stored: bool):
    monkeypatch.setattr(Blocks, "input", dataclasses.replace(Blocks.input, flip=stored))
    words = ["calibrate", "--pairs", "pairs.bin", "--far", "0.1", "--output", "c.json"]
    found = run(*words)
    assert found["flip"] is stored
    form = "f(image) + f(mirrored image)" if stored else "single embeddings"
    assert f", for {form}" in found["out"]
    assert run(*words, "--no-flip" if stored else "--flip")["flip"] is not stored
