"""The page: that it stands alone, what it says, and that its charts lie where the numbers do."""

import base64
import re
from datetime import datetime
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from arcface_jax.data.pairs.bins import PairSet
from arcface_jax.errors import UserError
from arcface_jax.evaluation import roc
from arcface_jax.evaluation.report import charts, document, roc_plot
from arcface_jax.evaluation.report.document import Evaluated
from arcface_jax.evaluation.verification import verify


def evaluated(model: str, *, name: str = "made <set>", pairs: int = 400, noise: float = 0.8):
    rng = np.random.default_rng(0)
    same = np.arange(pairs) % 2 == 0
    person = np.repeat(rng.normal(size=(pairs, 8)), 2, axis=0)
    person[1::2][~same] = rng.normal(size=(pairs // 2, 8))
    given = (person + noise * rng.normal(size=person.shape)).astype(np.float32)
    images = rng.integers(0, 256, (2 * pairs, 2, 2, 3), np.uint8).repeat(56, 1).repeat(56, 2)
    one = PairSet(name, images, same)
    return Evaluated(model, one, verify(lambda _: given, one))


class Page(HTMLParser):
    """Its elements, each with its attributes, and its text."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def rows():
    return [evaluated("a & b"), evaluated("other", noise=2.0)]


@pytest.fixture(scope="module")
def page(rows, tmp_path_factory) -> tuple[str, Page]:
    path = document.write(
        tmp_path_factory.mktemp("r") / "new", rows, made=datetime(2020, 1, 2, 3, 4)
    )
    assert path.name == "index.html"
    text = path.read_text()
    return text, Page(text)


def test_the_page_is_well_formed_and_asks_for_nothing_from_outside(page):
    text, parsed = page
    assert parsed.open == []
    assert not re.search(r"https?://|<script|<link|@import|url\(|src=\"(?!data:)", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_every_picture_says_what_it_shows(page):
    _, parsed = page
    images, drawings = parsed.all("img"), parsed.all("svg")
    assert len(images) == 2 * 2 * 6 and len(drawings) == 1 + 2 * 2
    assert all(len(image["alt"]) > 20 for image in images)
    assert all(d["role"] == "img" and len(d["aria-label"]) > 20 for d in drawings)


def test_numbers_and_names_stand_on_the_page(rows, page):
    text, parsed = page
    assert "made &lt;set&gt;" in text and "a &amp; b" in text and "<set>" not in text
    assert "200 pairs of one person, 200 of two people" in parsed.text
    for one in rows:
        result = one.result
        for value in (
            f"{result.accuracy:.4f} ± {result.accuracy_std:.4f}",
            f"{result.auc:.5f}",
            f"{result.tars[0].threshold:.4f}",
            f"{2 - 2 * result.tars[1].threshold:.4f}",
            f"{result.threshold:.4f}",
            "needs 1,000 pairs of two people",
        ):
            assert value in parsed.text, value


def test_the_hardest_pairs_are_shown_and_marked_where_they_are_wrong(rows, page):
    text, parsed = page
    one = rows[0]
    cosine = 1 - one.result.distance / 2
    hardest = np.flatnonzero(one.result.same)[np.argsort(cosine[one.result.same])[:6]]
    confused = np.flatnonzero(~one.result.same)[np.argsort(-cosine[~one.result.same])[:6]]
    for image, pair in zip(parsed.all("img")[:12], [*hardest, *confused], strict=True):
        kind = "one person" if one.result.same[pair] else "two people"
        assert image["alt"] == f"Pair {pair} of made <set>, {kind}, cosine {cosine[pair]:.3f}"
        data = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))
        shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        faces = np.hstack(one.pairs.images[2 * pair : 2 * pair + 2])
        assert np.abs(shown.astype(float) - faces).mean() < 12  # JPEG
    threshold = 1 - one.result.threshold / 2
    wrong = np.sum(cosine[hardest] <= threshold) + np.sum(cosine[confused] > threshold)
    assert text.split("<h3>")[1].count("<b>wrong</b>") == wrong > 0


def test_a_set_with_few_pairs_and_a_model_that_is_always_right_have_a_page_too(tmp_path):
    rng = np.random.default_rng(0)
    same = np.arange(12) % 2 == 0
    images = np.zeros((24, 112, 112, 3), np.uint8)
    person = np.repeat(rng.normal(size=(12, 4)), 2, axis=0).astype(np.float32)
    person[1::2][~same] *= -1
    pairs = PairSet("tiny", images, same)
    perfect = Evaluated("m", pairs, verify(lambda _: person, pairs))
    constant = Evaluated("c", pairs, verify(lambda _: np.ones_like(person), pairs))
    text = document.write(tmp_path, [perfect, constant], made=datetime.now()).read_text()
    assert Page(text).open == [] and "nan" not in Page(text).text.lower()


def test_one_different_pair_is_enough_for_a_page(tmp_path):
    rng = np.random.default_rng(0)
    same = np.arange(12) > 0
    pairs = PairSet("one", np.zeros((24, 112, 112, 3), np.uint8), same)
    result = verify(lambda _: rng.normal(size=(24, 4)).astype(np.float32), pairs)
    text = document.write(tmp_path, [Evaluated("m", pairs, result)], made=datetime.now())
    assert Page(text.read_text()).open == [] and "NaN" not in text.read_text()
    curve = roc.roc(-result.distance, same)
    figure = roc_plot.draw({"m": curve}, title="one", path=tmp_path / "roc.png")
    assert figure.axes[0].get_xlim() == (0.1, 1) and (tmp_path / "roc.png").stat().st_size


def test_a_folder_that_cannot_be_written_is_named(tmp_path, rows):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        document.write(tmp_path / "file", rows, made=datetime.now())


def numbers(path: str) -> np.ndarray:
    """(k, 2) the corners of an SVG path."""
    return np.array(re.findall(r"([\d.]+) ([\d.]+)", path), float)


def test_thinned_curves_are_tar_at_far():
    rng = np.random.default_rng(0)
    same = np.arange(30_000) % 3 == 0
    score = np.round(np.where(same, 0.5, 0.0) + rng.normal(0, 0.3, len(same)), 3)
    curve = charts.thin(roc.roc(score, same))
    assert len(curve.far) <= 200 and curve.far[0] >= 1 / 20_000 and curve.far[-1] == 1
    assert np.all(np.diff(curve.far) > 0)
    for far, tar, low, high in list(zip(*curve, strict=True))[1:-1]:
        (found,) = roc.tar_at_far(score, same, fars=[far * (1 + 1e-12)])
        assert (found.tar, found.interval) == (tar, (low, high))


def test_the_roc_is_drawn_to_scale():
    far, tar = np.array([1e-2, 1e-1, 1.0]), np.array([0.5, 0.75, 1.0])
    chart = charts.roc_chart([charts.Curve(far, tar, tar, tar)], alt="a curve")
    line = numbers(re.search(r'class="line-0" d="([^"]*)"', chart)[1])
    x, y = np.unique(line[:, 0]), np.unique(line[:, 1])
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # decades
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.2)
    assert len(line) == 5  # steps, not slopes: TAR holds until FAR rises
    assert line[1, 1] == line[0, 1] and line[1, 0] == line[2, 0]


def test_a_histograms_area_is_its_count():
    values = np.concatenate([np.full(30, 1.0), np.full(70, 2.0)])
    chart = charts.histogram([charts.Series(values, 0)], x_label="x", alt="two values")
    outline = numbers(re.search(r'class="area-0 line-0" d="([^"]*)"', chart)[1])
    heights = outline[:, 1].max() - outline[:, 1]
    assert heights[1] / heights.max() == pytest.approx(3 / 7, abs=0.01)
