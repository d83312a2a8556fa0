"""The commands inference.py and calibrate.py on torch weights, beside the torch network."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import script

from arcface_jax import cli
from arcface_jax.commands import calibrate, evaluate
from arcface_jax.convert import parity, torch_iresnet, weights
from arcface_jax.data.synthetic import faces
from arcface_jax.evaluation import verification
from arcface_jax.inference import bulk
from arcface_jax.models import registry

FACES = np.stack([faces.draw_face(seed=3, identity=i, index=0) for i in range(3)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """b.pth, faces/0.png .. 2.png, pairs.bin."""
    path = tmp_path_factory.mktemp("inference")
    params, batch_stats = registry.build("r_tiny", embedding_size=16).init(0)
    torch.save(weights.to_state_dict(params, batch_stats), path / "b.pth")
    (path / "faces").mkdir()
    for i, face in enumerate(FACES):
        cv2.imwrite(str(path / "faces" / f"{i}.png"), face[..., ::-1])
    images, same = faces.verification_pairs(seed=3, first_identity=9, identities=6, pairs=40)
    encoded = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images]
    _write_bin(path / "pairs.bin", encoded, same.tolist())
    return path


def _write_bin(path: Path, encoded: list[bytes], same: list[bool]) -> None:
    path.write_bytes(pickle.dumps((encoded, same), protocol=4))


@pytest.fixture(scope="module")
def twin(folder: Path):
    module = torch_iresnet.build("r_tiny", embedding_size=16)
    module.load_state_dict(torch.load(folder / "b.pth", weights_only=True), strict=True)
    return lambda images: parity.torch_embeddings(module, np.ascontiguousarray(images))


@pytest.fixture
def run(folder: Path, capsys, monkeypatch):
    """Runs a command on the torch weights and gives RESULT, or the message of an error."""
    monkeypatch.chdir(folder)

    def command(name: str, *words: str) -> dict:
        argv = ["--weight", "b.pth", "--network", "r_tiny", *words]
        try:
            script(name).main(argv)
        except SystemExit as stop:
            assert stop.code == 2
            return {"error": capsys.readouterr().err}
        printed = capsys.readouterr()
        last = printed.out.splitlines()[-1]
        return {**json.loads(last.removeprefix("RESULT ")), "out": printed.out, "err": printed.err}

    return command


def test_a_folder_is_printed_or_saved(run, twin, folder):
    lines = run("inference", "--img", "faces")["out"].splitlines()[:3]
    assert [line.split()[0] for line in lines] == ["0.png", "1.png", "2.png"]
    rows = np.array([line.split()[1:] for line in lines], float)
    assert parity.largest_error(rows, twin(FACES)) < 3e-6
    options = ("--img", "faces", "--output", "out", "--shard-size", "2", "--batch-size", "8")
    done = run("inference", *options)
    assert (done["embedded"], done["shards"], done["kept"]) == (3, 2, 0)
    assert parity.largest_error(bulk.read(folder / "out")[1], twin(FACES)) < 3e-6
    assert run("inference", *options)["kept"] == 2


def test_one_image_is_saved_and_a_photograph_is_aligned(run, twin, folder):
    run("inference", "--img", "faces/0.png", "--output", "x.npy", "--flip")
    expected = twin(FACES[:1]) + twin(FACES[:1, :, ::-1])
    # Not of length 1, so compared as all embeddings are: with ||a - b|| / ||b||.
    assert parity.largest_error(np.load("x.npy"), expected) < 3e-6
    shifted = np.zeros((130, 140, 3), np.uint8)
    shifted[10:122, 20:132] = FACES[1]
    cv2.imwrite("shifted.png", shifted[..., ::-1])
    five = "58.2946 61.6963 93.5318 61.5014 76.0252 81.7366 61.5493 102.3655 90.7299 102.2041"
    Path("points.txt").write_text(f"shifted.png {five} 0.99\n")
    for points in (five.split(), ["points.txt"]):
        words = ("--img", "shifted.png", "--normalized", "--output", "y.npy")
        assert not run("inference", *words, "--points", *points)["err"]
        expected = twin(FACES[1:2])
        np.testing.assert_allclose(np.load("y.npy"), expected / np.linalg.norm(expected), atol=1e-4)


@pytest.mark.parametrize("flip", [False, True])
def test_calibrated_then_verified(run, twin, flip):
    words = ["--pairs", "pairs.bin", "--far", "0.1", "--output", "c.json", *(["--flip"] * flip)]
    found = run("calibrate", *words)
    assert found["different_pairs"] == 20 and not found["enough_pairs"]
    assert "too few pairs of different people for a reliable threshold: 20" in found["out"]
    verdict = run("inference", "--verify", "faces/0.png", "faces/1.png", "--calibration", "c.json")
    raw = twin(FACES[:2]) + (twin(FACES[:2, :, ::-1]) if flip else 0)
    cosine = 1 - verification.pair_distances(raw)[0] / 2
    assert verdict["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert verdict["same"] == (cosine >= found["threshold_cosine"])
    assert verdict["threshold"] == found["threshold_cosine"]


def test_a_gallery_of_a_folder_is_searched_with_a_detector(run, twin, folder, capsys, monkeypatch):
    """The photograph shows face 1 off its middle; the detector gives its points."""
    run("inference", "--img", "faces", "--output", "shards", "--normalized")
    assert cli.main(["gallery", "build", "shards", "--output", "gallery", "--form", "int8"]) == 0
    photo = np.zeros((130, 140, 3), np.uint8)
    photo[10:122, 20:132] = FACES[1]
    cv2.imwrite("photo.png", photo[..., ::-1])
    (folder / "own_points.py").write_text(
        "from arcface_jax.data.faces import TEMPLATE\n"
        "def find(image):\n    return TEMPLATE[None] + [20, 10]\n"
    )
    monkeypatch.syspath_prepend(folder)
    words = ["--weight", "b.pth", "--img", "photo.png", "--detector", "own_points:find", "--k", "2"]
    assert cli.main(["gallery", "search", "gallery", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    raw = twin(FACES).astype(np.float64)
    cosines = raw @ raw[1] / np.linalg.norm(raw, axis=1) / np.linalg.norm(raw[1])
    order = np.argsort(-cosines)[:2]
    assert result["names"] == [f"{i}.png" for i in order]
    np.testing.assert_allclose(result["cosines"], cosines[order], atol=1e-4)


def test_a_pair_between_two_thresholds_is_to_be_checked(run, folder):
    run(
        "calibrate",
        "--pairs",
        "pairs.bin",
        "--far",
        "0.1",
        "--far-check",
        "0.5",
        "--output",
        "d.json",
    )
    stored = json.loads(Path("d.json").read_text())
    assert stored["threshold_check"] < stored["threshold_cosine"]
    Path("d.json").write_text(
        json.dumps({**stored, "threshold_cosine": 1.5, "threshold_check": 0.9})
    )
    same = run("inference", "--verify", "faces/0.png", "faces/0.png", "--calibration", "d.json")
    assert (same["verdict"], same["same"], same["threshold_check"]) == ("check", False, 0.9)
    assert (
        "to be checked by a person: cosine 1.0000, threshold 1.5000, to check from" in same["out"]
    )


def test_verdicts_by_a_number_and_without(run):
    pair = ("--verify", "faces/0.png", "faces/0.png")
    same = run("inference", *pair, "--threshold", "0.99")
    assert same["same"] is True and "the same person: cosine 1.0000" in same["out"]
    other = ("--verify", "faces/0.png", "faces/1.png")
    assert run("inference", *other, "--threshold", "1")["same"] is False
    assert "same" not in run("inference", *pair)


@pytest.mark.parametrize(
    ("name", "words", "named"),
    [
        ("inference", "--checkpoint x", "2 networks are named (--workdir, --weight)"),
        ("inference", "--img no.png", "no image at no.png"),
        ("inference", "--img faces/0.png --output x.txt", "saved as a .npy file"),
        ("inference", "--img faces/0.png --points 1 2 3", "are not five points"),
        ("inference", "--img faces --points 1 2 3", "name a file of lines"),
        (
            "inference",
            "--img faces --calibration c.json",
            "--calibration c.json goes with --verify",
        ),
        ("inference", "--img faces/0.png --threshold 0.3", "--threshold 0.3 goes with --verify"),
        ("inference", "--verify a b --output x.npy", "--output x.npy does not go with --verify"),
        ("inference", "--verify a b --normalized", "--normalized does not go with --verify"),
        (
            "inference",
            "--verify a b --calibration c.json --threshold 0.3",
            "--threshold 0.3 does not go with --calibration c.json",
        ),
        ("inference", "--verify faces/0.png faces/1.png --threshold 1.45", "1 - d / 2"),
        ("calibrate", "--pairs no.bin --output c.json", "no verification set at"),
        ("calibrate", "--pairs pairs.bin --output no/c.json", "there is no folder no"),
        ("calibrate", "--pairs pairs.bin --far 2 --output d.json", "between 0 and 1"),
        ("calibrate", "--pairs pairs.bin --output d.json", "20 pairs of different people cannot"),
    ],
)
def test_errors_in_one_message(run, name, words, named):
    assert named in run(name, *words.split())["error"]


def test_a_report_that_cannot_be_written_ends_evaluate_before_it_embeds(run, folder, monkeypatch):
    (folder / "a_file").write_bytes(b"")
    monkeypatch.setattr(evaluate, "open_models", None)
    words = ["--targets", "pairs.bin", "--report", "a_file"]
    assert "cannot use a_file: File exists" in run("evaluate", *words)["error"]


def test_calibrate_embeds_nothing_for_rates_that_the_pairs_cannot_show(run, monkeypatch):
    monkeypatch.setattr(calibrate, "open_model", None)
    words = ["--pairs", "pairs.bin", "--output", "d.json", "--far"]
    assert "20 pairs of different people cannot" in run("calibrate", *words, "0.001")["error"]
    assert "higher --far-check" in run("calibrate", *words, "0.1", "--far-check", "0.1")["error"]


def test_flip_does_not_change_the_form_of_a_calibration(run):
    run("calibrate", "--pairs", "pairs.bin", "--far", "0.1", "--no-flip", "--output", "single.json")
    words = ["--verify", "faces/0.png", "faces/1.png", "--calibration", "single.json", "--flip"]
    assert "--flip does not go with --calibration single.json" in run("inference", *words)["error"]


def test_pairs_to_calibrate_on_may_be_a_list_and_a_folder(run, folder):
    images, same = pickle.loads((folder / "pairs.bin").read_bytes())
    (folder / "listed").mkdir()
    for number, image in enumerate(images):
        (folder / "listed" / f"{number}.png").write_bytes(image)
    lines = [f"{2 * i}.png,{2 * i + 1}.png,{int(one)}" for i, one in enumerate(same)]
    (folder / "pairs.csv").write_text("\n".join(lines))
    words = ["--far", "0.1", "--output", "listed.json", "--pairs"]
    by_list, by_bin = (run("calibrate", *words, p) for p in ("pairs.csv:listed", "pairs.bin"))
    del by_list["seconds"], by_bin["seconds"], by_list["out"], by_bin["out"]
    assert by_list == by_bin | {"set_name": "pairs"}


def test_a_calibration_of_another_model_is_refused(run, folder):
    words = ("--far", "0.1", "--output", "other.json")
    assert run("calibrate", "--pairs", "pairs.bin", *words)["files"] == ["other.json"]
    stored = json.loads((folder / "other.json").read_text())
    (folder / "other.json").write_text(json.dumps({**stored, "model": "0" * 64}))
    pair = ("--verify", "faces/0.png", "faces/1.png", "--calibration", "other.json")
    assert "the calibration is of another model" in run("inference", *pair)["error"]
