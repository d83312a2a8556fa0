"""The library around a network: what it takes, what it gives, held against the torch twin."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import torch

import arcface_jax
from arcface_jax.config import Config, ModelConfig
from arcface_jax.config.choices import OnnxOptions
from arcface_jax.convert import parity, torch_iresnet, weights
from arcface_jax.data import detectors
from arcface_jax.data.faces import TEMPLATE
from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.data.synthetic.faces import draw_face
from arcface_jax.errors import DataError, UserError
from arcface_jax.evaluation import calibration
from arcface_jax.evaluation.model_input import ModelInput
from arcface_jax.inference import bulk, open_model
from arcface_jax.inference.embedder import Embedder
from arcface_jax.inference.open_model import ModelChoice, ModelChoices
from arcface_jax.runtime import devices
from arcface_jax.training import checkpoint, network, saved_runs, step
from arcface_jax.training.network import Network

FACES = np.stack([draw_face(seed=5, identity=i, index=0) for i in range(11)])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A run that was saved before its first step, with BatchNorm statistics that are not fresh."""
    folder = tmp_path_factory.mktemp("run")
    model = ModelConfig(network="r_tiny", embedding_size=16)
    config = Config(workdir=str(folder), model=model)
    manager = checkpoint.open_workdir(config)
    state = step.init_state(config, num_classes=3, mesh=devices.make(1))
    rng = np.random.default_rng(0)
    for name, array in state.batch_stats.items():
        low, high = (-0.2, 0.2) if name.endswith("mean") else (0.5, 2)
        state.batch_stats[name] = jax.numpy.asarray(
            rng.uniform(low, high, array.shape), jax.numpy.float32
        )
    checkpoint.save(manager, state, {"num_classes": 3, "num_images": 9})
    manager.close()
    return folder


@pytest.fixture(scope="module")
def embedder(workdir: Path) -> Embedder:
    return arcface_jax.Embedder(workdir, batch_size=8, devices=2)


@pytest.fixture(scope="module")
def expected(workdir: Path):
    """The torch twin's raw embeddings of any aligned images."""
    _, params, batch_stats, _ = saved_runs.restore_backbone(workdir)
    module = torch_iresnet.build("r_tiny", embedding_size=16)
    module.load_state_dict(weights.to_state_dict(params, batch_stats), strict=True)
    return lambda images: parity.torch_embeddings(module, np.ascontiguousarray(images))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def close(a: np.ndarray, b: np.ndarray) -> None:
    assert (a.shape, a.dtype) == (b.shape, np.float32)
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(np.abs(b).max())))


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_any_number_of_faces(embedder, expected, count: int):
    close(embedder(FACES[:count]), unit(expected(FACES[:count])))


def test_any_batch_size_on_any_number_of_devices(monkeypatch):
    """64 on three, five, six or seven; the pixels stand for embeddings, which compiles quickly."""
    pixels = lambda params, batch_stats, x: x[:, 50, 50:60, 0].astype(np.float32)  # noqa: E731
    monkeypatch.setattr(step, "make_embed", lambda backbone: pixels)
    three = Embedder(Network("r_tiny", {}, {}, batch_size=64, devices=3))
    many = np.tile(FACES, (3, 1, 1, 1))  # more than the 24 of the second program
    close(three(many), unit(many[:, 50, 50:60, 0].astype(np.float32)))
    for size in (0, -1):
        with pytest.raises(UserError, match=f"batch_size must be at least 1, got {size}"):
            Embedder(three.model, batch_size=size)
        with pytest.raises(UserError, match=f"batch_size must be at least 1, got {size}"):
            Network("r_tiny", {}, {}, batch_size=size)


def test_raw_length_and_flip(workdir, embedder, expected):
    raw = expected(FACES[:3])
    close(embedder(FACES[:3], normalized=False), raw)
    both = Embedder(workdir, batch_size=4, devices=1, flip=True)
    total = raw + expected(FACES[:3, :, ::-1])
    close(both(FACES[:3], normalized=False), total)
    close(both(FACES[:3]), unit(total))


def test_files_arrays_and_points_in_one_list(tmp_path: Path, embedder, expected):
    """A face moved about in a larger picture comes back by its points."""
    cv2.imwrite(str(tmp_path / "aligned.png"), FACES[0][..., ::-1])
    turn = np.array([[1.2, -0.5, 60], [0.5, 1.2, 20]])
    cv2.imwrite(str(tmp_path / "raw.png"), cv2.warpAffine(FACES[1], turn, (300, 260))[..., ::-1])
    points = TEMPLATE @ turn[:, :2].T + turn[:, 2]
    moved = cv2.warpAffine(FACES[2], turn, (300, 260))
    out = embedder(
        [tmp_path / "aligned.png", str(tmp_path / "raw.png"), FACES[3], moved],
        points=[None, points, None, points],
    )
    close(out[[0, 2]], unit(expected(FACES[[0, 3]])))
    back = np.stack([cv2.warpAffine(moved, _inverse(turn), (112, 112))])
    close(out[[3]], unit(expected(back)))
    assert out[1] @ embedder(FACES[1])[0] > 0.98  # twice resampled
    close(embedder(str(tmp_path / "raw.png"), points=points), out[[1]])
    close(embedder(FACES[0]), out[[0]])


def _inverse(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]


def test_other_sizes_are_refused_or_resized_with_a_note(workdir, embedder, expected):
    large = cv2.resize(FACES[0], (150, 200))
    with pytest.raises(DataError, match=r"150 x 200.*five points"):
        embedder([large])
    resizing = Embedder(embedder.model, other_size="resize")
    with pytest.warns(UserWarning, match="resized"):
        out = resizing(large)
    close(out, unit(expected(cv2.resize(large, (112, 112))[None])))


@pytest.mark.parametrize(
    ("faces", "points", "words"),
    [
        ([], None, "no faces"),
        (["nowhere.jpg"], None, r"no image at nowhere\.jpg"),
        (FACES[:2].astype(np.float32), None, r"float32; expected \(height, width, 3\) uint8"),
        (FACES[:2], np.stack([TEMPLATE]), "1 sets of points for 2 faces"),
        (FACES[:1], np.zeros((5, 2)), "coincide"),
        (FACES[0, :, :, 0], None, r"a face is \(112, 112\) uint8; expected"),
    ],
)
def test_what_is_no_face(embedder, faces, points, words: str):
    with pytest.raises(DataError, match=words):
        embedder(faces, points=points)


def test_generators_are_taken_batch_by_batch(embedder, expected):
    """No more images are asked for than the batch at hand needs."""
    asked = []

    def faces():
        for i in range(11):
            asked.append(i)
            yield FACES[i]

    streamed = embedder.stream(faces())
    first = next(streamed)
    assert (len(first), len(asked)) == (8, 8)
    both = np.concatenate([first, *streamed])
    close(both, unit(expected(FACES)))
    batches = (FACES[i : i + 4] for i in range(0, 11, 4))
    np.testing.assert_array_equal(embedder(batches), both)
    lists = ([FACES[i], FACES[i]] for i in range(2))
    np.testing.assert_allclose(embedder(lists), both[[0, 0, 1, 1]], atol=1e-5)
    np.testing.assert_allclose(
        embedder(iter(FACES[:2]), points=iter([None] * 2)), both[:2], atol=1e-5
    )
    for points in ([None] * 3, [None]):
        with pytest.raises(DataError, match="the numbers of faces and of sets of points differ"):
            embedder(iter(FACES[:2]), points=points)
    with pytest.raises(DataError, match="no faces"):
        embedder(iter([]))


def test_pil_images_are_taken_as_their_files_are(embedder, expected, tmp_path):
    images = pytest.importorskip("PIL.Image")
    picture = images.fromarray(FACES[0])
    close(embedder(picture), unit(expected(FACES[:1])))
    turned = images.fromarray(np.rot90(FACES[1]).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter to the right
    turned.save(tmp_path / "t.png", exif=exif)
    opened = images.open(tmp_path / "t.png")
    close(embedder([picture.convert("RGBA"), opened]), unit(expected(FACES[:2])))
    np.testing.assert_allclose(embedder(opened), embedder(tmp_path / "t.png"), atol=1e-6)
    with pytest.raises(DataError, match=r"mode I;16; expected 8 bits"):
        embedder(images.new("I;16", (112, 112)))
    with pytest.raises(DataError, match="a face is a int"):
        embedder([7])


def test_a_detector_aligns_what_comes_without_points(embedder, expected, tmp_path):
    """A photograph of two faces, the smaller one in the middle; aligned faces stay as they are."""
    photo = np.zeros((300, 400, 3), np.uint8)
    photo[90:202, 150:262] = FACES[1]
    large = cv2.resize(FACES[2], None, fx=1.25, fy=1.25)
    photo[5:145, 5:145] = large
    places = np.stack([TEMPLATE + np.array([150, 90]), 1.25 * TEMPLATE + 5])
    seen = []

    def detect(image):
        seen.append(image.shape)
        found = places if image.any() else places[:0]
        return detectors.Faces(found, np.ones(len(found)))

    made = {"detector": detect, "batch_size": 8}
    center = Embedder(embedder.model, choose="center", **made)
    close(center([photo, FACES[0]]), unit(expected(FACES[[1, 0]])))
    largest = Embedder(embedder.model, **made)  # auto: the image lies in no identity's folder
    assert largest(photo)[0] @ embedder(FACES[2])[0] > 0.98  # twice resampled
    assert seen == [photo.shape] * 2
    close(largest(photo, points=places[0]), unit(expected(FACES[[1]])))
    with pytest.raises(DataError, match="an array: no face"):
        largest(np.zeros_like(photo))
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), photo[..., ::-1])
    cv2.imwrite(str(tmp_path / "in" / "b.png"), np.zeros_like(photo))
    summary = center.embed_folder(tmp_path / "in", tmp_path / "out")
    assert summary.skipped == {"b.png": f"{tmp_path / 'in' / 'b.png'}: no face"}
    close(bulk.read(tmp_path / "out")[1], unit(expected(FACES[[1]])))
    with pytest.raises(DataError, match="choose was 'center' and is 'auto'"):
        largest.embed_folder(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match=r"no such ONNX file"):
        Embedder(embedder.model, detector="none.onnx")


def test_three_verdicts(embedder, expected):
    pairs = np.sum(unit(expected(FACES[:6])) * unit(expected(FACES[5:])), axis=1)
    low, high = np.sort(pairs)[[1, 3]]
    same, different = np.array([0.99] * 10 + [-0.9] * 10), np.array([True] * 10 + [False] * 10)
    vectors = np.stack([np.stack([np.ones(20), 0 * same], 1), np.stack([same, 1 - same**2], 1)], 1)
    made = calibration.calibrate(
        vectors.reshape(-1, 2),
        PairSet("made", np.zeros((40, 1, 1, 1), np.uint8), different),
        far=0.1,
        flip=False,
        model=embedder.model.digest(),
    )
    both = dataclasses.replace(made, threshold_cosine=float(high), threshold_check=float(low))
    verdict = embedder.verify(FACES[:6], FACES[5:], threshold=both)
    wanted = ["same" if x >= high else "check" if x >= low else "other" for x in verdict.score]
    assert verdict.verdict.tolist() == wanted
    assert {*wanted} == {"same", "check", "other"}
    assert (verdict.threshold, verdict.threshold_check) == (high, low)
    one = embedder.verify(FACES[:6], FACES[5:], threshold=float(high))
    assert {*one.verdict.tolist()} == {"same", "other"}


def test_any_model_by_its_path(workdir, tmp_path, expected, capsys):
    network = Network.from_workdir(workdir, devices=1, batch_size=1)
    torch.save(weights.to_state_dict(network.params, network.batch_stats), tmp_path / "b.bin")
    opened = Embedder(tmp_path / "b.bin", batch_size=2, devices=1)  # known by its content
    close(opened(FACES[:2]), unit(expected(FACES[:2])))
    assert "network r_tiny" in capsys.readouterr().err
    assert opened.model.digest() == network.digest()
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "none", "no model at"),
        (tmp_path / "empty", "it is empty"),
        (tmp_path, r"holds no model \(it has b\.bin, empty\)"),
    ):
        with pytest.raises(UserError, match=words):
            Embedder(path)
    choice = open_model.ModelChoice(workdir=tmp_path / "b.bin")
    with pytest.raises(UserError, match=r"b\.bin is a file of weights: name it with --weight"):
        open_model.open_model(choice)
    choice = open_model.ModelChoice(onnx=tmp_path / "b.bin")
    with pytest.raises(UserError, match="name it with --weight"):
        open_model.open_model(choice)


COLOR = OnnxOptions(color_order="BGR")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("workdir", {"network": "r_tiny"}, "--network r_tiny is for a file of weights, and "),
        ("workdir", {"onnx_options": COLOR}, "--color-order BGR is for weights or an ONNX file"),
        ("weight", {"step": 7}, "--step 7 is for the workdir of a run, and .* a file of weights"),
        ("weight", {"onnx_options": OnnxOptions(mean=0)}, "--mean 0 is for an ONNX file, and"),
        ("weight", {"onnx_options": OnnxOptions(scale=2.0)}, r"--scale 2\.0 is for an ONNX"),
        ("weight", {"onnx_options": OnnxOptions(output_name="y")}, "--output-name y is for an"),
        ("onnx", {"step": "best"}, "--step best is for the workdir of a run, and .* an ONNX file"),
        ("onnx", {"network": "r50"}, "--network r50 is for a file of weights, and .* leave it out"),
    ],
)
def test_options_of_other_kinds_of_models_are_refused(workdir, kind, options, words):
    path = workdir if kind == "workdir" else workdir / f"none.{kind}"
    with pytest.raises(UserError, match=words):
        open_model.open_model(ModelChoice(**{kind: path}, **options))
    several = {name: (value,) if name == "network" else value for name, value in options.items()}
    with pytest.raises(UserError, match=words):
        open_model.open_models(ModelChoices(**{kind: (path,)}, **several))


def test_each_of_several_models_gets_the_options_of_its_kind():
    run, weight, onnx = Path("run"), Path("b.pth"), Path("m.onnx")
    named = {"step": 7, "network": ("r50",), "onnx_options": COLOR}
    three = ModelChoices(workdir=(run,), weight=(weight,), onnx=(onnx,), **named)
    assert three.each() == [
        ModelChoice(workdir=run, step=7),
        ModelChoice(weight=weight, network="r50"),
        ModelChoice(onnx=onnx, onnx_options=COLOR),
    ]
    two = ModelChoices(workdir=(run,), weight=(weight,), **named)
    assert two.each()[1] == ModelChoice(weight=weight, network="r50", onnx_options=COLOR)


def test_weights_that_expect_bgr_are_turned(workdir, tmp_path):
    run = Network.from_workdir(workdir, devices=1, batch_size=1)
    torch.save(weights.to_state_dict(run.params, run.batch_stats), tmp_path / "b.pth")
    choice = ModelChoice(weight=tmp_path / "b.pth", onnx_options=COLOR)
    turned = open_model.open_network(choice)
    kernel = np.asarray(run.params["conv1.kernel"])  # (3, 3, 3, D): rows, columns, channels
    np.testing.assert_array_equal(turned.params["conv1.kernel"], kernel[:, :, ::-1])
    assert turned.digest() != run.digest()


def test_gray_images_are_not_embeddings(embedder):
    gray = FACES[0, :, :, 0]
    for call in (embedder.similarity, lambda a, b: embedder.verify(a, b, threshold=0.5)):
        with pytest.raises(DataError, match=r"a face is \(112, 112\) uint8"):
            call(gray, gray)


def test_the_weights_are_hashed_once(workdir, tmp_path, monkeypatch):
    calls = []

    def counted(*given) -> str:
        calls.append(given)
        return "digest"

    monkeypatch.setattr(network, "weights_digest", counted)
    fresh = Embedder(workdir, batch_size=1, devices=1)
    rows = np.eye(16, dtype=np.float32)
    made = fresh.build_gallery(tmp_path / "gallery", rows, [str(row) for row in range(16)])
    for row in range(2):
        assert fresh.search(made, rows[row : row + 1], k=1).name == [[str(row)]]
    assert len(calls) == 1


def test_similarity_and_verdict(embedder, expected):
    cosines = unit(expected(FACES[:3])) @ unit(expected(FACES[3:5])).T
    close(embedder.similarity(FACES[:3], FACES[3:5]), cosines)
    close(embedder.similarity(embedder(FACES[:3]), 7 * embedder(FACES[3:5])), cosines)
    pairs = np.diag(cosines)
    close(embedder.similarity(FACES[:2], FACES[3:5], between="pairs"), pairs)
    middle = float(pairs.mean())
    verdict = embedder.verify(FACES[:2], FACES[3:5], threshold=middle)
    np.testing.assert_array_equal(verdict.same, pairs >= middle)
    assert verdict.same.sum() == 1
    assert verdict.threshold == middle
    close(verdict.score, pairs)
    with pytest.raises(DataError, match="got 3 and 2 faces"):
        embedder.verify(FACES[:3], FACES[3:5], threshold=0.5)
    with pytest.raises(UserError, match=r"threshold 1\.45 is no cosine"):
        embedder.verify(FACES[:2], FACES[3:5], threshold=1.45)


def test_embeddings_that_are_not_finite_are_an_error():
    class Broken:
        input = ModelInput(embedding_size=4, digest="")

        def __call__(self, images):
            return np.full((len(images), 4), np.nan, np.float32)

        def digest(self):
            return self.input.digest

    with pytest.raises(DataError, match="not finite"):
        Embedder(Broken())(FACES[0])


def test_the_digest_names_the_weights_whatever_file_they_are_in(workdir, tmp_path):
    network = Network.from_workdir(workdir, devices=1, batch_size=1)
    torch.save(weights.to_state_dict(network.params, network.batch_stats), tmp_path / "b.pth")
    found = weights.load(tmp_path / "b.pth", "r_tiny")
    from_torch = Network("r_tiny", found.params, found.batch_stats, devices=8, batch_size=8)
    assert from_torch.digest() == network.digest()
    params, batch_stats = found.params, found.batch_stats
    params["fc.bias"] = np.nextafter(params["fc.bias"], np.float32(1))
    other = Network("r_tiny", params, batch_stats, devices=1, batch_size=1)
    assert other.digest() != network.digest()


def test_swapped_colors_are_reported_once(embedder):
    faces = [f for i in range(24) if _is_warm(f := draw_face(seed=6, identity=i, index=0))]
    faces = np.stack(faces[:8])
    fresh = Embedder(embedder.model, batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh(faces)
    with pytest.warns(UserWarning, match="BGR") as caught:
        fresh(faces[..., ::-1])
        fresh(faces[..., ::-1])
    assert len(caught) == 1


def _is_warm(face: np.ndarray) -> bool:
    red, _, blue = face[40:90, 36:76].reshape(-1, 3).mean(0)
    return red > 1.3 * blue


def test_a_calibration_of_other_weights_is_refused(embedder, tmp_path):
    with pytest.raises(DataError, match="no calibration at"):
        embedder.verify(FACES[0], FACES[1], threshold=tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"threshold_cosine": 0.5}')
    with pytest.raises(DataError, match="is not a calibration"):
        embedder.verify(FACES[0], FACES[1], threshold=tmp_path / "c.json")


def test_the_package_is_imported_without_jax():
    code = "import arcface_jax, sys; assert 'jax' not in sys.modules; print(arcface_jax.Embedder)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "arcface_jax.inference.embedder.Embedder" in done.stdout
    with pytest.raises(AttributeError, match="Embeder"):
        _ = arcface_jax.Embeder  # pyright: ignore[reportAttributeAccessIssue] (the point)


def test_bulk_settings_that_do_not_fit_are_refused(embedder, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        embedder.embed_folder(tmp_path / "in", tmp_path / "out")
    cv2.imwrite(str(tmp_path / "in" / "a.png"), FACES[0])
    with pytest.raises(UserError, match="shard_size must be at least 1, got 0"):
        embedder.embed_folder(tmp_path / "in", tmp_path / "out", shard_size=0)
