"""`data.py align`: crops by points from lists, from an ONNX detector, and from a function."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from witness import encode, smooth

from arcface_jax.data import detectors
from arcface_jax.data.faces import TEMPLATE
from arcface_jax.data.tools import aligning
from arcface_jax.errors import DataError, UserError

CROP = TEMPLATE


def photo(points: np.ndarray, *, height: int = 200, width: int = 260) -> np.ndarray:
    """A picture with a white spot at each of the points, (5, 2)."""
    image = smooth(0, height=height, width=width) // 3
    for x, y in points:
        cv2.circle(image, (round(x), round(y)), 4, (255, 255, 255), -1)
    return image


def moved(scale: float, angle: float, x: float, y: float) -> np.ndarray:
    """(5, 2) the template's points, turned, grown and shifted."""
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return CROP @ np.array([[c, s], [-s, c]]) + (x, y)


def spots(face: np.ndarray) -> np.ndarray:
    """(5,) mean brightness of a crop at the template's points."""
    return np.array(
        [face[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2].mean() for x, y in CROP]
    )


PLACES = {"ada/1.png": moved(0.9, 0.2, 40, 10), "bob/2.jpg": moved(1.1, -0.3, 20, 60)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, points in PLACES.items():
        (folder / name).parent.mkdir(parents=True)
        kind = "PNG" if name.endswith("png") else "JPEG"
        (folder / name).write_bytes(encode(photo(points), kind))
    return folder


def check(output: Path) -> None:
    for name in PLACES:
        data = (output / name).with_suffix(".jpg").read_bytes()
        face = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert face.shape == (112, 112, 3)
        assert spots(face).min() > 200 > 120 > face.mean()


@pytest.mark.parametrize("form", ["csv", "csv with heading", "json"])
def test_points_from_a_list(photos: Path, tmp_path: Path, form: str):
    if form == "json":
        file = tmp_path / "p.json"
        file.write_text(json.dumps({name: p.tolist() for name, p in PLACES.items()}))
    else:
        file = tmp_path / "p.csv"
        rows = [[name, *p.ravel().tolist()] for name, p in PLACES.items()]
        heading = [["path", *[f"{a}{i}" for i in range(5) for a in "xy"]]] * ("heading" in form)
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([*heading, *rows])
    done = aligning.align_folder(photos, tmp_path / "out", aligning.listed(file))
    assert (done.written, done.rejected) == (2, {})
    check(tmp_path / "out")


def test_what_is_rejected_is_reported_with_its_reason(photos: Path, tmp_path: Path):
    (photos / "bad.jpg").write_bytes(b"no image")
    for name in ("unlisted.png", "small.png", "one place.png"):
        (photos / name).write_bytes(encode(smooth(1)))
    points = {name: p.tolist() for name, p in PLACES.items()}
    points |= {"bad.jpg": CROP.tolist(), "small.png": (CROP / 4).tolist()}
    points["one place.png"] = [[50.0, 50.0]] * 5
    (tmp_path / "p.json").write_text(json.dumps(points))
    done = aligning.align_folder(
        photos, tmp_path / "out", aligning.listed(tmp_path / "p.json"), min_eyes=9.0
    )
    with done.report.open(newline="") as file:
        rows = dict(list(csv.reader(file))[1:])
    assert rows == done.rejected and done.written == 2
    assert rows["bad.jpg"] == "8 bytes that are not an image; remove or replace it"
    assert rows["unlisted.png"] == "no points in p.json"
    assert rows["small.png"].startswith("the eyes are 8.8 pixels apart, fewer than 9")
    assert rows["one place.png"].startswith("the eyes are 0.0 pixels apart")


@pytest.mark.parametrize(("choose", "best"), [("largest", 1), ("center", 0), ("score", 2)])
def test_one_of_several_faces_is_chosen(tmp_path: Path, choose, best: int):
    places = [moved(0.4, 0, 110, 70), moved(0.9, 0, 0, 90), moved(0.3, 0.5, 220, 0)]
    for number, points in enumerate(places):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.png").write_bytes(encode(photo(points)))
    faces = detectors.Faces(np.stack(places), np.array([0.6, 0.7, 0.9]))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode(photo(places[best])))
    aligning.align_folder(tmp_path / "in", tmp_path / "out", lambda *_: faces, choose=choose)
    data = (tmp_path / "out" / "a.jpg").read_bytes()
    face = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert spots(face).min() > 150


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "a.png,1,2,3\n", "line 1, a.png: .* not five points"),
        ("p.csv", "path,x\na.png,1,2,3,4,5,6,7,8,9,ten\n", "line 2, a.png: .* not five points"),
        ("p.json", "{", "not JSON"),
        ("p.json", "[]", "an object of path"),
        ("p.json", '{"a.png": [[1, 2]]}', "entry 1, a.png: .* not five points"),
    ],
)
def test_wrong_lists_of_points_are_refused(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        aligning.listed(tmp_path / name)


# ---- Detectors ----------------------------------------------------------------------------------

SIZE = 64


def scrfd_graph(path: Path, outputs: dict[str, np.ndarray], *, size: int = SIZE) -> Path:
    """An ONNX file with these outputs whatever the image, the first plus 0 times its mean."""
    image = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, size, size])
    names, nodes = list(outputs), []
    constants = [
        numpy_helper.from_array(v.astype(np.float32), f"c{i}")
        for i, v in enumerate(outputs.values())
    ]
    constants.append(numpy_helper.from_array(np.float32(0), "zero"))
    nodes.append(helper.make_node("ReduceMean", ["input.1"], ["mean"], keepdims=0))
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    for i, name in enumerate(names):
        nodes.append(helper.make_node("Add", [f"c{i}", "nothing"], [name]))
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, v.shape)
        for name, v in outputs.items()
    ]
    graph = helper.make_graph(nodes, "g", [image], infos, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def scrfd_outputs(faces: list[tuple], *, anchors: int = 2, batched: bool = False) -> dict:
    """Maps of scores, boxes and points in which (stride, anchor, score, box, points) are faces."""
    outputs = {}
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            outputs[f"{kind}_{stride}"] = np.zeros(((SIZE // stride) ** 2 * anchors, width))
    for stride, anchor, score, box, points in faces:
        # The cell whose center is nearest to the middle of the box.
        column, line = (int((box[i] + box[i + 2]) / 2 / stride) for i in (0, 1))
        row = (line * (SIZE // stride) + column) * anchors + anchor
        x, y = column * stride, line * stride
        outputs[f"score_{stride}"][row] = score
        outputs[f"bbox_{stride}"][row] = np.array([x - box[0], y - box[1], box[2] - x, box[3] - y])
        outputs[f"bbox_{stride}"][row] /= stride
        outputs[f"kps_{stride}"][row] = (np.array(points) - (x, y)).ravel() / stride
    return {name: v[None] if batched else v for name, v in outputs.items()}


POINTS = [CROP / 4 + (3.0 * i, 2.0 * i) for i in range(4)]
SCRFD_FACES = [
    (8, 0, 0.7, (2, 2, 14, 14), POINTS[0]),
    (16, 1, 0.9, (30, 30, 58, 60), POINTS[1]),
    (32, 0, 0.8, (31, 31, 59, 61), POINTS[2]),  # lies over the one before, and is less sure
    (8, 1, 0.4, (50, 2, 60, 12), POINTS[3]),  # below the threshold
]


@pytest.mark.parametrize(("anchors", "batched"), [(2, False), (2, True), (1, False)])
def test_scrfd_maps_are_decoded_to_the_faces_that_were_put_in(tmp_path: Path, anchors, batched):
    faces = [(s, a % anchors, *rest) for s, a, *rest in SCRFD_FACES]
    path = scrfd_graph(tmp_path / "s.onnx", scrfd_outputs(faces, anchors=anchors, batched=batched))
    detect = detectors.load(str(path), threshold=0.5, size=SIZE)
    found = detect(np.zeros((SIZE, SIZE, 3), np.uint8))
    np.testing.assert_allclose(found.scores, [0.9, 0.7], rtol=1e-6)
    np.testing.assert_allclose(found.points, [POINTS[1], POINTS[0]], atol=1e-4)
    # An image twice as wide: it was shrunk into the upper half, so all is twice as far.
    wide = detect(np.zeros((SIZE, 2 * SIZE, 3), np.uint8))
    np.testing.assert_allclose(wide.points, 2 * found.points, atol=1e-4)
    few = detectors.load(str(path), threshold=0.95, size=SIZE)
    assert few(np.zeros((30, 40, 3), np.uint8)).points.shape == (0, 5, 2)


def test_scrfd_sees_the_image_as_insightface_gives_it(tmp_path: Path):
    # Its input's channels are RGB, (x - 127.5) / 128, shrunk into the upper left corner.
    class Session:
        def get_inputs(self):
            return [type("Input", (), {"name": "x"})]

        def run(self, _, feed):
            self.blob = feed["x"]
            return list(scrfd_outputs([]).values())

    session, image = Session(), np.zeros((100, 50, 3), np.uint8)
    image[..., 0], image[..., 2] = 255, 10
    detectors.scrfd(session, image, threshold=0.5, size=SIZE)
    assert session.blob.shape == (1, 3, SIZE, SIZE) and session.blob.dtype == np.float32
    inside = session.blob[0, :, :, : SIZE // 2]
    for channel, value in enumerate((255, 0, 10)):
        np.testing.assert_allclose(inside[channel], (value - 127.5) / 128, atol=1e-6)
    np.testing.assert_allclose(session.blob[0, :, :, SIZE // 2 :], -127.5 / 128, atol=1e-6)


def yunet_graph(path: Path) -> Path:
    """A YuNet whose maps show one face at cell (5, 3) of stride 16, whatever the image."""
    outputs = {}
    for kind, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            outputs[f"{kind}_{stride}"] = np.zeros((1, (SIZE // stride) ** 2, width))
    row = 2 * (SIZE // 16) + 1
    for kind in ("cls", "obj"):
        outputs[f"{kind}_16"][0, row] = 0.81
    # Center (1 + 0.5, 2 + 0.25) x 16, size e^ln 2 x 16; points as offsets from the cell.
    outputs["bbox_16"][0, row] = [0.5, 0.25, np.log(2.0), np.log(2.0)]
    outputs["kps_16"][0, row] = np.arange(10) / 10
    return scrfd_graph(path, outputs)


def test_yunet_is_told_by_its_outputs_and_decoded_by_opencv(tmp_path: Path):
    detect = detectors.load(str(yunet_graph(tmp_path / "y.onnx")), threshold=0.5)
    for _ in range(2):
        found = detect(np.zeros((SIZE, SIZE, 3), np.uint8))
        np.testing.assert_allclose(found.scores, [0.81], atol=1e-5)
        expected = (np.arange(10).reshape(5, 2) / 10 + (1, 2)) * 16
        np.testing.assert_allclose(found.points[0], expected, atol=1e-3)


def test_a_function_of_ones_own(photos: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "own_detector.py").write_text(
        "import numpy as np\n"
        f"PLACES = {[p.tolist() for p in PLACES.values()]}\n"
        "def find(image):\n"
        "    bright = [np.mean([image[round(y), round(x)] for x, y in p]) for p in PLACES]\n"
        "    return np.array([PLACES[int(np.argmax(bright))]])\n"
        "def nothing(image): return []\n"
        "def wrong(image): return np.zeros((3, 4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    find = aligning.detected(detectors.load("own_detector:find"))
    assert aligning.align_folder(photos, tmp_path / "out", find).written == 2
    check(tmp_path / "out")
    nothing = aligning.detected(detectors.load("own_detector:nothing"))
    done = aligning.align_folder(photos, tmp_path / "none", nothing)
    assert set(done.rejected.values()) == {"no face"}
    with pytest.raises(UserError, match=r"returned points of shape \(3, 4\); expected \(n, 5, 2\)"):
        detectors.load("own_detector:wrong")(np.zeros((9, 9, 3), np.uint8))


def test_what_is_no_detector_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such ONNX file"):
        detectors.load("nowhere.onnx")
    with pytest.raises(UserError, match="No module named 'nothing_of_the_kind'"):
        detectors.load("nothing_of_the_kind:find")
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is no ONNX file that can be run"):
        detectors.load(str(tmp_path / "x.onnx"))
    graph = scrfd_graph(tmp_path / "two.onnx", {"a": np.zeros((1, 4)), "b": np.zeros((1, 1))})
    with pytest.raises(UserError, match="outputs a, b: it is neither YuNet"):
        detectors.load(str(graph))
    with pytest.raises(UserError, match="--detector-size 100 must be a multiple of 32"):
        detectors.load(str(graph), size=100)
    other = {f"o{i}": np.zeros((5, 2)) for i in range(9)}
    detect = detectors.load(str(scrfd_graph(tmp_path / "o.onnx", other)), size=SIZE)
    with pytest.raises(UserError, match="outputs have the shapes"):
        detect(np.zeros((SIZE, SIZE, 3), np.uint8))
