"""The commands from arguments to RESULT line, with a network that the torch twin checks."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import plain_ijb
import pytest
import torch
from commands import HANG, ROOT, result, script
from sklearn.metrics import roc_auc_score

from arcface_jax.convert import twins
from arcface_jax.data import opening


@pytest.fixture
def run(capsys):
    """Runs a command in this process; gives its RESULT and all it printed."""

    def run(name: str, *arguments: str | Path) -> tuple[dict, str]:
        script(name).main([str(argument) for argument in arguments])
        out = capsys.readouterr().out
        return result(out), out

    return run


@pytest.fixture(scope="module")
def twin() -> torch.nn.Module:
    torch.manual_seed(0)
    return twins.build("r_tiny").eval()


@pytest.fixture(scope="module")
def weight(twin, tmp_path_factory) -> list[str | Path]:
    path = tmp_path_factory.mktemp("weight") / "backbone.pth"
    torch.save(twin.state_dict(), path)
    return ["--weight", path, "--network", "r_tiny", "--batch-size", "64"]


@pytest.fixture(scope="module")
def ijbc(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "ijbc"
    made = ["--output", str(folder), "--subjects", "10", "--pairs", "300"]
    script("make_ijb").main(made)
    return folder


def test_ijb_from_the_command_line_equals_the_torch_twin_and_plain_loops(
    run, ijbc, twin, weight, tmp_path
):
    options = ["--options", "NDF", "N", "none", "--output", tmp_path]
    metrics, out = run("evaluate_ijb", *weight, "--data", ijbc, *options)

    def embed(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy((images.transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5)
        with torch.no_grad():
            return twin(x).numpy()

    entries = plain_ijb.features(ijbc, "ijbc", embed)
    probes = plain_ijb.enrolled(ijbc, "ijbc_1N_probe_mixed")
    galleries = [plain_ijb.enrolled(ijbc, f"ijbc_1N_gallery_{g}") for g in ("G1", "G2")]
    for letters, name in (("NDF", "ijbc"), ("N", "ijbc_N"), ("", "ijbc_none")):
        pooled = plain_ijb.templates(entries, letters)
        score, label = plain_ijb.pair_scores(ijbc, "ijbc", pooled)
        assert metrics[f"eval/{name}/auc"] == pytest.approx(roc_auc_score(label, score), abs=1e-3)
        tar = plain_ijb.standard_tar(score, label, 0.1)
        assert metrics[f"eval/{name}/tar@far=1e-1"] == pytest.approx(tar, abs=0.04)
        expected = plain_ijb.standard_identification(probes, galleries, pooled)
        assert metrics[f"eval/{name}/rank1"] == pytest.approx(expected["rank1"], abs=0.05)
    assert 0.55 < metrics["eval/ijbc/auc"] < 0.99
    assert "too few for a FAR of 1e-3 (needs 1,000)" in " ".join(out.split())
    report, picture = (Path(file) for file in metrics["files"])
    assert [part["options"] for part in json.loads(report.read_text())] == ["NDF", "N", "none"]
    assert cv2.imread(str(picture)).std() > 10


def test_a_second_run_embeds_nothing_and_other_weights_are_refused(
    run, ijbc, weight, tmp_path, capsys
):
    arguments = ["--data", ijbc, "--output", tmp_path]
    first, _ = run("evaluate_ijb", *weight, *arguments)
    shard = tmp_path / "features" / "00000.npy"
    written = shard.stat().st_mtime_ns
    again, _ = run("evaluate_ijb", *weight, *arguments)
    assert shard.stat().st_mtime_ns == written
    del first["seconds"], again["seconds"]
    assert first == again
    torch.save(twins.build("r_tiny").state_dict(), tmp_path / "other.pth")
    with pytest.raises(SystemExit):
        run("evaluate_ijb", "--weight", tmp_path / "other.pth", *weight[2:], *arguments)
    assert "with other settings: model was" in capsys.readouterr().err


def write_people(folder: Path, *, first: int, people: int = 6, images: int = 3) -> None:
    source = opening.SyntheticSource(seed=2, identities=people, images_per_identity=6)
    for person in range(people):
        (folder / f"p{person}").mkdir(parents=True)
        for k in range(first, first + images):
            image, _ = source[6 * person + k]
            cv2.imwrite(str(folder / f"p{person}" / f"{k}.png"), image[:, :, ::-1])


def test_retrieval_and_all_pairs_of_folders(run, weight, tmp_path):
    write_people(tmp_path / "gallery", first=0)
    write_people(tmp_path / "probe", first=3)
    folders = ["--gallery", tmp_path / "gallery", "--probe", tmp_path / "probe"]
    output = ["--output", tmp_path / "out"]
    plain, _ = run("evaluate_protocol", "retrieval", *weight, *folders, *output)
    assert 0.4 < plain["eval/retrieval/rank1"] <= plain["eval/retrieval/rank5"]
    assert plain["eval/retrieval/rank20"] == 1  # 15 images of others
    # Distractors that are the probes themselves push every mate back.
    distractors = ["--distractors", tmp_path / "probe"]
    pushed, out = run("evaluate_protocol", "retrieval", *weight, *folders, *distractors, *output)
    assert pushed["eval/retrieval/rank1"] == 0
    assert "18 probes in 18 images of people and 18 distractors" in out
    data = ["--data", tmp_path / "gallery", "--fars", "0.1", "1e-6"]
    pairs, out = run("evaluate_protocol", "all-to-all", *weight, *data, *output)
    assert 0.3 < pairs["eval/all_to_all/tar@far=1e-1"] <= 1
    assert "all 153 pairs of 18 images" in out


def test_groups_of_two_sets(run, weight, tmp_path):
    for name, shade in (("light", 1.0), ("dark", 0.4)):
        source = opening.SyntheticSource(seed=3, identities=20, images_per_identity=2)
        faces = [(source[i][0] * shade).astype(np.uint8) for i in range(40)]
        encoded = [cv2.imencode(".png", face[:, :, ::-1])[1].tobytes() for face in faces]
        different = [encoded[(2 * i + k * 3) % 40] for i in range(20) for k in (0, 1)]
        content = (encoded + different, [True] * 20 + [False] * 20)
        (tmp_path / f"{name}.bin").write_bytes(pickle.dumps(content))
    targets = [tmp_path / "light.bin", tmp_path / "dark.bin"]
    metrics, out = run("evaluate_protocol", "groups", *weight, "--targets", *targets)
    accuracies = [metrics["eval/light/accuracy"], metrics["eval/dark/accuracy"]]
    assert metrics["eval/groups/mean"] == pytest.approx(np.mean(accuracies))
    assert metrics["eval/groups/std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert "skewed error ratio" in out
    # One of them as a folder and a list says the same.
    images, same = pickle.loads((tmp_path / "dark.bin").read_bytes())
    (tmp_path / "faces").mkdir()
    for number, image in enumerate(images):
        (tmp_path / "faces" / f"{number}.png").write_bytes(image)
    lines = [f"{2 * i}.png,{2 * i + 1}.png,{int(one)}" for i, one in enumerate(same)]
    (tmp_path / "dark.csv").write_text("\n".join(lines))
    targets[1] = f"{tmp_path / 'dark.csv'}:{tmp_path / 'faces'}"
    again, _ = run("evaluate_protocol", "groups", *weight, "--targets", *targets)
    del metrics["seconds"], again["seconds"]
    assert metrics == again


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["retrieval", "--probe", "x"], "retrieval needs --gallery"),
        (["all-to-all"], "all-to-all needs --data"),
        (["groups"], "0 networks are named"),
        (["all-to-all", "--data", "gone"], "gone does not exist"),
        (["all-to-all", "--data", "gone", "--fars", "0.1", "2"], "between 0 and 1"),
    ],
)
def test_what_is_missing_is_named(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        script("evaluate_protocol").main(arguments)
    assert expected in capsys.readouterr().err


TWO_HOSTS = """
import sys
from arcface_jax.evaluation import shards
aligned, seen = shards.aligned_image, []
shards.aligned_image = lambda *a: seen.append(1) or aligned(*a)
sys.path.insert(0, "scripts")
import evaluate_ijb
evaluate_ijb.main(sys.argv[1:])
print("IMAGES", len(seen))
"""


@pytest.mark.slow
def test_two_hosts_read_half_the_images_each_and_find_the_same(run, ijbc, weight, tmp_path):
    alone, _ = run("evaluate_ijb", *weight, "--data", ijbc, "--output", tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [*weight[:5], "16", "--data", ijbc, "--output", tmp_path / "two"]
    hosts = ["--distributed.coordinator", coordinator, "--distributed.num-processes", "2"]
    hosts += ["--distributed.process-id"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_HOSTS, *map(str, [*command, *hosts, k])],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for k in (0, 1)
    ]
    outs = [process.communicate(timeout=HANG)[0] for process in processes]
    images = len(list((ijbc / "loose_crop").iterdir()))
    counts = [int(out.strip().splitlines()[-1].removeprefix("IMAGES ")) for out in outs]
    assert sum(counts) == images
    assert min(counts) >= images // 2 - 8
    (line,) = [line for line in outs[0].splitlines() if line.startswith("RESULT ")]
    assert "RESULT" not in outs[1]
    together = json.loads(line.removeprefix("RESULT "))
    for name, value in alone.items():
        if name.startswith("eval/"):
            assert together[name] == pytest.approx(value, abs=0.03), name
