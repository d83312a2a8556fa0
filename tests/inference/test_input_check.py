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
    return rows(tmp_path / "rows.onnx")


def rows(path: Path, *, overflows: bool = False) -> Path:
    """As `model`; if it overflows, sums of 448 bytes are infinite in it, those of -1 .. 1 not."""
    helper, kinds = onnx.helper, onnx.TensorProto
    weight = np.zeros((28, 3, 4, 112), np.float32)
    weight[0, 2] = 1
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["rows"], strides=[4, 4]),
            helper.make_node("Slice", ["rows", "zero", "one", "one"], ["first"]),
            *(
                [
                    helper.make_node("Mul", ["first", "fifty"], ["large"]),
                    helper.make_node("Cast", ["large"], ["half"], to=kinds.FLOAT16),
                    helper.make_node("Cast", ["half"], ["end"], to=kinds.FLOAT),
                ]
                if overflows
                else [helper.make_node("Identity", ["first"], ["end"])]
            ),
            helper.make_node("Flatten", ["end"], ["embedding"]),
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
                ("fifty", np.array([50], np.float32)),
            )
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, path)
    return path


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


def test_a_way_that_overflows_is_a_failed_one(tmp_path, targets, capsys):
    """float16 on 0 .. 255, as networks for (x - 127.5) / 127.5 are."""
    path = rows(tmp_path / "half.onnx", overflows=True)
    assert evaluate.main(["--onnx", str(path), "--targets", str(targets), "--check-input"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    accuracies = {key: value for key, value in result.items() if "/red/" in key}
    failed = {key for key, value in accuracies.items() if value is None}
    assert failed == {f"check_input/half/red/{o} (x - 0) / 1" for o in ("RGB", "BGR")}
    assert "not finite" in out and len(accuracies) == 6
    assert result["check_input/half/wants"].startswith("BGR (x - ")


@pytest.mark.parametrize("option", ["--report", "--against"])
def test_what_it_does_not_do_is_refused(model, targets, capsys, option):
    words = ["--onnx", str(model), "--targets", str(targets), "--check-input"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*words, option, "somewhere"])
    assert stop.value.code == 2
    assert f"{option} somewhere does not go with --check-input" in capsys.readouterr().err


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
