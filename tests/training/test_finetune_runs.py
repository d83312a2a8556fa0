"""Fine-tuning through the real command: what it begins with, says, resumes and refuses."""

import json
import os
import shutil
from pathlib import Path

import jax
import lfw_halves
import numpy as np
import pytest
import torch
from commands import ROOT, TINY_RECIPE, result, script
from small_network import NAME
from test_train import losses, metrics

from arcface_jax import config as configs
from arcface_jax.convert import onnx_graph, to_torch
from arcface_jax.convert.onnx_graph import Form
from arcface_jax.data import label_map, opening
from arcface_jax.data.names import Names
from arcface_jax.errors import CheckpointError
from arcface_jax.runtime import devices as meshes
from arcface_jax.training import checkpoint, finetune, saved_runs, step
from arcface_jax.training.network import Network

CENTERS = ["--finetune.centers", "class_means"]
OPTIONS = [
    *CENTERS,
    *("--finetune.frozen", "layer1.*", "--finetune.frozen-statistics", "*"),
    *("--finetune.rates", "*", "0.1", "fc.*", "1"),
]


def command(recipe: Path, workdir: Path, *more: str) -> list[str]:
    return [str(recipe), "--workdir", str(workdir), "--devices", "1", *more]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Of a built-in network, with whose layers the options are concerned."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    path.write_text(TINY_RECIPE.replace(NAME, "r_tiny"))
    return path


@pytest.fixture(scope="module")
def source_run(recipe, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("source") / "run"
    assert script("train").main(command(recipe, workdir)) == 0
    return workdir


@pytest.fixture(scope="module")
def tuned(recipe, source_run, tmp_path_factory) -> Path:
    """Fine-tuned from the source's backbone, as safetensors that are gone afterwards."""
    folder = tmp_path_factory.mktemp("tuned")
    to_torch.export(source_run, folder / "weights.safetensors")
    options = ["--init-from", str(folder / "weights.safetensors"), *OPTIONS]
    assert script("train").main(command(recipe, folder / "run", *options)) == 0
    (folder / "weights.safetensors").unlink()
    return folder / "run"


def test_it_begins_where_the_other_run_ended(source_run, tuned):
    """The verification before the first step is the last one of the other run."""
    lines = metrics(tuned)
    before = {k: v for line in lines for k, v in line.items() if k.startswith("before/")}
    assert before["before/synthetic/accuracy"] > 0 and lines[0]["step"] == 0
    ended = metrics(source_run)[-1]
    assert {"eval/" + k.removeprefix("before/") for k in before} == ended.keys() - {"step"}
    for name, value in before.items():
        if name.endswith("mode_cosine"):  # statistics that are frozen are those of evaluation
            assert value == pytest.approx(1)
            continue
        assert value == pytest.approx(ended["eval/" + name.removeprefix("before/")], rel=1e-4)


def test_what_is_frozen_is_exported_unchanged(source_run, tuned):
    ours, theirs = (
        torch.load(run / "backbone.pth", weights_only=True) for run in (tuned, source_run)
    )
    same = {name for name in theirs if torch.equal(ours[name], theirs[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    still = {n for n in theirs if n.startswith("layer1.") or n.endswith(statistics)}
    # The first weights of PReLU and BatchNorm may be equal by chance nowhere else.
    assert same == still | {"features.weight"}


@pytest.mark.slow
def test_a_fine_tuned_run_resumes_without_the_weights_it_began_with(
    recipe, tuned, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(tuned, workdir)
    shutil.rmtree(workdir / "checkpoints" / "9")
    again = json.loads((workdir / "config.json").read_text())["init_from"]
    assert not Path(again).exists()
    options = ["--init-from", again, *OPTIONS]
    assert script("train").main(command(recipe, workdir, *options)) == 0
    assert losses(workdir) == losses(tuned)
    printed = capsys.readouterr().out
    outcome = result(printed)
    table = [line.split() for line in printed.splitlines()]
    accuracies = [f"{outcome[f'{k}/synthetic/accuracy']:.4f}" for k in ("before", "eval")]
    assert ["synthetic", "before", accuracies[0]] in [words[:3] for words in table]
    assert ["after", accuracies[1]] in [words[:2] for words in table]

    with pytest.raises(SystemExit):
        script("train").main(command(recipe, workdir, "--init-from", again, *CENTERS))
    message = capsys.readouterr().err
    assert all(f"finetune.{name}" in message for name in ("frozen", "frozen_statistics", "rates"))


def test_centers_of_the_same_classes_may_be_kept(source_run):
    """From one device to eight, where five classes have three rows of padding."""
    config = configs.replace(
        checkpoint.read_config(source_run),
        init_from=str(source_run),
        workdir="",
        finetune__centers="kept",
    )
    source = opening.open_source(config.data, seed=0)
    weights = finetune.weights(source_run, config.model, name=str(source_run))
    resumed = step.init_state(config, num_classes=5, mesh=meshes.make(1))
    with checkpoint.open_workdir(checkpoint.read_config(source_run)) as manager:
        resumed = checkpoint.restore(manager, resumed, {"num_classes": 5, "num_images": 25})
    assert resumed is not None
    expected = np.asarray(resumed.centers)
    for devices in (1, 8):
        on = meshes.make(devices)
        state = step.init_state(config, num_classes=5, mesh=on, weights=weights)
        kept = finetune.centers(config, state, source, mesh=on)
        assert kept.sharding == state.centers.sharding
        np.testing.assert_array_equal(kept[:5], expected)
    for name, array in weights[0].items():  # the caller's arrays are not used up
        assert not isinstance(array, jax.Array) or not array.is_deleted(), name
    source.num_classes = 6
    with pytest.raises(CheckpointError, match=r"5 classes x 1.* needs 6 x 1"):
        finetune.centers(config, state, source, mesh=on)


def test_kept_centers_follow_the_map_of_a_cleaned_set(source_run, tmp_path, caplog):
    """Of five classes, 1 and 3 were merged and 4 was dropped; the map lies beside the new set."""
    config = configs.replace(
        checkpoint.read_config(source_run),
        init_from=str(source_run),
        workdir="",
        finetune__centers="kept",
        data__path=str(tmp_path),
    )
    label_map.write(tmp_path, np.array([0, 1, 2, 1, -1]), Names("abc"))
    old, _ = saved_runs.restore_centers(source_run)
    assert not caplog.records  # Orbax's warnings do not reach the user
    source = opening.open_source(configs.replace(config, data__path="synthetic").data, seed=0)
    source.num_classes = 3
    weights = finetune.weights(source_run, config.model, name=str(source_run))
    on = meshes.make(8)
    state = step.init_state(config, num_classes=3, mesh=on, weights=weights)
    kept = finetune.centers(config, state, source, mesh=on)
    assert kept.sharding == state.centers.sharding and kept.shape == state.centers.shape
    expected = [old[0], (old[1] + old[3]) / 2, old[2]]
    np.testing.assert_allclose(kept[:3], expected, rtol=1e-6)
    np.testing.assert_array_equal(kept[3:], state.centers[3:])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--finetune.frozen", "layr1.*"], ["finetune.frozen", "layr1.*", "layer1.0"]),
        (["--finetune.frozen-statistics", "fc.*"], ["frozen_statistics", "fc.*"]),
        (
            ["--finetune.rates", "layer1.*", "0"],
            ["finetune.rates ('layer1.*', 0.0) must be greater than 0", "frozen"],
        ),
        (CENTERS, ["class_means", "--init-from"]),
        (["--init-from", "none.pth"], ["none.pth"]),
        (["--init-from", "{source}/backbone.pth", "--finetune.centers", "kept"], ["kept", ".pth"]),
        (
            ["--init-from", "{source}", "--model.embedding-size", "16"],
            ["fc.kernel (9408, 32) instead of (9408, 16)", "features.bias", "embedding_size 16"],
        ),
        (
            ["--init-from", "{source}/backbone.pth", "--model.network", "r18"],
            ["missing: ", "layer1.1.bn1.weight", "of another shape: ", "--network r_tiny"],
        ),
    ],
    ids=["frozen", "statistics", "rates", "means", "missing", "kept", "size", "network"],
)
def test_bad_options_are_refused_before_anything_is_written(
    recipe, source_run, tmp_path, capsys, options, named
):
    options = [option.format(source=source_run) for option in options]
    with pytest.raises(SystemExit) as stop:
        script("train").main(command(recipe, tmp_path / "run", *options))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in named), message
    assert "Traceback" not in message and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif("ARCFACE_JAX_LFW" not in os.environ, reason="needs ARCFACE_JAX_LFW")
def test_fine_tuning_beats_training_from_scratch_on_real_faces(tmp_path, capsys):
    """docs/finetuning.md: one half of the people, then the other half, which shares none."""
    first, second = lfw_halves.write(Path(os.environ["ARCFACE_JAX_LFW"]), tmp_path)
    recipe = ROOT / "configs" / "lfw_tiny.py"
    options = ["--schedule.epochs", "3", "--evaluation.every-epochs", "0"]
    options += ["--logging.every-steps", "1"]
    accuracy = {}

    def run(name: str, data: Path, *more: str) -> Path:
        path = tmp_path / "runs" / name
        words = command(recipe, path, *options, "--data.path", str(data), *more)
        assert script("train").main(words) == 0
        accuracy[name] = result(capsys.readouterr().out)["eval/lfw_dev/accuracy"]
        return path

    source = run("a", first)
    run("scratch", second)
    run("random", second, "--init-from", str(source / "backbone.pth"))
    run("means", second, "--init-from", str(source / "backbone.pth"), *CENTERS)
    onnx_graph.write(tmp_path / "a.onnx", Network.from_workdir(source, devices=1), Form())
    # At the whole rate of this recipe, which is for random weights, any two runs part.
    slowly = [*CENTERS, "--finetune.rates", "*", "0.1"]
    from_pth = run("pth", second, "--init-from", str(source / "backbone.pth"), *slowly)
    from_onnx = run("onnx", second, "--init-from", str(tmp_path / "a.onnx"), *slowly)
    ours, theirs = ([x[0] for x in losses(run).values()] for run in (from_onnx, from_pth))
    apart = abs(np.divide(ours[:20], theirs[:20]) - 1)
    with capsys.disabled():
        print(accuracy, "relative differences of losses, ONNX and .pth:", np.round(apart, 4))
    assert min(accuracy["random"], accuracy["means"], accuracy["onnx"]) > accuracy["scratch"]
    # docs/finetuning.md: what is left comes from lengths of kernels that no file tells.
    assert apart[:3].max() < 0.02
    assert apart.mean() < 0.02
    assert apart.max() < 0.035
    assert abs(accuracy["onnx"] - accuracy["pth"]) < 0.02  # 1,000 pairs, one seed
