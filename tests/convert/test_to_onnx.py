"""ONNX files: JAX's embeddings at any batch, and accepted by insightface's own client."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from arcface_jax.commands import export
from arcface_jax.convert import onnx_graph, parity, to_onnx
from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.errors import UserError
from arcface_jax.inference.open_model import ModelChoice, open_network
from arcface_jax.training.network import Network


@pytest.fixture(scope="module")
def embedder(workdir) -> Network:
    return open_network(ModelChoice(workdir=workdir))


@pytest.fixture(scope="module", params=["outside", "inside"])
def exported(request, embedder, tmp_path_factory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    assert to_onnx.export(embedder, path, normalization=request.param) < 1e-5
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    return request.param, path


def test_the_graph_is_what_clients_expect(exported):
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
@pytest.mark.parametrize("network", ["r50", "mbf", "vit_t"])
def test_every_family(network, faces, tmp_path):
    embedder = Network(network, *parity.settled(network, faces), batch_size=16, devices=1)
    assert to_onnx.export(embedder, tmp_path / "model.onnx") < 1e-5


def test_files_of_lower_precision(embedder, faces, tmp_path):
    half, small = tmp_path / "half.onnx", tmp_path / "small.onnx"
    error = to_onnx.export(embedder, half, normalization="inside", precision="float16")
    assert 0 < error < 5e-3
    error = to_onnx.export(
        embedder, small, normalization="inside", precision="int8", calibration=faces
    )
    assert 0 < error < 0.15
    whole = 4 * 5_500_000  # bytes of float32 weights
    assert half.stat().st_size < 0.55 * whole and small.stat().st_size < 0.3 * whole
    for path in (half, small):  # clients see that pixels are normalized there too
        outs = onnx_embedder(path)(faces[:3])
        assert parity.largest_error(outs, embedder(faces[:3])) < 0.15


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
