"""ONNX files that loop, or make giants of one face, are refused before a runtime opens them."""

from pathlib import Path

import numpy as np
import pytest

from arcface_jax.convert import onnx_bounds
from arcface_jax.convert.onnx_runner import onnx_embedder
from arcface_jax.errors import UserError
from tests.faults import attacks_on_models, samples

HOSTILE = {
    "a loop": (lambda: attacks_on_models.loop(2**62), "has a Loop, which need not end"),
    "a loop in a branch": (lambda: attacks_on_models.loop(2**62, hidden=True), "has a Loop"),
    "tiles": (
        lambda: attacks_on_models.tiled([1, 1, 1000, 1000]),
        "makes an array of 37,632,000,000",
    ),
    "a constant": (
        lambda: attacks_on_models.tiled([40_000, 40_000], kind="ConstantOfShape"),
        "an array of",
    ),
    "a large picture": (
        lambda: attacks_on_models.tiled([1, 3, 40_000, 40_000], kind="Resize"),
        "an array",
    ),
    "a batch": (lambda: samples.graph(batch=100_000), "batches of 100,000 images only"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_costs_more_than_a_network_is_refused(tmp_path: Path, case: str):
    make, message = HOSTILE[case]
    (tmp_path / "x.onnx").write_bytes(make().SerializeToString())
    with pytest.raises(UserError, match=message) as caught:
        onnx_embedder(tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x3a\xff\xff\xff\xff\x7f", b"\x0b" * 40])
def test_what_is_no_protobuf_message_is_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(UserError) as caught:
        onnx_embedder(tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", ["batch", 1, 64])
def test_an_honest_file_passes(tmp_path: Path, batch: int | str):
    (tmp_path / "x.onnx").write_bytes(samples.graph(batch=batch).SerializeToString())
    onnx_bounds.check(tmp_path / "x.onnx")
    faces = np.zeros((3, 112, 112, 3), np.uint8)
    assert onnx_embedder(tmp_path / "x.onnx")(faces).shape == (3, 32)
