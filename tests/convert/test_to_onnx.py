"""ONNX files: JAX's embeddings at any batch, and accepted by insightface's own client."""

import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest

from arcface_jax.commands import export
from arcface_jax.config.choices import OnnxOptions
from arcface_jax.convert import onnx_batch, onnx_graph, parity, to_onnx, to_stablehlo, to_torch
from arcface_jax.convert.onnx_graph import Form
from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.errors import UserError
from arcface_jax.evaluation.calibration import Calibration
from arcface_jax.inference.embedder import Embedder
from arcface_jax.inference.open_model import ModelChoice, open_network
from arcface_jax.training.network import Network


@pytest.fixture(scope="module")
def embedder(workdir) -> Network:
    return open_network(ModelChoice(workdir=workdir))


@pytest.fixture(scope="module", params=["outside", "inside"])
def exported(request, embedder, tmp_path_factory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    assert to_onnx.export(embedder, path, form=Form(normalization=request.param)).error < 1e-5
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    return request.param, path


def test_the_graph_is_what_clients_expect(exported, embedder):
    normalization, path = exported
    model = onnx.load(path)
    graph = model.graph
    assert model.opset_import[0].version >= 17 and len(graph.node) >= 8
    (given,), (out,) = graph.input, graph.output
    names = [given.name, out.name]
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (given, out)
    ]
    assert names == ["input", "embedding"]
    assert shapes == [["batch", 3, 112, 112], ["batch", 512]]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    described = json.loads(metadata.pop("model_input"))
    assert described["digest"] == embedder.digest() and described["output"] == "embedding"
    assert metadata == {
        "network": "r_tiny",
        "embedding_size": "512",
        "color_order": "RGB",
        "mean": "127.5" if normalization == "outside" else "0.0",
        "scale": "127.5" if normalization == "outside" else "1.0",
        "normalization": normalization,
        "precision": "float32",
    }
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnx_runtime_gives_jaxs_embeddings(exported, embedder, faces, batch):
    """Given what the metadata says that it takes."""
    normalization, path = exported
    x = faces[:batch].transpose(0, 3, 1, 2).astype(np.float32)
    x = x if normalization == "inside" else (x / 255 - 0.5) / 0.5
    (out,) = onnxruntime.InferenceSession(path).run(["embedding"], {"input": x})
    assert parity.largest_error(out, embedder(faces[:batch])) < 1e-5


def test_insightfaces_own_class_gives_the_embedding(exported, embedder, faces):
    """Its class takes BGR, and decides by the names of nodes what to do with pixels."""
    client = pytest.importorskip("insightface.model_zoo.arcface_onnx", exc_type=ImportError)
    normalization, path = exported
    model = client.ArcFaceONNX(str(path), onnxruntime.InferenceSession(path))
    assert (model.input_mean, model.input_std) == (
        (0.0, 1.0) if normalization == "inside" else (127.5, 127.5)
    )
    assert model.input_size == (112, 112)
    theirs = model.get_feat([face[:, :, ::-1].copy() for face in faces[:3]])
    assert parity.largest_error(theirs, embedder(faces[:3])) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("network", ["r50", "mbf", "vit_t", "edgeface_xs"])
def test_every_family(network, faces, tmp_path):
    embedder = Network(network, *parity.settled(network, faces), batch_size=16, devices=1)
    assert to_onnx.export(embedder, tmp_path / "model.onnx").error < 1e-5


@pytest.mark.slow
def test_files_of_lower_precision(embedder, faces, tmp_path):
    half, small = tmp_path / "half.onnx", tmp_path / "small.onnx"
    error = to_onnx.export(
        embedder, half, form=Form(normalization="inside"), precision="float16"
    ).error
    assert 0 < error < 5e-3
    made = to_onnx.export(
        embedder, small, form=Form(normalization="inside"), precision="int8", calibration=faces
    )
    assert 0 < made.error < 0.15
    floats = [layer.layer for layer in made.layers if not layer.quantized]
    assert floats == [made.layers[0].layer, made.layers[-1].layer]
    (written,) = [to_onnx.write_layers(made.layers, small)]
    assert written.name == "small.onnx.layers.json"
    assert [row["error"] for row in json.loads(written.read_text())] == [
        layer.error for layer in made.layers
    ]
    assert len(made.layers) == 14 and all(0 <= layer.error < 0.3 for layer in made.layers)
    whole, last = 4 * 5_500_000, embedder.params["fc.kernel"].nbytes  # bytes of float32 weights
    assert half.stat().st_size < 0.55 * whole
    assert small.stat().st_size < last + 0.4 * (whole - last)
    for path in (half, small):  # clients see that pixels are normalized there too
        outs = onnx_embedder(path)(faces[:3])
        assert parity.largest_error(outs, embedder(faces[:3])) < 0.15


@pytest.mark.slow
def test_the_command_compares_before_and_after(workdir, pairs_file, tmp_path, capsys):
    argv = ["--checkpoint", str(workdir), "--output", str(tmp_path / "m.onnx")]
    export.onnx([*argv, "--targets", str(pairs_file)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert result["parity"] < 1e-5
    assert result["eval/few jax/accuracy"] == result["eval/few onnx/accuracy"]


def test_a_file_whose_embeddings_differ_gets_no_name(embedder, tmp_path, monkeypatch):
    """Here because the graph's last bias was changed before the check."""
    write = onnx_graph.write

    def write_wrong(path, *args, **kwargs):
        write(path, *args, **kwargs)
        model = onnx.load(path)
        (bias,) = (a for a in model.graph.initializer if a.name == model.graph.node[-1].input[2])
        bias.raw_data = np.full(512, 0.3, np.float32).tobytes()
        onnx.save(model, path)

    monkeypatch.setattr(onnx_graph, "write", write_wrong)
    (tmp_path / "model.onnx").write_bytes(b"precious")
    with pytest.raises(UserError, match="nothing was written"):
        to_onnx.export(embedder, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"precious"


def test_what_cannot_be_done_is_said_before(embedder, exported, tmp_path):
    with pytest.raises(UserError, match="--calibration"):
        to_onnx.export(embedder, tmp_path / "m.onnx", precision="int8")
    with pytest.raises(UserError, match="there is no folder"):
        to_onnx.export(embedder, tmp_path / "none" / "m.onnx")
    with pytest.raises(UserError, match="exported already"):
        open_network(ModelChoice(onnx=exported[1]))


def test_a_folder_as_output_is_refused_first(embedder, exported, tmp_path, monkeypatch):
    def slow(*_, **__):
        pytest.fail("slow work before the check of the output")

    monkeypatch.setattr(parity, "drawn_faces", slow)
    monkeypatch.setattr(onnx_graph, "write", slow)
    free = lambda output: onnx_batch.free(exported[1], output, options=OnnxOptions())  # noqa: E731
    for write in (partial(to_onnx.export, embedder), partial(to_stablehlo.export, embedder), free):
        with pytest.raises(UserError, match=f"cannot write {tmp_path}: it is a folder"):
            write(tmp_path)
    with pytest.raises(UserError, match="it is a folder"):
        to_torch.export(tmp_path / "none", tmp_path)
    with pytest.raises(UserError, match=r"cannot write /proc/x\.onnx: "):
        to_onnx.export(embedder, Path("/proc/x.onnx"))


def test_a_file_that_cannot_be_freed_in_place_is_one_line(exported, monkeypatch):
    monkeypatch.setattr(onnx_batch, "_BATCHES", (1,))
    with pytest.raises(UserError, match=r"cannot write /proc/x\.onnx: "):
        onnx_batch.free(exported[1], Path("/proc/x.onnx"), options=OnnxOptions())


OPSETS = [13, 15, 17, 18, onnx.defs.onnx_opset_version()]


@pytest.mark.parametrize("opset", [13, onnx.defs.onnx_opset_version()])
def test_operators_of_any_version(embedder, faces, tmp_path, opset):
    path = tmp_path / "model.onnx"
    assert to_onnx.export(embedder, path, form=Form(opset=opset)).error < 1e-5
    model = onnx.load(path)
    assert (model.opset_import[0].version, model.ir_version) == (opset, 8)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("network", ["mbf", "vit_t", "edgeface_xs"])
def test_operators_of_any_version_in_every_family(network, faces, tmp_path, opset):
    model = Network(network, *parity.settled(network, faces), batch_size=16, devices=1)
    path = tmp_path / "model.onnx"
    assert to_onnx.export(model, path, form=Form(opset=opset)).error < 1e-5
    onnx.checker.check_model(onnx.load(path), full_check=True)
    normalizations = [n for n in onnx.load(path).graph.node if n.op_type == "LayerNormalization"]
    assert bool(normalizations) == (network != "mbf" and opset >= 17)


def test_opencv_runs_the_file(exported, embedder, faces):
    normalization, path = exported
    x = faces[:2].transpose(0, 3, 1, 2).astype(np.float32)
    net = cv2.dnn.readNetFromONNX(str(path))
    net.setInput(x if normalization == "inside" else (x / 255 - 0.5) / 0.5)
    assert parity.largest_error(net.forward(), embedder(faces[:2])) < 1e-4


def test_a_graph_that_takes_decoded_images(embedder, faces, tmp_path):
    path = tmp_path / "model.onnx"
    assert to_onnx.export(embedder, path, form=Form(input="uint8-nhwc")).error < 1e-5
    (out,) = onnxruntime.InferenceSession(path).run(None, {"input": faces[:3]})
    assert parity.largest_error(out, embedder(faces[:3])) < 1e-5
    model = onnx_embedder(path)
    assert (model.input.layout, model.input.dtype, model.input.mean) == ("NHWC", "uint8", 0.0)
    with pytest.raises(UserError, match="leave out --normalization outside"):
        Form(input="uint8-nhwc", normalization="outside").check()


def test_versions_that_no_export_has():
    for form, message in ((Form(opset=12), "opset 12: expected 13 to"), (Form(ir_version=6), "7")):
        with pytest.raises(UserError, match=message):
            form.check()


def test_a_calibration_follows_a_run_into_its_exact_exports(embedder, exported, faces, tmp_path):
    _, path = exported
    far = Calibration(
        **dict.fromkeys(("far_target", "far", "far_low", "far_high"), 0.1),
        **dict.fromkeys(("tar", "tar_low", "tar_high"), 0.9),
        **dict.fromkeys(("same_pairs", "different_pairs"), 10),
        **dict.fromkeys(("set_name", "set_digest", "date"), ""),
        threshold_cosine=0.5,
        threshold_squared_distance=1.0,
        enough_pairs=False,
        flip=False,
        model=embedder.input.digest,
    )
    of_run, of_file = Embedder(embedder), Embedder(onnx_embedder(path))
    pairs = [e.verify(faces[:4], faces[4:8], threshold=far) for e in (of_run, of_file)]
    np.testing.assert_allclose(pairs[0].score, pairs[1].score, atol=1e-5)
    half = tmp_path / "half.onnx"
    error = to_onnx.export(embedder, half, precision="float16").error
    assert (onnx_embedder(half).input.digest == embedder.digest()) == (error <= 1e-3)
    small = tmp_path / "int8.onnx"
    to_onnx.export(embedder, small, precision="int8", calibration=faces)
    assert onnx_embedder(small).input.digest == onnx_embedder(small).digest() != embedder.digest()
    with pytest.raises(UserError, match="calibration is of another model"):
        Embedder(onnx_embedder(small)).verify(faces[:1], faces[1:2], threshold=far)


def test_other_peoples_files_get_a_free_batch(embedder, exported, faces, tmp_path, capsys):
    """A file whose batch of 1 is in its input, its output and the shape of a Reshape."""
    normalization, path = exported
    model = onnx.load(path)
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    graph.node[-1].output[0] = "unshaped"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 512]), "shape"))
    reshape = onnx.helper.make_node("Reshape", ["unshaped", "shape"], ["embedding"], "last")
    graph.node.append(reshape)
    fixed, free = tmp_path / "fixed.onnx", tmp_path / "free.onnx"
    onnx.save(model, fixed)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        x = np.zeros((2, 3, 112, 112), np.float32)
        onnxruntime.InferenceSession(fixed).run(None, {"input": x})
    for ignored in (["--opset", "13"], ["--precision", "int8"], ["--targets", "a.bin", "b.bin"]):
        with pytest.raises(SystemExit):
            export.main([str(fixed), "--dynamic-batch", "--output", str(free), *ignored])
        words = " ".join(ignored)
        assert f"{words} does not go with --dynamic-batch" in capsys.readouterr().err
    assert export.main([str(fixed), "--dynamic-batch", "--output", str(free)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1][7:])["parity"] < 1e-5
    x = faces.transpose(0, 3, 1, 2).astype(np.float32)
    x = x if normalization == "inside" else (x / 255 - 0.5) / 0.5
    (out,) = onnxruntime.InferenceSession(free).run(None, {"input": x})
    assert parity.largest_error(out, embedder(faces)) < 1e-5
