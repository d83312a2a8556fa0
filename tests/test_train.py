"""Training through the real command: what it writes, how it stops, resumes, and refuses."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import HANG, ROOT, result, run_process, script, wait_until
from small_network import NAME

from arcface_jax.convert import parity, twins
from arcface_jax.data import opening
from arcface_jax.data.recordio.reader import RecordWriter
from arcface_jax.data.synthetic import faces
from arcface_jax.training import saved_runs


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, tuple[float, ...]]:
    names = ("train/loss", "train/accuracy", "train/gradient_norm", "train/lr")
    lines = [line for line in metrics(workdir) if "train/loss" in line]
    return {line["step"]: tuple(line[name] for name in names) for line in lines}


def reached(workdir: Path, step: int) -> bool:
    """Whether a run that may not have begun has logged a step."""
    return (workdir / "metrics.jsonl").exists() and max(losses(workdir), default=0) >= step


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> Path:
    return tiny_recipe


def arguments(recipe: Path, workdir: Path, *more: str) -> list[str]:
    return [str(recipe), "--workdir", str(workdir), "--devices", "1", *more]


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> tuple[Path, dict]:
    """A run that never stopped, in a process of its own, and its RESULT."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = run_process(["scripts/train.py", *arguments(recipe, workdir)])
    assert done.returncode == 0, done.stderr
    return workdir, result(done.stdout)


def test_the_command_trains_verifies_exports_and_reports(finished):
    workdir, outcome = finished
    assert outcome["step"] == 9 and outcome["seconds"] > 0
    assert 0 <= outcome["eval/synthetic/accuracy"] <= 1
    assert {"baseline/raw", "baseline/untrained"} <= outcome.keys()
    assert outcome["images"] >= outcome["identities"] > 1
    assert (outcome["ignored"], outcome["unreadable"]) == (0, 0)
    for name in outcome["files"]:
        assert Path(name).exists()
    names = {Path(name).name for name in outcome["files"]}
    assert {"curves.png", "synthetic_pairs.png", "backbone.pth", "metrics.jsonl"} <= names
    assert (workdir / "config.json").exists() and list((workdir / "tensorboard").iterdir())


def test_metrics_have_the_documented_names(finished):
    lines = metrics(finished[0])
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 10))
    for line in trained:
        assert {"step", "train/loss", "train/accuracy", "train/lr"} <= line.keys()
    assert {"perf/images_per_sec", "perf/data_wait_ms"} <= trained[-1].keys()
    verified = [line["step"] for line in lines if "eval/synthetic/accuracy" in line]
    assert verified == [3, 6, 9]


def test_a_stopped_run_resumes_bit_for_bit(finished, recipe, tmp_path):
    """SIGTERM in the middle of an epoch, then the same command again."""
    workdir = tmp_path / "run"
    command = ["scripts/train.py", *arguments(recipe, workdir)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, **pipes, text=True)
    wait_until(lambda: reached(workdir, 4), process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=HANG)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    stopped = max(losses(workdir))
    assert stopped < 9, "it ended before the signal came; make the run longer"
    assert f"stopped by SIGTERM at step {stopped}" in stderr
    outcome = result(stdout)
    verified = {line["step"]: line for line in metrics(workdir) if "eval/synthetic/auc" in line}
    assert outcome["step"] == stopped and outcome["eval/step"] == max(verified)
    assert outcome["eval/synthetic/auc"] == verified[max(verified)]["eval/synthetic/auc"]

    done = run_process(command)
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {stopped} of 9" in done.stderr
    assert losses(workdir) == losses(finished[0])
    ours, theirs = (saved_runs.restore_backbone(w) for w in (workdir, finished[0]))
    for index in (1, 2):
        for name, array in theirs[index].items():
            np.testing.assert_array_equal(ours[index][name], array)


def test_a_finished_run_is_only_evaluated_again(finished, recipe, capsys):
    workdir, outcome = finished
    before = losses(workdir)
    assert script("train").main(arguments(recipe, workdir)) == 0
    again = result(capsys.readouterr().out)
    assert again["eval/synthetic/accuracy"] == outcome["eval/synthetic/accuracy"]
    assert losses(workdir) == before


def test_another_number_of_devices_may_resume(finished, recipe, tmp_path):
    """The padding of five classes differs: none on one device, three rows on eight."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "9")
    again = [*arguments(recipe, workdir)[:-2], "--devices", "8"]
    assert script("train").main(again) == 0
    ours, theirs = losses(workdir), losses(finished[0])
    assert ours[6] == theirs[6]
    assert ours[7][0] == pytest.approx(theirs[7][0], rel=1e-5)
    assert ours[9][0] == pytest.approx(theirs[9][0], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.network", "r18"], ["model.network", f"'{NAME}'", "'r18'"]),
        (["--head.margin", "0.3", "--seed", "5"], ["head.margin", "0.2", "0.3", "seed"]),
        (["--data.synthetic.identities", "6"], ["data.synthetic.identities", "5", "6"]),
    ],
    ids=["network", "two-fields", "data"],
)
def test_an_unlike_run_is_refused_and_left_alone(finished, recipe, capsys, options, named):
    workdir = finished[0]
    before = files_under(workdir)
    with pytest.raises(SystemExit) as stop:
        script("train").main(arguments(recipe, workdir, *options))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in [*named, "another --workdir"])
    assert "Traceback" not in message
    assert files_under(workdir) == before


def write_records(folder: Path, labels: list[float], *, identities: int) -> None:
    folder.mkdir()
    face = faces.draw_face(seed=0, identity=0, index=0)
    encoded = cv2.imencode(".jpg", face)[1].tobytes()
    with RecordWriter(folder / "train.rec") as writer:
        first = len(labels) + 1
        writer.write(0, b"", label=[first, first + identities])
        for key, label in enumerate(labels, start=1):
            writer.write(key, encoded, label=label)


def prepare(case: str, folder: Path) -> list[str]:
    """Makes the input of a failing command; its options."""
    data = folder / "data"
    options = ["--data.path", str(data), "--evaluation.targets", "--evaluation.baselines", "False"]
    if case == "missing path":
        return options
    if case == "empty path":
        data.mkdir()
        return options
    write_records(data, [9.0] * 12 if case == "label" else [0.0, 1.0] * 6, identities=2)
    if case == "no rec":
        (data / "train.rec").unlink()
    if case == "truncated":
        whole = (data / "train.rec").read_bytes()
        # The last record's header is there, its end is not.
        (data / "train.rec").write_bytes(whole[:-100])
    return options


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("missing path", ["does not exist", "--data.path"]),
        ("empty path", ["holds no training set", "--data.path"]),
        ("no rec", ["train.rec is missing", "copy both"]),
        ("truncated", ["train.rec", "truncated", "again"]),
        ("label", ["label 9", "2 identities", "0 .. 1"]),
    ],
)
def test_bad_data_is_one_message_and_code_2(recipe, tmp_path, capsys, case, named):
    options = prepare(case, tmp_path)
    with pytest.raises(SystemExit) as stop:
        script("train").main(arguments(recipe, tmp_path / "run", *options))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in named), message
    assert message.count("error:") == 1 and "Traceback" not in message


def test_a_damaged_record_costs_no_step_before_it(recipe, tmp_path, capsys):
    """Of six batches of an epoch one cannot be read: the run says so, and keeps those before it."""
    data, workdir = tmp_path / "data", tmp_path / "run"
    write_records(data, [0.0, 1.0] * 24, identities=2)
    whole = bytearray((data / "train.rec").read_bytes())
    offset = int((data / "train.idx").read_text().splitlines()[30].split()[1])
    whole[offset] ^= 0xFF
    (data / "train.rec").write_bytes(whole)
    options = ["--data.path", str(data), "--evaluation.targets", "--evaluation.baselines", "False"]
    with pytest.raises(SystemExit) as stop:
        script("train").main(arguments(recipe, workdir, *options, "--seed", "2"))
    assert stop.value.code == 2
    assert "record 30" in capsys.readouterr().err
    done = max(losses(workdir))
    assert 1 <= done < 6, "with another seed the record is in a later batch than the first"
    assert saved_runs.restore_backbone(workdir)[3] == done


def test_labels_outside_the_classes_stop_the_run_in_words(recipe, tmp_path, capsys, monkeypatch):
    """A source that counts its identities wrongly; the others are trained, and that is kept."""

    class TooFewClasses(opening.SyntheticSource):
        def __len__(self) -> int:
            return 25

    def open_source(*_, **__):
        source = TooFewClasses(seed=0, identities=5, images_per_identity=5)
        source.num_classes = 3
        return source

    monkeypatch.setattr(opening, "open_source", open_source)
    with pytest.raises(SystemExit) as stop:
        script("train").main(arguments(recipe, tmp_path / "run"))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "labels outside [0, 2]" in message and "Relabel identities" in message
    assert saved_runs.restore_backbone(tmp_path / "run")[3] == 1  # the first log step


PARTIAL = ["--head.sample-rate", "0.5", "--optimizer.kind", "adamw"]
CURRICULAR = ["--head.loss", "curricularface", "--head.subcenters", "2"]


@pytest.mark.parametrize(
    "options",
    [
        [*PARTIAL, *CURRICULAR],
        pytest.param(PARTIAL, marks=pytest.mark.slow),
        pytest.param(CURRICULAR, marks=pytest.mark.slow),
    ],
    ids=["both", "partial-fc-adamw", "curricularface-subcenters"],
)
def test_every_part_of_the_heads_state_is_resumed(recipe, tmp_path, capsys, options):
    """Trained in one go, and from a checkpoint in the middle: the same to the last bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = [*options, "--evaluation.targets", "--evaluation.baselines", "False"]
    assert script("train").main(arguments(recipe, whole, *more)) == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "9")
    assert script("train").main(arguments(recipe, parts, *more)) == 0
    names = ("train/loss", "train/gradient_norm", "train/target_cosine")
    ours, theirs = (
        [[line[n] for n in names] for line in metrics(w) if "train/loss" in line]
        for w in (parts, whole)
    )
    assert ours == theirs and len(ours) == 9
    said = capsys.readouterr().err
    assert said.count("(chance level: ") == 1  # only at the first step


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--devices", "3"], ["global_batch_size 8", "3 devices", "multiple of 3"]),
        (["--devices", "9"], ["devices 9", "has 8"]),
        (["--model.network", "r51"], ["r51", "r_tiny"]),
        (["--model.netwrok", "r50"], ["netwrok", "--model.network"]),
        (["--evaluation.targets", "none.bin"], ["none.bin", "--evaluation.targets"]),
        (["--data.global-batch-size", "64"], ["25 images", "batch of 64"]),
    ],
    ids=["batch", "devices", "network", "option", "target", "small set"],
)
def test_bad_options_are_one_message_and_code_2(recipe, tmp_path, capsys, options, named):
    with pytest.raises(SystemExit) as stop:
        script("train").main(arguments(recipe, tmp_path / "run", *options))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in named), message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_a_set_that_cannot_be_verified_is_refused_before_training(recipe, tmp_path, capsys):
    face = cv2.imencode(".png", faces.draw_face(seed=0, identity=0, index=0))[1].tobytes()
    path = tmp_path / "alike.bin"
    path.write_bytes(pickle.dumps(([face] * 40, [True] * 20)))
    with pytest.raises(SystemExit) as stop:
        options = ["--evaluation.targets", str(path)]
        script("train").main(arguments(recipe, tmp_path / "run", *options))
    assert stop.value.code == 2
    assert "alike: 20 of 20 pairs show one person" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        script("train").main(arguments(recipe, tmp_path))
    assert stop.value.code == 2
    assert "not empty and holds no config.json" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_evaluate_gives_what_training_gave(finished, capsys):
    workdir, outcome = finished
    script("evaluate").main(["--checkpoint", str(workdir)])
    printed = capsys.readouterr().out
    verified = {name: value for name, value in outcome.items() if name.startswith("eval/")}
    del verified["eval/synthetic/mode_cosine"]  # training alone measures it
    assert verified.pop("eval/step") == outcome["step"]
    assert {"eval/synthetic/accuracy", "eval/synthetic/tar@far=1e-1"} <= verified.keys()
    assert {name: result(printed)[name] for name in verified} == verified
    *tables, _ = printed.splitlines()
    assert max(map(len, tables)) <= 100
    assert "synthetic: 10 pairs of different people are too few for a FAR of 1e-2" in printed


def pixels_as_onnx(path: Path) -> Path:
    """A graph whose embedding is the image in 4 x 4 cells."""
    onnx = pytest.importorskip("onnx")
    floats, shape = onnx.TensorProto.FLOAT, ["N", 3, 112, 112]
    pool = {"kernel_shape": [28, 28], "strides": [28, 28]}
    nodes = [
        onnx.helper.make_node("AveragePool", ["input"], ["cells"], **pool),
        onnx.helper.make_node("Flatten", ["cells"], ["embedding"]),
    ]
    ends = [onnx.helper.make_tensor_value_info("input", floats, shape)]
    ends += [onnx.helper.make_tensor_value_info("embedding", floats, ["N", 48])]
    graph = onnx.helper.make_graph(nodes, "pixels", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def test_models_of_all_kinds_are_evaluated_side_by_side(finished, capsys, tmp_path):
    """A run twice, its export, and an ONNX file, on the run's own set and on a list of pairs."""
    workdir, outcome = finished
    lines = []
    for number in range(20):
        names = [f"{number}{side}.png" for side in "ab"]
        for side, name in enumerate(names):
            who = number // 4 if number % 2 else number + 40 * side
            drawn = faces.draw_face(seed=5, identity=who, index=2 * number + side)
            cv2.imwrite(str(tmp_path / name), drawn[:, :, ::-1])
        lines.append(",".join([*names, str(number % 2)]))
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    onnx = pixels_as_onnx(tmp_path / "pixels.onnx")
    options = {
        "--checkpoint": [workdir, workdir],
        "--weight": [workdir / "backbone.pth"],
        "--network": [NAME],
        "--onnx": [onnx],
        "--report": [tmp_path / "page"],
        "--targets": ["synthetic", tmp_path / "mine.csv"],
    }
    script("evaluate").main([str(x) for name, values in options.items() for x in (name, *values)])
    printed = capsys.readouterr().out
    found = result(printed)
    models = ["run", "run-2", "backbone", "pixels"]
    for model in models:
        for name in ("synthetic", "mine"):
            assert 0 <= found[f"eval/{model}/{name}/accuracy"] <= 1
            assert sum(line.split()[:2] == [name, model] for line in printed.splitlines()) == 2
        if model != "pixels":
            for name in ("accuracy", "auc", "xnorm"):
                expected = outcome[f"eval/synthetic/{name}"]
                assert found[f"eval/{model}/synthetic/{name}"] == pytest.approx(expected, rel=1e-5)
    assert found["files"] == [str(tmp_path / "page" / "index.html")]
    page = (tmp_path / "page" / "index.html").read_text()
    assert all(f"{model} on {name}" in page for model in models for name in ("synthetic", "mine"))


def test_inference_prints_the_embedding_of_the_torch_network(finished, capsys, tmp_path):
    weight = finished[0] / "backbone.pth"
    face = faces.draw_face(seed=9, identity=0, index=0)
    cv2.imwrite(str(tmp_path / "face.png"), face[:, :, ::-1])
    options = ["--weight", str(weight), "--network", NAME]
    script("inference").main([*options, "--img", str(tmp_path / "face.png")])
    printed = capsys.readouterr().out
    outcome = result(printed)
    module = twins.build(NAME, embedding_size=32)
    module.load_state_dict(torch.load(weight, weights_only=True), strict=True)
    expected = parity.torch_embeddings(module, face[None])[0]
    numbers = printed.split("RESULT")[0].replace("[", " ").replace("]", " ").split()
    np.testing.assert_allclose(np.array(numbers, float), expected, atol=1e-4)
    assert outcome["shape"] == [1, 32]
    assert outcome["norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-4)

    script("inference").main(options)
    assert "seeded noise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        (
            "inference",
            ["--weight", "{run}/backbone.pth", "--network", "r18"],
            ["backbone.pth", "weights of r18"],
        ),
        ("inference", ["--weight", "no.pth", "--network", "r18"], ["no weights at no.pth"]),
        ("inference", ["--weight", "{run}/config.json"], ["is a JSON file, not weights"]),
        ("evaluate", ["--checkpoint", "nowhere"], ["config.json", "training run"]),
        ("evaluate", [], ["--workdir", "--weight"]),
        ("evaluate", ["--checkpoint", "{run}", "--targets", "a.bin"], ["a.bin"]),
        ("evaluate", ["--checkpoint", "{run}", "--step", "best"], ["--checkpoint.best-metric"]),
        ("evaluate", ["--checkpoint", "{run}", "--step", "5"], ["no checkpoint of step 5", "6, 9"]),
        ("evaluate", ["--onnx", "a.onnx", "--targets", "a.bin"], ["no model at a.onnx"]),
        ("evaluate", ["--weight", "a", "b", "c", "--network", "r18", "r50"], ["3 --weight"]),
    ],
)
def test_other_commands_report_in_one_message(finished, capsys, name, options, named):
    with pytest.raises(SystemExit) as stop:
        script(name).main([option.format(run=finished[0]) for option in options])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in named), message
    assert "Traceback" not in message
