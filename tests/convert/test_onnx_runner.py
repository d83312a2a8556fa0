"""The ONNX runner on small graphs whose embeddings NumPy computes too."""

import sys
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 112, 112, 3), np.uint8)
WEIGHT = RNG.normal(size=(4, 3, 112, 112)).astype(np.float32)


def model(
    path: Path,
    *,
    batch: str | int = "N",
    inside: bool = False,
    metadata: dict[str, str] | None = None,
) -> Path:
    """One convolution over the whole image; `inside` normalizes before it, named so."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes, x = [], "input"
    arrays = {"weight": WEIGHT, "half": np.float32(127.5), "step": np.float32(1 / 127.5)}
    if inside:
        nodes = [
            helper.make_node("Sub", ["input", "half"], ["less"], name="Sub_0"),
            helper.make_node("Mul", ["less", "step"], ["scaled"], name="Mul_1"),
        ]
        x = "scaled"
    nodes += [
        helper.make_node("Conv", [x, "weight"], ["map"], name="Conv_2"),
        helper.make_node("Flatten", ["map"], ["embedding"], name="Flatten_3"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", floats, [batch, 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", floats, [batch, 4])],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    helper.set_model_props(made, metadata or {})
    onnx.save(made, path)
    return path


def embeddings(images: np.ndarray, *, mean: float = 127.5, scale: float = 127.5) -> np.ndarray:
    return np.einsum("nhwc,dchw->nd", (images.astype(np.float64) - mean) / scale, WEIGHT)


def check(path: Path, expected: np.ndarray, **options) -> None:
    out = onnx_embedder(path, **options)(IMAGES)
    assert (out.shape, out.dtype) == ((5, 4), np.float32)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=0.02)


def test_normalizes_outside_unless_the_nodes_say_inside(tmp_path: Path):
    check(model(tmp_path / "outside.onnx"), embeddings(IMAGES))
    check(model(tmp_path / "inside.onnx", inside=True), embeddings(IMAGES))


def test_metadata_goes_before_names(tmp_path: Path):
    metadata = {"mean": "100", "scale": "50", "color_order": "BGR"}
    expected = embeddings(IMAGES[..., ::-1], mean=100, scale=50)
    check(model(tmp_path / "m.onnx", metadata=metadata), expected)
    raw = {"mean": "0", "scale": "1", "color_order": "RGB"}
    check(model(tmp_path / "raw.onnx", inside=True, metadata=raw), embeddings(IMAGES))


@pytest.mark.parametrize("batch", ["N", 1, 2, 8])
def test_any_number_of_images(tmp_path: Path, batch: str | int):
    check(model(tmp_path / "m.onnx", batch=batch), embeddings(IMAGES), batch_size=3)


def test_what_is_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="no model at"):
        onnx_embedder(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(UserError, match="not a model that ONNX Runtime opens"):
        onnx_embedder(tmp_path / "text.onnx")
    bad = model(tmp_path / "bad.onnx", metadata={"mean": "x", "scale": "1", "color_order": "RGB"})
    with pytest.raises(UserError, match="mean 'x', scale '1', color_order 'RGB'"):
        onnx_embedder(bad)
    loaded = onnx.load(model(tmp_path / "two.onnx"))
    loaded.graph.output.append(onnx.helper.make_tensor_value_info("map", 1, ["N", 4, 1, 1]))
    onnx.save(loaded, tmp_path / "two.onnx")
    with pytest.raises(UserError, match="expected one float input"):
        onnx_embedder(tmp_path / "two.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'arcface-jax\[onnx\]'"):
        onnx_embedder(bad)
