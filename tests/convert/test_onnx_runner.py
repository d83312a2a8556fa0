"""The ONNX runner on small graphs whose embeddings NumPy computes too."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_jax.cleaning import embedding
from arcface_jax.config.choices import OnnxOptions
from arcface_jax.convert import onnx_batch
from arcface_jax.convert.onnx_runner import OnnxModel, onnx_embedder
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import UserError
from arcface_jax.evaluation.model_input import METADATA_KEY, ModelInput
from arcface_jax.evaluation.protocols import labeled
from arcface_jax.inference.embedder import Embedder

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
    steps = [("Sub", 127.5, "Sub_0"), ("Mul", 1 / 127.5, "Mul_1")] if inside else []
    return graph(path, steps=steps, batch=batch, metadata=metadata)


def graph(
    path: Path,
    *,
    steps: Sequence[tuple] = (),
    batch: str | int = "N",
    side: str | int = 112,
    kind: str = "FLOAT",
    channels_last: bool = False,
    end: Sequence[tuple] = (("Flatten",),),
    outputs: dict[str, list] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A convolution over the whole image, with other operations before and after it.

    Args:
      path: of the file.
      steps: before it: operator, constant, name.
      batch: the batch axis of the input and the outputs.
      side: height and width.
      kind: of the input's numbers.
      channels_last: of the input.
      end: operators after it, with the values of a second input.
      outputs: name and shape of each, where there is not one "embedding".
      metadata: of the file.
    """
    helper, kinds, nodes, x = onnx.helper, onnx.TensorProto, [], "input"
    arrays = {"weight": WEIGHT}
    if kind != "FLOAT":
        nodes, x = [helper.make_node("Cast", [x], ["floats"], to=kinds.FLOAT)], "floats"
    if channels_last:
        nodes.append(helper.make_node("Transpose", [x], ["planes"], perm=[0, 3, 1, 2]))
        x = "planes"
    for number, (operator, constant, name) in enumerate(steps):
        arrays[f"constant{number}"] = np.asarray(constant, np.float32)
        nodes.append(
            helper.make_node(operator, [x, f"constant{number}"], [f"step{number}"], name=name)
        )
        x = f"step{number}"
    nodes.append(helper.make_node("Conv", [x, "weight"], ["map"], name="Conv_2"))
    x = "map"
    for number, (operator, *constant) in enumerate(end):
        given = [x]
        if constant:
            arrays[f"end{number}"] = np.asarray(constant[0])
            given.append(f"end{number}")
        x = "embedding" if number == len(end) - 1 else f"after{number}"
        nodes.append(helper.make_node(operator, given, [x]))
    shape = [batch, side, side, 3] if channels_last else [batch, 3, side, side]
    shapes = outputs or {"embedding": [batch, len(WEIGHT)]}
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("input", getattr(kinds, kind), shape)],
            [helper.make_tensor_value_info(n, kinds.FLOAT, s) for n, s in shapes.items()],
            [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
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


RAW, SIGNED, UNIT = (0, 1), (127.5, 127.5), (0, 255)


@pytest.mark.parametrize(
    ("steps", "taken", "color_order"),
    [
        ([("Sub", 127.5, "a"), ("Div", 128.0, "b")], RAW, "RGB"),
        ([("Div", 255.0, "a"), ("Sub", 0.5, "b"), ("Div", 0.5, "c")], RAW, "RGB"),
        ([("Mul", 1 / 127.5, "a"), ("Add", -1.0, "b")], RAW, "RGB"),
        ([("Div", 255.0, "a")], RAW, "RGB"),
        ([("Sub", [[[104.0]], [[117.0]], [[123.0]]], "a")], RAW, "BGR"),
        ([("Sub", [[[0.485]], [[0.456]], [[0.406]]], "a"), ("Div", 0.225, "b")], UNIT, "RGB"),
        ([("Mul", 0.5, "a"), ("Add", 0.1, "b")], SIGNED, "RGB"),
    ],
)
def test_what_the_first_operations_do_tells_what_is_left_to_the_caller(
    tmp_path: Path, steps: list, taken: tuple[float, float], color_order: str
):
    opened = onnx_embedder(graph(tmp_path / "m.onnx", steps=steps))
    wants = opened.input
    assert (wants.mean, wants.scale, wants.color_order) == (*taken, color_order)
    assert opened.guessed.startswith("it takes")


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "UINT8"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("batch", "side"), [("", ""), (2, 112), ("N", "H")])
def test_every_form_of_input(tmp_path, kind, channels_last, batch, side):
    path = graph(
        tmp_path / "m.onnx", batch=batch, side=side, kind=kind, channels_last=channels_last
    )
    expected = embeddings(IMAGES) if kind != "UINT8" else embeddings(IMAGES, mean=0, scale=1)
    out = onnx_embedder(path, batch_size=3)(IMAGES)
    bound = {"FLOAT": 1e-4, "FLOAT16": 1e-3, "UINT8": 1e-4}[kind]
    assert np.abs(out - expected).max() < bound * np.abs(expected).max()


def test_options_go_before_guesses(tmp_path: Path):
    path = graph(tmp_path / "m.onnx")
    options = OnnxOptions(color_order="BGR", mean=100, scale=50)
    opened = onnx_embedder(path, options=options)
    expected = embeddings(IMAGES[..., ::-1], mean=100, scale=50)
    np.testing.assert_allclose(opened(IMAGES), expected, rtol=1e-3, atol=0.02)
    assert not opened.guessed
    with pytest.raises(UserError, match="takes uint8, so --mean"):
        onnx_embedder(graph(tmp_path / "u.onnx", kind="UINT8"), options=OnnxOptions(mean=1))


def described(path: Path, **values) -> Path:
    """A file with this project's description of its input."""
    made = ModelInput(embedding_size=4, output="embedding", digest="run", **values)
    return graph(path, kind=made.dtype.upper()[:5], metadata={METADATA_KEY: made.to_json()})


def test_a_described_file_of_uint8_takes_no_normalization(tmp_path: Path):
    path = described(tmp_path / "u.onnx", dtype="uint8", mean=0, scale=1)
    assert onnx_embedder(path, options=OnnxOptions(mean=0, scale=1)).input.digest == "run"
    with pytest.raises(UserError, match="takes uint8, so --mean"):
        onnx_embedder(path, options=OnnxOptions(mean=127.5, scale=127.5))


def test_the_digest_tells_how_the_input_is_prepared(tmp_path: Path):
    """It is the file's where the options change nothing, so that what is stored stays valid."""
    wide = np.tile(np.eye(4, dtype=np.float32), 16)
    path = graph(
        tmp_path / "m.onnx",
        end=[("Flatten",), ("MatMul", wide)],
        outputs={"after0": ["N", 4], "embedding": ["N", 64]},
    )
    file = hashlib.sha256(path.read_bytes()).hexdigest()
    same = ({}, {"color_order": "RGB", "mean": 127.5}, {"output_name": "embedding"})
    for options in same:
        opened = onnx_embedder(path, options=OnnxOptions(**options))
        assert opened.digest() == opened.input.digest == file
    others = (
        *({"color_order": "BGR"}, {"mean": 0}, {"scale": 128.0}, {"output_name": "after0"}),
        {"color_order": "BGR", "mean": 0},
    )
    found = [onnx_embedder(path, options=OnnxOptions(**options)) for options in others]
    digests = [opened.digest() for opened in found]
    assert len({file, *digests}) == 1 + len(others)
    assert [opened.input.digest for opened in found] == digests
    taking = opened.taking(color_order="BGR", mean=127.5, scale=127.5)
    assert taking.digest() == taking.input.digest == digests[0]


def test_an_export_that_is_prepared_in_another_way_is_not_its_run(tmp_path: Path):
    path = described(tmp_path / "m.onnx", compatible_with="teacher")
    exact = onnx_embedder(path)
    assert (exact.input.digest, exact.input.compatible_with) == ("run", "teacher")
    assert exact.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    other = onnx_embedder(path, options=OnnxOptions(color_order="BGR"))
    assert other.input.digest == other.digest() not in ("run", exact.digest())
    assert not other.input.compatible_with


def stored_folder(model: OnnxModel, images: Path, output: Path) -> None:
    Embedder(model).embed_folder(images, output)


def stored_features(model: OnnxModel, images: Path, output: Path) -> None:
    labeled.read(images, lambda: model, output=output)


def stored_for_cleaning(model: OnnxModel, images: Path, output: Path) -> None:
    pairs = PairSet("pairs", IMAGES[:4], np.array([True, False]))
    embedding.embed(model, embedding.of_pairs(pairs), output, name="pairs")


@pytest.mark.parametrize("store", [stored_folder, stored_features, stored_for_cleaning])
def test_embeddings_of_another_preparation_are_not_reused(tmp_path: Path, store: Callable):
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "0.png"), IMAGES[0])
    path, where = model(tmp_path / "m.onnx"), (tmp_path / "images", tmp_path / "out")
    store(onnx_embedder(path), *where)
    store(onnx_embedder(path, options=OnnxOptions(mean=127.5)), *where)  # as without it
    with pytest.raises(UserError, match="other settings: model was"):
        store(onnx_embedder(path, options=OnnxOptions(color_order="BGR")), *where)


def test_a_gallery_of_another_preparation_is_refused(tmp_path: Path):
    path = model(tmp_path / "m.onnx")
    bgr = Embedder(onnx_embedder(path, options=OnnxOptions(color_order="BGR")))
    made = bgr.build_gallery(tmp_path / "gallery", list(IMAGES), list("abcde"))
    assert bgr.search(made, IMAGES[1], k=1).name == [["b"]]
    with pytest.raises(UserError, match="the gallery is of another model"):
        Embedder(onnx_embedder(path)).search(made, IMAGES[1], k=1)


def test_the_digest_covers_weights_in_other_files(tmp_path: Path):
    """As torch's exporter writes them; the file itself is the same for all weights."""
    digests, files = [], []
    for factor in (1, 2):
        folder = tmp_path / str(factor)
        folder.mkdir()
        loaded = onnx.load(model(folder / "m.onnx"))
        (tensor,) = loaded.graph.initializer
        tensor.CopyFrom(onnx.numpy_helper.from_array(factor * WEIGHT, tensor.name))
        onnx.save(loaded, folder / "m.onnx", save_as_external_data=True, location="m.onnx.data")
        files.append((folder / "m.onnx").read_bytes())
        opened = onnx_embedder(folder / "m.onnx")
        digests.append(opened.digest())
        assert opened.input.digest == digests[-1]
    assert files[0] == files[1] and digests[0] != digests[1]
    (tmp_path / "2" / "m.onnx.data").rename(tmp_path / "1" / "m.onnx.data")
    assert onnx_embedder(tmp_path / "1" / "m.onnx").digest() == digests[1]
    assert opened.digest() == digests[1]  # of the weights that are in memory


def test_a_batch_without_images_is_refused(tmp_path: Path):
    for batch in ("N", 4):
        with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
            onnx_embedder(model(tmp_path / "m.onnx", batch=batch), batch_size=0)


def test_the_widest_of_several_outputs_or_the_one_that_is_named(tmp_path: Path):
    wide = np.tile(np.eye(4, dtype=np.float32), 16)
    path = graph(
        tmp_path / "m.onnx",
        end=[("Flatten",), ("MatMul", wide)],
        outputs={"after0": ["N", 4], "embedding": ["N", 64], "map": ["N", 4, 1, 1]},
    )
    opened = onnx_embedder(path)
    assert "its output embedding of 64 numbers (others: after0, map)" in opened.guessed
    assert opened.input.embedding_size == opened(IMAGES).shape[1] == 64
    named = onnx_embedder(path, options=OnnxOptions(output_name="map"))
    np.testing.assert_allclose(named(IMAGES), embeddings(IMAGES), rtol=1e-3, atol=0.02)
    with pytest.raises(UserError, match="no output 'none'"):
        onnx_embedder(path, options=OnnxOptions(output_name="none"))


def test_images_run_one_by_one_where_the_free_batch_is_none(tmp_path: Path):
    path = graph(tmp_path / "m.onnx", end=[("Reshape", np.array([1, 4]))])
    check(path, embeddings(IMAGES))
    assert "one by one" in onnx_embedder(path).guessed


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("allowzero", [0, 1])
def test_the_batch_in_a_reshape_is_set_free(tmp_path: Path, batch: int, allowzero: int):
    """With allowzero, 0 in a shape is a length, and torch's exporter sets it."""
    weight = np.eye(4, 64, dtype=np.float32)
    path = graph(
        tmp_path / "m.onnx",
        batch=batch,
        end=[("Reshape", np.array([batch, 4])), ("MatMul", weight)],
    )
    loaded = onnx.load(path)
    (node,) = (node for node in loaded.graph.node if node.op_type == "Reshape")
    node.attribute.append(onnx.helper.make_attribute("allowzero", allowzero))
    del loaded.graph.output[:]
    loaded.graph.output.append(onnx.helper.make_tensor_value_info("embedding", 1, [batch, 64]))
    onnx.save(loaded, path)
    assert onnx_batch.free(path, tmp_path / "free.onnx", options=OnnxOptions()) < 1e-5
    opened = onnx_embedder(tmp_path / "free.onnx", batch_size=5)
    assert opened.batch_size == 5
    expected = embeddings(IMAGES) @ weight
    np.testing.assert_allclose(opened(IMAGES), expected, rtol=1e-3, atol=0.02)


def test_a_batch_that_cannot_be_set_free_is_refused(tmp_path: Path):
    """One constant row for the batch: a class token without Expand is like it."""
    token = np.zeros((1, 4), np.float32)
    path = graph(tmp_path / "m.onnx", batch=1, end=[("Flatten",), ("Concat", token), ("Flatten",)])
    loaded = onnx.load(path)
    (node,) = (node for node in loaded.graph.node if node.op_type == "Concat")
    node.attribute.append(onnx.helper.make_attribute("axis", 1))
    del loaded.graph.output[:]
    loaded.graph.output.append(onnx.helper.make_tensor_value_info("embedding", 1, [1, 8]))
    onnx.save(loaded, path)
    with pytest.raises(UserError, match="more than the sizes of Reshape: nothing was written"):
        onnx_batch.free(path, tmp_path / "free.onnx", options=OnnxOptions())
    assert not (tmp_path / "free.onnx").exists()


def test_another_size_is_refused_by_name(tmp_path: Path):
    path = graph(tmp_path / "any.onnx", side="S", end=[("Reshape", np.array([2, 4]))])
    with pytest.raises(UserError, match="does not run on a face of 112 x 112"):
        onnx_embedder(path)
    with pytest.raises(UserError, match="takes images of 160 x 160 pixels; expected 112 x 112"):
        onnx_embedder(graph(tmp_path / "m.onnx", side=160))


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
