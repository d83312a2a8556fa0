"""`data.py align`: crops by points from lists, from an ONNX detector, and from a function."""

import csv
import hashlib
import json
import os
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from witness import encode, smooth

from arcface_jax.commands.data import main as data_command
from arcface_jax.data import detectors, face_measures
from arcface_jax.data.faces import TEMPLATE, align
from arcface_jax.data.tools import aligning, detector_check
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


@pytest.mark.parametrize(("name", "best"), [("a.png", 1), ("ada/a.png", 0), ("x/ada/a.png", 0)])
def test_auto_takes_the_largest_or_in_an_identitys_folder_the_central_face(
    tmp_path: Path, name: str, best: int
):
    places = np.stack([moved(0.4, 0, 110, 70), moved(0.9, 0, 0, 90)])
    file = tmp_path / "in" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(encode(photo(places[best])))
    faces = detectors.Faces(places, np.array([0.6, 0.7]))
    done = aligning.align_folder(tmp_path / "in", tmp_path / "out", lambda *_: faces)
    assert done.choices == {("largest", "center")[best == 0]: 1}
    (row,) = measured(tmp_path / "out")
    assert (row["path"], row["choice"], row["faces"]) == (name, *done.choices, "2")
    assert float(row["score"]) == faces.scores[best]
    np.testing.assert_allclose(
        [float(row["x"]), float(row["y"])], places[best].mean(axis=0), atol=0.06
    )


def measured(output: Path) -> list[dict[str, str]]:
    """The rows of faces.csv."""
    with (output / "faces.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_size_blur_and_pose_of_each_face_are_measured(tmp_path: Path):
    # Drawn at 1.5 times the template's size, one as it is, one blurred, one turned by 20 degrees.
    folder, points = tmp_path / "in", moved(1.5, 0.0, 30, 10)
    folder.mkdir()
    sharp = np.random.default_rng(0).integers(0, 256, (220, 260, 3), np.uint8)
    blurred = cv2.GaussianBlur(sharp.astype(np.float32), (0, 0), 6)
    blurred = cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    turned = moved(1.5, np.radians(20), 60, 10)
    for name, image in (("a", sharp), ("b", blurred), ("c", sharp)):
        (folder / f"{name}.png").write_bytes(encode(image))
    found = {"a.png": points, "b.png": points, "c.png": turned}
    aligning.align_folder(
        folder, tmp_path / "out", lambda name, _: detectors.Faces(found[name][None], np.ones(1))
    )
    a, b, c = measured(tmp_path / "out")
    assert [float(row["size"]) for row in (a, b, c)] == [168.0] * 3  # 1.5 x 112
    assert float(a["blur"]) < 0.3 < 0.6 < float(b["blur"]) <= 1
    assert [float(a[angle]) for angle in ("yaw", "pitch", "roll")] == [0, 0, 0]
    assert float(c["roll"]) == pytest.approx(20, abs=0.1)


@pytest.mark.parametrize("angles", [(25, 0, 0), (0, 15, 0), (-20, 10, 30)])
def test_the_pose_of_a_head_that_was_turned_in_space(angles: tuple[float, float, float]):
    yaw, pitch, roll = np.radians(angles)
    c, s = np.cos, np.sin
    turn = np.array([[c(roll), -s(roll), 0], [s(roll), c(roll), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, c(pitch), s(pitch)], [0, -s(pitch), c(pitch)]])
    turn = turn @ np.array([[c(yaw), 0, -s(yaw)], [0, 1, 0], [s(yaw), 0, c(yaw)]])
    head = np.column_stack([TEMPLATE, [0, 0, -18, -4, -4]])  # the nose is nearest to the camera
    head -= head.mean(axis=0)
    seen = (head @ turn.T)[:, :2] * 3 + (200, 100)
    np.testing.assert_allclose(face_measures.pose(seen), angles, atol=1e-6)
    if angles[1:] == (0, 0):
        assert seen[2, 0] > seen[[0, 1, 3, 4], 0].mean()  # the nose points to the viewer's right


def test_a_second_run_resumes_and_leaves_nothing_stale(photos: Path, tmp_path: Path):
    output, asked = tmp_path / "out", []
    for name in ("ada/3.png", "cy/1.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(encode(photo(PLACES["ada/1.png"])))
    small, killed_at = {"ada/3.png"}, {"bob/2.jpg"}

    def points_of(name: str, image: np.ndarray) -> detectors.Faces:
        asked.append(name)
        if name in killed_at:
            raise KeyboardInterrupt
        points = np.zeros((0, 5, 2)) if name in small else PLACES["ada/1.png"][None]
        return detectors.Faces(points, np.ones(len(points)))

    with pytest.raises(KeyboardInterrupt):
        aligning.align_folder(photos, output, points_of, threads=1)
    asked.clear()
    killed_at.clear()
    # What was killed in the middle of a line is done again.
    with (output / aligning.JOURNAL).open("a") as file:
        file.write('["bob/2.jpg", [1')
    done = aligning.align_folder(photos, output, points_of, threads=1)
    assert asked == ["ada/3.png", "bob/2.jpg", "cy/1.png"]  # rejected ones are looked at again
    assert (done.written, done.kept, done.removed) == (3, 1, 0)
    assert done.rejected == {"ada/3.png": "no face"}
    # Gone, changed, lost, and rejected no more.
    asked.clear()
    (photos / "cy" / "1.png").unlink()
    (photos / "bob" / "2.jpg").write_bytes(encode(photo(PLACES["bob/2.jpg"]), "JPEG"))
    (output / "ada" / "1.jpg").unlink()
    small.clear()
    done = aligning.align_folder(photos, output, points_of, threads=1)
    assert sorted(asked) == ["ada/1.png", "ada/3.png", "bob/2.jpg"]
    assert (done.written, done.kept, done.removed) == (3, 0, 1)
    assert sorted(p.relative_to(output).as_posix() for p in output.rglob("*.jpg")) == [
        *("ada/1.jpg", "ada/3.jpg", "bob/2.jpg")
    ]
    assert not (output / "cy").exists()
    assert [row["face"] for row in measured(output)] == ["ada/1.jpg", "ada/3.jpg", "bob/2.jpg"]
    names = (output / "identities.txt").read_text().splitlines()
    assert [name.split("\t")[1] for name in names] == ["ada", "bob"]
    # Rejected now: its face of an earlier run goes too.
    small.add("bob/2.jpg")
    os.utime(photos / "bob" / "2.jpg", (1, 1))
    done = aligning.align_folder(photos, output, points_of, threads=1)
    assert (done.kept, done.removed, [*done.rejected]) == (2, 1, ["bob/2.jpg"])
    assert not (output / "bob").exists()


def test_other_settings_and_folders_of_other_images_are_refused(photos: Path, tmp_path: Path):
    faces = detectors.Faces(PLACES["ada/1.png"][None], np.ones(1))
    aligning.align_folder(photos, tmp_path / "out", lambda *_: faces)
    with pytest.raises(DataError, match="choose was 'auto' and is 'score'; match them to resume"):
        aligning.align_folder(photos, tmp_path / "out", lambda *_: faces, choose="score")
    with pytest.raises(DataError, match="points was '' and is 'another'"):
        aligning.align_folder(photos, tmp_path / "out", lambda *_: faces, points="another")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_bytes(encode(smooth(1)))
    with pytest.raises(DataError, match=r"mine holds images that align did not write, such as a\."):
        aligning.align_folder(photos, tmp_path / "mine", lambda *_: faces)
    with pytest.raises(DataError, match="is inside"):
        aligning.align_folder(photos, photos / "faces", lambda *_: faces)


def test_faces_as_png_lose_nothing(photos: Path, tmp_path: Path):
    aligning.align_folder(
        photos,
        tmp_path / "out",
        lambda name, _: detectors.Faces(PLACES[name][None], np.ones(1)),
        format="png",
    )
    image = cv2.imdecode(
        np.frombuffer((photos / "ada" / "1.png").read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB
    )
    written = cv2.imread(str(tmp_path / "out" / "ada" / "1.png"))[..., ::-1]
    np.testing.assert_array_equal(written, align(image, PLACES["ada/1.png"]))


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


def test_yunet_sees_a_large_photograph_at_a_bounded_size(tmp_path: Path):
    detect = detectors.load(str(yunet_graph(tmp_path / "y.onnx")), size=SIZE)
    found = detect(np.zeros((20 * SIZE, 20 * SIZE, 3), np.uint8))
    expected = (np.arange(10).reshape(5, 2) / 10 + (1, 2)) * 16 * 20
    np.testing.assert_allclose(found.points[0], expected, atol=0.02)


def test_a_detectors_file_is_verified(tmp_path: Path, capsys, monkeypatch):
    path = yunet_graph(tmp_path / "y.onnx")
    cv2.imwrite(str(tmp_path / "p.png"), np.zeros((SIZE, SIZE, 3), np.uint8))
    with pytest.raises(SystemExit) as stop:
        data_command(["detector", "--check", str(path)])
    assert stop.value.code == 2 and "opens but found no face" in capsys.readouterr().err
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = detector_check.Known("a name", "a source", "a license")
    monkeypatch.setitem(detector_check.KNOWN, digest, known)
    words = ["--detector-size", str(SIZE), "--img", str(tmp_path / "p.png")]
    assert data_command(["detector", "--check", str(path), *words]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    assert (result["sha256"], result["known"], result["img_faces"]) == (digest, True, 1)
    assert "a name, from a source; a license" in out and "score 0.810" in out


def test_a_detector_that_finds_drawn_faces_has_found_five_points(monkeypatch):
    """A detector that knows where the faces were drawn, and one that exchanges the eyes."""

    def load(order: list[int]):
        def detect(image: np.ndarray) -> detectors.Faces:
            y, x = np.argwhere((image != 128).any(axis=2)).min(axis=0)
            return detectors.Faces((TEMPLATE[order] + (x, y))[None], np.ones(1))

        return lambda *_, **__: detect

    for order, found in (([0, 1, 2, 3, 4], detector_check.DRAWN), ([1, 0, 2, 4, 3], 0)):
        monkeypatch.setattr(detectors, "load", load(order))
        assert detector_check.check(Path(__file__)).found == found


def test_scrfd_of_a_fixed_size_is_run_at_that_size(tmp_path: Path):
    path = str(scrfd_graph(tmp_path / "s.onnx", scrfd_outputs([])))
    assert not len(detectors.load(path)(np.zeros((9, 9, 3), np.uint8)).points)
    with pytest.raises(UserError, match="takes images of 64 x 64 only"):
        detectors.load(path, size=128)


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
    with pytest.raises(
        UserError, match=r"--threshold 0\.9 is for ONNX files, and own_detector:find"
    ):
        detectors.load("own_detector:find", threshold=0.9)


def test_what_is_no_detector_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such ONNX file"):
        detectors.load("nowhere.onnx")
    with pytest.raises(UserError, match="No module named 'nothing_of_the_kind'"):
        detectors.load("nothing_of_the_kind:find")
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not an ONNX file that can be run"):
        detectors.load(str(tmp_path / "x.onnx"))
    (tmp_path / "x.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(UserError, match="is a Git LFS pointer, not the file"):
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


ODD = (b"[red]\xff/\x1b[2J.png", b"=cmd()/a$b_{.png", b"-1+2/\xe9\r.png", b"<b>/1\n2.png")


def test_a_bad_name_does_not_end_a_run(tmp_path: Path, capsys):
    folder, points = tmp_path / "photos", {}
    for name in (*map(os.fsdecode, ODD), "ada/rejected\x1b.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(encode(photo(PLACES["ada/1.png"]), "PNG"))
        points[name] = PLACES["ada/1.png"].tolist()
    points["ada/rejected\x1b.png"] = (CROP / 40).tolist()
    (tmp_path / "p.json").write_text(json.dumps(points))
    command = ["align", str(folder), str(tmp_path / "out"), "--format", "png"]
    command += ["--points", str(tmp_path / "p.json"), "--min-eyes", "9"]
    assert data_command(command, prog="data.py") == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert all((tmp_path / "out" / os.fsdecode(name)).is_file() for name in ODD)
    table = (tmp_path / "out" / "faces.csv").read_text()  # in UTF-8
    assert "\x1b" not in table and r"[red]\xff/\x1b[2J.png" in table
    assert "'=cmd()/" in table and "'-1+2/" in table
    page = (tmp_path / "out" / "align.html").read_text()
    assert "\x1b" not in page and "<b>/" not in page and r"[red]\xff" in page
    rejects = (tmp_path / "out" / "rejects.csv").read_text()
    assert r"ada/rejected\x1b.png" in rejects
    assert data_command(["inspect", str(tmp_path / "out")], prog="data.py") == 0
    assert "\x1b" not in capsys.readouterr().out
