"""Pages of training sets: what is planted stands on them, and nothing is fetched from elsewhere."""

import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

from witness import encode, face

from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.tools import inspection
from arcface_jax.evaluation.report import sets

MADE = datetime(2026, 1, 2, 3, 4)


class _Page(HTMLParser):
    """The headings, the texts of images, and everything that the page points to."""

    def __init__(self, text: str):
        super().__init__()
        self.alts: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in ("img", "meta", "path", "br"):
            self.open.append(tag)
        self.alts += [values["alt"] or ""] if "alt" in values else []
        self.links += [values[key] or "" for key in ("src", "href") if key in values]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path",):
            assert self.open.pop() == tag


def planted(folder: Path) -> None:
    """Of three people the first has a copy, the second an image of the third and a damaged one."""
    images = {
        "ada/1.png": encode(face(1)),
        "ada/2.png": encode(face(1)),
        "<b>/3.png": encode(face(2)),
        "<b>/4.png": b"damaged",
        "carl/5.png": encode(face(2)),
    }
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_the_page_of_a_set_shows_samples_copies_and_damage(tmp_path: Path):
    planted(tmp_path / "set")
    source = open_source(DataConfig(path=str(tmp_path / "set")), seed=0)
    report = inspection.inspect(source)
    path = sets.inspected(tmp_path / "out", report, source, name="mine", made=MADE)
    text = path.read_text()
    page = _Page(text)
    assert page.open == [] and all(link.startswith("data:image/jpeg") for link in page.links)
    for part in (
        "Training set mine",
        "3 identities, 5 images: 1 to 2 of each, median 2",
        "5 files: 4 images used of 3 identities, 0 ignored, 1 unreadable",
        "&lt;b&gt;",
        "<code>arcface-jax data split --min-images</code>",
        "4.png: 7 bytes that are not an image",
    ):
        assert part in text, part
    # Samples of all four readable images, one group of copies, one of two identities.
    assert len(page.alts) == 4 + 2 + 2
    copies = text[text.index('id="copies"') :]
    assert re.findall(r"(\d)\.png</span>", copies) == ["1", "2"]
    conflicts = text[text.index('id="conflicts"') : text.index('id="copies"')]
    assert re.findall(r"<span>(.*?)<br>(\d)\.png</span>", conflicts) == [
        ("&lt;b&gt;", "3"),
        ("carl", "5"),
    ]


def test_the_page_of_aligned_faces_shows_measures_and_rejects(tmp_path: Path):
    planted(tmp_path)
    rows = [
        {"face": f"ada/{1 + n % 2}.png", "blur": str(n / 8), "x": str(n), "choice": "center"}
        for n in range(4)
    ]
    (tmp_path / "photographs").mkdir()
    rejected = {"ada/4.jpg": "no face", "carl/<i>.jpg": "the eyes are 3.5 pixels apart"}
    folder = tmp_path / "photographs"
    path = sets.aligned(tmp_path, folder, rows, rejected, made=MADE)
    text = path.read_text()
    page = _Page(text)
    assert page.open == [] and all(link.startswith("data:image/jpeg") for link in page.links)
    assert "4 faces of 1 identities, 2 photographs rejected" in text
    # One measure: neither a place nor a word is one. The most blurred come first.
    assert re.findall(r"<h3>(.+?)</h3>", text) == ["Samples", "blur, highest"]
    assert re.findall(r"<span>([\d.]+)</span>", text) == ["0.375", "0.25", "0.125", "0"]
    assert "the eyes are N pixels apart" in text and "carl/&lt;i&gt;.jpg" in text


def test_a_folder_in_which_no_face_was_found_has_a_page(tmp_path: Path):
    path = sets.aligned(tmp_path, tmp_path, [], {"a.jpg": "no face"}, made=MADE)
    assert "0 faces, 1 photographs rejected" in path.read_text()
    assert "<svg" not in path.read_text()
