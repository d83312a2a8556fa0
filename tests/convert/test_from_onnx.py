"""ONNX files as trainable networks: found by structure and equal to ONNX Runtime, or refused."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from commands import result, script
from onnx import helper, numpy_helper

from arcface_jax import config as configs
from arcface_jax.commands import imports
from arcface_jax.config.choices import OnnxOptions
from arcface_jax.convert import from_onnx, onnx_graph, parity, twins, weights
from arcface_jax.convert.onnx_graph import Form
from arcface_jax.data import opening
from arcface_jax.errors import UserError
from arcface_jax.models import preprocess
from arcface_jax.training import folded_statistics, saved_runs
from arcface_jax.training.network import Network

TORCHSCRIPT = {"dynamo": False, "opset_version": 14}
UNFOLDED = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
EXPORTERS = {
    "folded": TORCHSCRIPT,
    "unfolded": TORCHSCRIPT | UNFOLDED,
    "dynamo": {"dynamo": True},
}
REST = ("r18", "r34", "r50", "r100", "r200", "mbf_large", "mobilefacenet_y1", "vit_s", "vit_b")
REST += ("vit_l_dp005_mask_005", "adaface_ir18", "adaface_ir50", "adaface_ir101")


R_TINY = ["--model.network", "r_tiny", "--model.embedding-size", "512", "--devices", "1"]


def export(network: str, folder: Path, exporter: str) -> Path:
    """A file of torch's own exporter, of weights whose statistics have seen faces."""
    path = folder / f"{network}_{exporter}.onnx"
    module = twins.load(network, weights.to_state_dict(*settled(network)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (torch.zeros(1, 3, 112, 112),),
            str(path),
            input_names=["data"],
            **EXPORTERS[exporter],
        )
    return path


def settled(network: str):
    return parity.settled(network, parity.drawn_faces())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def folded(folder) -> Path:
    return export("r_tiny", folder, "folded")


@pytest.fixture(scope="module")
def unfolded(folder) -> Path:
    return export("r_tiny", folder, "unfolded")


@pytest.fixture(scope="module")
def vit(folder) -> Path:
    return export("vit_t", folder, "folded")


def changed(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(path)
    change(model)
    new = path.with_name(f"{path.stem}_{change.__name__}.onnx")
    onnx.save(model, new)
    return new


# ---- What is read --------------------------------------------------------------------------------


def test_folded_batchnorms_come_back_as_identities(folded, unfolded):
    lossy, whole = from_onnx.load(folded), from_onnx.load(unfolded)
    assert lossy.network == whole.network == "r_tiny"
    assert max(lossy.error, whole.error) < 1e-5
    found = folded_statistics.folded(lossy.batch_stats)
    assert len(found) == lossy.folded > 10 and "layer1.0.bn2" in found and "bn2" not in found
    assert whole.folded == 0 and not folded_statistics.folded(whole.batch_stats)


def test_folded_kernels_have_the_lengths_of_fresh_ones(folded):
    """insightface draws them with deviation 0.1: a channel of n numbers is 0.1 sqrt(n) long."""
    found = from_onnx.load(folded)
    kernels = {n: x for n, x in found.params.items() if n.endswith("conv2.kernel")}
    assert len(kernels) == 4
    for name, kernel in kernels.items():
        size = int(np.prod(kernel.shape[:-1]))
        lengths = np.linalg.norm(kernel.reshape(size, -1).astype(np.float64), axis=0)
        np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
        assert lengths[0] == pytest.approx(0.1 * size**0.5, rel=0.02), name


def test_weights_that_were_not_folded_are_the_exported_ones(unfolded):
    found = from_onnx.load(unfolded)
    for given, out in zip(settled("r_tiny"), (found.params, found.batch_stats), strict=True):
        assert given.keys() == out.keys()
        for name, array in given.items():
            np.testing.assert_allclose(out[name], array, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    "normalization", ["outside", pytest.param("inside", marks=pytest.mark.slow)]
)
def test_this_projects_own_files_come_back(folder, normalization):
    path = folder / f"{normalization}.onnx"
    model = Network("r_tiny", *settled("r_tiny"), batch_size=16, devices=1)
    onnx_graph.write(path, model, Form(normalization=normalization))
    found = from_onnx.load(path)
    again = Network(found.network, found.params, found.batch_stats, batch_size=16, devices=1)
    faces = parity.drawn_faces()
    assert parity.largest_error(again(faces), model(faces)) < 1e-5


def test_a_transformer_is_found(vit):
    found = from_onnx.load(vit)
    assert found.network == "vit_t" and found.error < 1e-5
    assert found.params["mask_token"].shape == (1, 1, 256)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("network", ["r_tiny", "mbf", "vit_t", *REST])
def test_every_network_equals_onnx_runtime(folder, network, exporter):
    path = export(network, folder, exporter)
    found = from_onnx.load(path)
    path.unlink()
    error = found.error
    if network == "mbf_large":  # in float32, the same weights differ by 1.3e-5 from float64
        error = error_in_float64(network, found)
    print(f"{network} {exporter}: {found.error:.1e}, {error:.1e}, {found.folded} folded")
    assert found.network == network and error < 1e-5


def error_in_float64(network: str, found) -> float:
    """The largest error that the conversion alone makes, by the torch twin in float64."""
    images = torch.from_numpy(parity.drawn_faces()).permute(0, 3, 1, 2).double()
    embeddings = []
    for arrays in ((found.params, found.batch_stats), settled(network)):
        twin = twins.load(network, weights.to_state_dict(*arrays)).double().eval()
        with torch.inference_mode():
            embeddings.append(twin((images - preprocess.MEAN) / preprocess.SCALE).numpy())
    return parity.largest_error(*embeddings)


def mxnet_form(model: onnx.ModelProto) -> None:
    """Initializers among the inputs, a fixed batch, and the pixels' normalization in the graph."""
    graph = model.graph
    for tensor in graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        graph.input.insert(0, value)
    for name, value in (("mean", 127.5), ("factor", 0.0078125)):
        graph.initializer.append(numpy_helper.from_array(np.float32([value]), name))
    for node in graph.node:
        node.input[:] = ["scaled" if name == "data" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Mul", ["centered", "factor"], ["scaled"], "_mulscalar0"))
    graph.node.insert(0, helper.make_node("Sub", ["data", "mean"], ["centered"], "_minusscalar0"))


def other_order(model: onnx.ModelProto) -> None:
    """The nodes in another topological order, under other names, and additions the other way."""
    graph = model.graph
    known = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    waiting, ordered = list(graph.node)[::-1], []
    while waiting:
        node = next(n for n in waiting if known.issuperset(filter(None, n.input)))
        waiting.remove(node)
        ordered.append(node)
        known.update(node.output)
        node.name = f"x{len(ordered)}"
        if node.op_type == "Add":
            node.input[:] = list(node.input)[::-1]
    del graph.node[:]
    graph.node.extend(ordered)


@pytest.mark.parametrize("change", [mxnet_form, other_order])
def test_how_a_graph_is_written_does_not_matter(unfolded, change):
    found = from_onnx.load(changed(unfolded, change))
    assert found.network == "r_tiny" and found.error < 1e-5


def test_bgr_is_turned_to_rgb(unfolded):
    """The embeddings are checked with the pixels as they are said to be."""
    rgb = from_onnx.load(unfolded)
    bgr = from_onnx.load(unfolded, options=OnnxOptions(color_order="BGR"))
    np.testing.assert_array_equal(
        bgr.params["conv1.kernel"], rgb.params["conv1.kernel"][:, :, ::-1]
    )


# ---- What is refused -----------------------------------------------------------------------------


def other_activation(model: onnx.ModelProto) -> None:
    nodes = model.graph.node
    at = [n.op_type for n in nodes].index("PRelu")
    node = helper.make_node("LeakyRelu", nodes[at].input[:1], nodes[at].output, "leaky", alpha=0.25)
    nodes.remove(nodes[at])
    nodes.insert(at, node)


def other_stride(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Conv" and attribute.name == "strides" and attribute.ints[0] == 2:
                attribute.ints[:] = [1, 1]
                return


def unit_length(model: onnx.ModelProto) -> None:
    output = model.graph.output[0]
    model.graph.node.append(helper.make_node("LpNormalization", [output.name], ["unit"], axis=1))
    output.name = "unit"


def quantized(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "QLinearConv"


def looping(model: onnx.ModelProto) -> None:
    model.graph.node[3].op_type = "Loop"


def of_two_images(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("other", 1, [1, 3, 112, 112]))


def no_activation(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "PRelu")
    model.graph.node.remove(node)
    for other in model.graph.node:
        other.input[:] = [node.input[0] if x == node.output[0] else x for x in other.input]


def computed_weights(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    model.graph.node.insert(0, helper.make_node("Abs", [node.input[1]], ["computed"]))
    node.input[1] = "computed"


def broken_weights(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_activation, "then it has batchnorm 24 at .* where r_tiny has prelu 24"),
        (computed_weights, "computes the weights of the Conv at node .*expected constants"),
        (broken_weights, "not finite"),
        (other_activation, r"has activation .*LeakyRelu, 0.25.* at leaky where r_tiny has prelu"),
        (other_stride, r"the first \d+ are as in r_tiny, then it has conv"),
        (unit_length, "other embeddings"),
        (quantized, "quantized .*name the float model"),
        (looping, "has a Loop"),
        (of_two_images, "has 2 inputs"),
    ],
)
def test_what_is_no_network_of_the_registry_is_refused(folded, change, message):
    with pytest.raises(UserError, match=message):
        from_onnx.load(changed(folded, change))


def other_bound(model: onnx.ModelProto) -> None:
    """Random weights never reach the bound, so that embeddings do not show it."""
    limits = {n.input[2] for n in model.graph.node if n.op_type == "Clip"}
    five = numpy_helper.from_array(np.float32(5))
    for tensor in model.graph.initializer:
        if tensor.name in limits:
            tensor.CopyFrom(numpy_helper.from_array(np.float32(5), tensor.name))
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in limits:
            node.attribute[0].t.CopyFrom(five)


def test_the_bounds_of_activations_count(vit):
    with pytest.raises(UserError, match=r"activation \(Clip, 0.0, 5.0\)"):
        from_onnx.load(changed(vit, other_bound))


def test_another_mean_is_refused(unfolded):
    with pytest.raises(UserError, match=r"expected a mean of 127\.5"):
        from_onnx.load(unfolded, options=OnnxOptions(mean=100.0, scale=128.0))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x08\x08" * 20])
def test_what_is_no_onnx_file_is_one_line(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(UserError) as caught:
        from_onnx.load(tmp_path / "x.onnx")
    assert str(tmp_path / "x.onnx") in str(caught.value) and "\n" not in str(caught.value)


# ---- Training ------------------------------------------------------------------------------------


def test_statistics_from_images_are_torchs_and_leave_evaluation_as_it_is(folded, monkeypatch):
    monkeypatch.setattr(folded_statistics, "IMAGES", 100)
    found = from_onnx.load(folded)
    recipe = configs.replace(
        configs.Config(), data__path="synthetic", model__network="r_tiny", init_from="a.onnx"
    )
    source = opening.open_source(recipe.data, seed=0)
    given = (found.params, found.batch_stats)
    completed, notes = folded_statistics.complete(given, recipe, source)
    assert len(notes) == 1 and f"{found.folded} BatchNorm" in notes[0]
    assert not folded_statistics.folded(completed[1])
    numbers = np.linspace(0, len(source) - 1, 100).astype(int)
    images = np.stack([source[n][0] for n in numbers.tolist()])
    twin = twins.load("r_tiny", weights.to_state_dict(*completed))
    seen = {}

    def note(name: str):
        def hook(module, inputs):
            x = inputs[0].double()
            axes = [axis for axis in range(x.ndim) if axis != 1]
            seen[name] = x.mean(axes).numpy(), x.var(axes, correction=0).numpy()

        return hook

    for name, module in twin.named_modules():
        module.register_forward_pre_hook(note(name))
    embeddings = parity.torch_embeddings(twin, images)
    for name in folded_statistics.folded(found.batch_stats):
        mean, var = seen[name]
        np.testing.assert_allclose(completed[1][f"{name}.var"], var, rtol=2e-3, err_msg=name)
        ours = completed[1][f"{name}.mean"]
        np.testing.assert_allclose(ours, mean, atol=2e-3 * np.sqrt(var).max(), err_msg=name)
    before = Network("r_tiny", *given, batch_size=100, devices=1)(images)
    assert parity.largest_error(embeddings, before) < 1e-4


def test_frozen_statistics_stay(folded):
    found = from_onnx.load(folded)
    recipe = configs.replace(configs.Config(), finetune__frozen_statistics=("*",))
    given = (found.params, found.batch_stats)
    assert folded_statistics.complete(given, recipe, source=None) == (given, [])  # type: ignore[arg-type]


def test_the_command_makes_a_workdir_that_knows_which_statistics_it_lacks(folded, tmp_path, capsys):
    workdir = tmp_path / "imported"
    assert imports.main([str(folded), "--output", str(workdir)]) == 0
    told = result(capsys.readouterr().out)
    assert told["network"] == "r_tiny" and told["parity"] < 1e-5 and told["folded"] > 10
    config, _, batch_stats, _ = saved_runs.restore_backbone(workdir)
    assert config.model.network == "r_tiny"
    assert len(folded_statistics.folded(batch_stats)) == told["folded"]


@pytest.mark.slow
def test_training_starts_from_the_file(folded, tmp_path, capsys, tiny_recipe):
    options = ["--workdir", str(tmp_path / "run"), "--init-from", str(folded), *R_TINY]
    assert script("train").main([str(tiny_recipe), *options, "--schedule.epochs", "1"]) == 0
    assert "folded in init_from" in capsys.readouterr().err
    assert np.isfinite(_losses(tmp_path / "run")).all()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("ARCFACE_JAX_MODELS"), reason="ARCFACE_JAX_MODELS is unset")
def test_published_mobilefacenet_y1(tmp_path):
    """insightface's weights, exported by MXNet, as ONNX Runtime runs them."""
    path = Path(os.environ["ARCFACE_JAX_MODELS"]) / "mobilefacenet_y1.onnx"
    found = from_onnx.load(Path(shutil.copy(path, tmp_path)))
    assert found.network == "mobilefacenet_y1" and found.error < 1e-5 and found.folded == 0


def _losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]
