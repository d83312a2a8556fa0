"""`evaluate --check-input` on models that tell people apart in one color order only."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_jax.commands import evaluate
from arcface_jax.evaluation.model_input import ColorOrder, ModelInput
from arcface_jax.inference import input_check

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PAIRS = 60


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People who differ in red, on images whose blue is noise."""
    rng = np.random.default_rng(0)
    images, same = [], []
    for pair in range(PAIRS):
        alike = pair % 2 == 0
        people = rng.choice(10, 2, replace=False)
        for person in (people[0], people[0] if alike else people[1]):
            image = np.zeros((112, 112, 3), np.uint8)
            image[:, :, 0] = np.where(np.arange(112) // 4 % 10 == person, 255, 30)[:, None]
            image[:, :, 2] = rng.integers(0, 256, 112)[:, None]
            images.append(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
        same.append(alike)
    path = tmp_path_factory.mktemp("red") / "red.bin"
    path.write_bytes(pickle.dumps((images, same)))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Rows of the last channel that it gets, so it wants BGR."""
    helper, kinds = onnx.helper, onnx.TensorProto
    weight = np.zeros((28, 3, 4, 112), np.float32)
    weight[0, 2] = 1
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["rows"], strides=[4, 4]),
            helper.make_node("Slice", ["rows", "zero", "one", "one"], ["first"]),
            helper.make_node("Flatten", ["first"], ["embedding"]),
        ],
        "rows",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", kinds.FLOAT, ["n", 28])],
        [
            onnx.numpy_helper.from_array(array, name)
            for name, array in (
                ("w", weight),
                ("zero", np.array([0])),
                ("one", np.array([1])),
            )
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, tmp_path / "rows.onnx")
    return tmp_path / "rows.onnx"


def test_the_color_order_that_a_model_wants_is_found(model, targets, capsys):
    assert evaluate.main(["--onnx", str(model), "--targets", str(targets), "--check-input"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    wants = result["check_input/rows/wants"]
    assert wants.startswith("BGR") and "rows wants BGR" in out and "--color-order BGR" in out
    assert result[f"check_input/rows/red/{wants}"] > 0.95
    assert result["check_input/rows/red/RGB (x - 127.5) / 127.5"] < 0.9
    forms = [key for key in result if key.startswith("check_input/rows/red/")]
    assert len(forms) == 6  # two orders, three normalizations


def tried(order: ColorOrder, right: list[bool], *, used: bool) -> input_check.Tried:
    share = float(np.mean(right))
    return input_check.Tried(
        order, 127.5, 127.5, "set", share, (share, share), used, np.array(right)
    )


@pytest.mark.parametrize(
    ("wins", "losses", "certain"),
    [(5, 0, False), (6, 0, True), (9, 3, False), (10, 2, True)],  # 2 ** -5 is 0.03 to both sides
)
def test_a_sign_test_tells_whether_it_is_certain(wins: int, losses: int, certain: bool):
    ways = [
        tried("BGR", [True] * wins + [False] * losses + [True] * 30, used=False),
        tried("RGB", [False] * wins + [True] * losses + [True] * 30, used=True),
    ]
    assert input_check.best(ways).color_order == "BGR"
    assert input_check.is_certain(ways) == certain


def test_a_network_of_this_project_gets_both_color_orders(targets):
    class Red:
        input = ModelInput(embedding_size=28, digest="red")

        def __call__(self, images: np.ndarray) -> np.ndarray:
            return images[:, ::4, 0, 0].astype(np.float32) - 127.5

        def digest(self) -> str:
            return self.input.digest

    from arcface_jax.data.pairs.bins import read_bin

    ways = input_check.run(Red(), [read_bin(targets)])
    assert [way.form for way in ways] == [f"{o} (x - 127.5) / 127.5" for o in ("RGB", "BGR")]
    assert input_check.best(ways).is_used
