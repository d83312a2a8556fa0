"""Weights of other projects: found under their keys and prefixes, told by their shapes, renamed."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch
from adaface_ir import AdaFaceIR, with_statistics
from commands import result

from arcface_jax.commands import imports
from arcface_jax.convert import parity, torch_names, twins, weights
from arcface_jax.errors import UserError
from arcface_jax.models import iresnet, registry
from arcface_jax.training.network import Network

SIZE = 32
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> Tensors:
    """Of r_tiny, its statistics not those that a network begins with."""
    params, batch_stats = registry.build("r_tiny", embedding_size=SIZE).init(0)
    drawn = np.random.default_rng(0)
    moved = {name: drawn.uniform(0.5, 1.5, a.shape) for name, a in batch_stats.items()}
    moved["features.scale"] = batch_stats["features.scale"]
    return weights.to_state_dict(params, moved)


def renamed(state: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in state.items()}


def moved(state: Tensors) -> Tensors:
    """Other weights of the same network."""
    return {**state, "fc.bias": state["fc.bias"] + 1}


def load(folder, content, network: str | None = "r_tiny", **where):
    torch.save(content, folder / "x.pth")
    return weights.load(folder / "x.pth", network, **where)


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "model.", "features.module.", "_orig_mod.", "backbone.", "encoder."),
        *("student.", "net.", "model._orig_mod.module.encoder.backbone."),
    ],
)
def test_the_prefix_that_makes_the_names_fit_is_found(tmp_path, state, prefix):
    head = {"head.kernel": torch.zeros(SIZE, 10), "classifier.0.weight": torch.zeros(3, SIZE)}
    head["classifier.1.weight"] = torch.zeros(3)
    found = load(tmp_path, {"state_dict": renamed(state, prefix) | head})
    np.testing.assert_array_equal(found.params["fc.bias"], state["fc.bias"])
    (ignored,) = (note for note in found.notes if note.startswith("ignored"))
    assert "head.kernel (32, 10)" in ignored and "classifier.* (2 arrays)" in ignored


@pytest.mark.parametrize(
    "key",
    [
        *("state_dict", "state_dict_ema", "state_dict_backbone", "net", "network", "model"),
        *("weights", "params", "runs.best.model", "what.ever.it.is"),
    ],
)
def test_a_state_dict_is_found_at_any_depth(tmp_path, state, key):
    content: dict = state
    for word in reversed(key.split(".")):
        content = {word: content, "epoch": 3, "optimizer": {"state": {0: {"m": torch.zeros(3)}}}}
    found = load(tmp_path, content)
    np.testing.assert_array_equal(found.params["fc.bias"], state["fc.bias"])
    assert f"found at --key {key}" in found.notes


def test_averaged_weights_come_first_and_both_are_named(tmp_path, state):
    both = {"state_dict": moved(state), "state_dict_ema": state}
    found = load(tmp_path, both)
    np.testing.assert_array_equal(found.params["fc.bias"], state["fc.bias"])
    assert "other weights fit too: --key state_dict" in found.notes
    plain = load(tmp_path, both, key="state_dict")
    np.testing.assert_array_equal(plain.params["fc.bias"], state["fc.bias"] + 1)
    with pytest.raises(UserError, match=r"under --key ema; it has some under state_dict, state_d"):
        load(tmp_path, both, key="ema")


def test_of_two_networks_in_a_dict_the_prefix_chooses(tmp_path, state):
    both = renamed(state, "student.") | renamed(moved(state), "teacher.")
    first = load(tmp_path, both)
    np.testing.assert_array_equal(first.params["fc.bias"], state["fc.bias"])
    assert "other weights fit too: --prefix teacher." in first.notes
    other = load(tmp_path, both, prefix="teacher")
    np.testing.assert_array_equal(other.params["fc.bias"], state["fc.bias"] + 1)
    with pytest.raises(UserError, match=r"under --prefix pupil; omit it"):
        load(tmp_path, both, prefix="pupil")


def test_the_network_is_told_by_names_and_shapes(tmp_path, state):
    found = load(tmp_path, {"model": state}, network=None)
    assert found.network == "r_tiny" and "network r_tiny" in found.notes
    vit = load(tmp_path, twins.build("vit_t", embedding_size=16).state_dict(), network=None)
    assert vit.network == "vit_t" and vit.params["feature.3.bias"].shape == (16,)
    assert any("vit_t_dp005_mask0" in note for note in vit.notes)


def test_a_mismatch_names_the_nearest_network_and_five_arrays(tmp_path, state):
    with pytest.raises(UserError, match=r"weights of r18; they are weights of r_tiny") as error:
        load(tmp_path, state, network="r18")
    message = str(error.value)
    assert "\n" not in message and message.count("layer1.1.") + message.count("instead of") == 5
    damaged = {n: t for n, t in state.items() if not n.startswith("layer4.0.bn")}
    with pytest.raises(UserError, match=r"nearest network is r_tiny, 12 arrays differ"):
        load(tmp_path, damaged, network=None)
    with pytest.raises(UserError, match=r"has no known backbone: it has a\.weight"):
        load(tmp_path, {"a.weight": torch.zeros(3)}, network=None)


def test_quantized_weights_are_refused(tmp_path, state):
    with pytest.raises(UserError, match=r"conv1\.weight is int8, expected floating-point"):
        load(tmp_path, {**state, "conv1.weight": state["conv1.weight"].to(torch.int8)})
    half = load(tmp_path, {n: t.half() if t.is_floating_point() else t for n, t in state.items()})
    assert half.params["fc.bias"].dtype == np.float32


# ---- AdaFace and CVLface -----------------------------------------------------------------------

BLOCKS, WIDTHS = (2, 1, 2, 1), (8, 16, 24, 32)


@pytest.fixture
def small(monkeypatch) -> None:
    """adaface_ir18 with few channels."""
    full = iresnet.ARCHITECTURES["adaface_ir18"]
    monkeypatch.setitem(
        iresnet.ARCHITECTURES, "adaface_ir18", replace(full, blocks=BLOCKS, widths=WIDTHS)
    )


@pytest.mark.parametrize(
    ("prefix", "beside", "order"),
    [("model.", None, "BGR"), ("net.", None, "RGB"), ("net.", "color_space: 'BGR'\n", "BGR")],
)
def test_adafaces_networks_give_their_own_embeddings(tmp_path, small, prefix, beside, order):
    torch.manual_seed(0)
    faces = parity.drawn_faces()
    images = (torch.from_numpy(faces).permute(0, 3, 1, 2).contiguous() - 127.5) / 127.5
    if order == "BGR":
        images = images.flip(1)
    theirs = with_statistics(AdaFaceIR(BLOCKS, WIDTHS, SIZE), images)
    if beside:
        (tmp_path / "model.yaml").write_text(beside)
    content = renamed(theirs.state_dict(), prefix) | {"head.kernel": torch.zeros(SIZE, 10)}
    found = load(tmp_path, {"state_dict": content}, network=None)
    assert found.network == "adaface_ir18"
    ours = Network(found.network, found.params, found.batch_stats, batch_size=16, devices=1)
    with torch.no_grad():
        error = parity.largest_error(ours(faces), theirs(images).numpy())
    assert error < 1e-5
    # The last BatchNorm has no scale and no bias: ours are fixed.
    assert "features.bias" not in found.params and not found.batch_stats["features.bias"].any()
    # By our names nothing is turned a second time.
    again = load(tmp_path, weights.to_state_dict(found.params, found.batch_stats), network=None)
    np.testing.assert_array_equal(again.params["conv1.kernel"], found.params["conv1.kernel"])


def test_adafaces_names_are_a_table():
    with torch.device("meta"):
        theirs = AdaFaceIR((3, 4, 14, 3), (64, 128, 256, 512), 512).state_dict()
        ours = twins.build("adaface_ir50").state_dict()
    renamed = torch_names.from_adaface(theirs)
    assert renamed is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in renamed.entries.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    fixed = {"features.weight", "features.bias"}
    assert shapes == {name: shape for name, shape in wanted.items() if name not in fixed}


# ---- the command ------------------------------------------------------------------------------


def test_import_takes_the_file_as_its_first_word(tmp_path, state, capsys):
    content = {
        "state_dict": {n: torch.nn.Parameter(t, False) for n, t in state.items()},
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(1),
    }
    torch.save(content, tmp_path / "namespace.pth")
    assert imports.main([str(tmp_path / "namespace.pth"), "--output", str(tmp_path / "W")]) == 0
    out = capsys.readouterr().out
    assert result(out)["network"] == "r_tiny" and result(out)["parity"] < 1e-5
    assert "skipped objects that are not tensors: argparse.Namespace, numpy scalar" in out


def test_what_is_no_file_of_weights_is_one_line_of_the_command(tmp_path, capsys):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html><body>Virus scan</body></html>")
    with pytest.raises(SystemExit) as ended:
        imports.main([str(tmp_path / "page.pth"), "--output", str(tmp_path / "W")])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "is a web page, not weights" in err
