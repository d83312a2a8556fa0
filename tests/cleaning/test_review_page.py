"""The page to review findings on: what is on it, and what a browser makes of it."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import browser
import cv2
import numpy as np
import pattern_faces
import pytest
from commands import result, script

from arcface_jax.cleaning import files, pipeline
from arcface_jax.cleaning.embedding import Embedded
from arcface_jax.config import DataConfig
from arcface_jax.data.names import Names
from arcface_jax.data.opening import open_source
from arcface_jax.evaluation.embeddings import normalize

SHOTS = 6
TAG = "</script><script>window.broken = 1</script>"
QUOTED = 'two "lines",\n<b>&amp;'
REVIEWED = ("duplicates.csv", "mixed.csv", "images.csv")


class _Model:
    def digest(self) -> str:
        return "squares"


def people() -> list[tuple[int, int, str]]:
    """Persons 1 and 2 under three and two labels, 5 and 6 under one, three wrong labels."""
    listed = []
    for number in range(20):
        for shot in range(SHOTS):
            label = f"person{number:02d}"
            if number == 1:
                label = ("tag", "quoted", "plain")[shot // 2]
            if number == 2 and shot >= 3:
                label = "other"
            if number == 6:
                label = "person05"
            if number in (9, 10, 11) and shot == 2:
                label = f"person{number + 3}"
            listed.append((number, shot, label))
    return listed


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    return pattern_faces.write_list(tmp_path_factory.mktemp("set") / "faces", people())


@pytest.fixture
def cleaned(faces, tmp_path) -> Path:
    source = open_source(DataConfig(path=str(faces)), seed=0)
    hostile = {"tag": TAG, "quoted": QUOTED}  # not every form of a set can hold these
    source.names = Names(hostile.get(name, name) for name in source.names or ())
    images = np.stack([source[number][0] for number in range(len(source))])
    squares = images.reshape(len(images), 7, 16, 7, 16, 3).mean((2, 4)) - 127.5
    embedded = Embedded(normalize(squares.reshape(len(images), -1).astype(np.float32)), {})
    found = embedded.identities(source.labels(), source.num_classes)
    output = tmp_path / "clean"
    pipeline.write(pipeline.find(found), source, found, _Model(), output, level="images")
    return output


def lines(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


class _Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1] == "option" and tag != "option":  # may be left open
            self.open.pop()
        assert self.open.pop() == tag


def test_the_page_holds_every_finding_with_its_pictures(cleaned: Path):
    text = (cleaned / "report.html").read_text()
    tags = _Tags(text)
    assert tags.open == [] and tags.scripts == 2 and tags.links == []
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert found is not None
    data = json.loads(found[1])
    assert list(data["tables"]) == list(REVIEWED)
    for name, table in data["tables"].items():
        assert [table["columns"], *table["rows"]] == lines(cleaned / name)
        assert tuple(table["columns"]) == files.COLUMNS[name]
        assert len(table["pictures"]) == len(table["rows"]) > 0
    assert {TAG, QUOTED} <= set(data["names"].values())
    # Both identities of a pair, both halves, and an image with both of its identities.
    numbers = {n for t in data["tables"].values() for strips in t["pictures"] for n in strips}
    assert numbers == set(range(len(data["strips"])))
    wrong = data["tables"]["images.csv"]["pictures"][0]
    assert [data["strips"][n] for n in wrong] == [1, 5, 5]
    written = {path.name for path in (cleaned / "report").iterdir()}
    assert written == {f"{n}.jpg" for n in numbers}
    for number, faces in enumerate(data["strips"]):
        picture = cv2.imread(str(cleaned / "report" / f"{number}.jpg"))
        assert picture is not None and picture.shape == (96, 96 * faces, 3)


@pytest.mark.slow
@pytest.mark.skipif(browser.program() is None, reason="needs Chromium (apt-get install chromium)")
def test_decisions_made_in_a_browser_are_saved_and_applied(
    cleaned: Path, faces: Path, tmp_path: Path, capsys
):
    page = cleaned / "report.html"
    tab = browser.Browser(tmp_path / "browser")
    try:
        expected = _decide(tab, page, {name: lines(cleaned / name) for name in REVIEWED})
        for name in REVIEWED:
            tab.click(f"#files button:nth-child({REVIEWED.index(name) + 1})")
            saved = tab.downloaded(name)
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(expected[name])
            assert saved.read_bytes() == text.getvalue().encode()
            (cleaned / name).write_bytes(saved.read_bytes())
    finally:
        tab.close()
    words = ["apply", faces, cleaned, tmp_path / "new", "--merge", "--drop", "--relabel"]
    assert script("data").main([str(word) for word in words]) == 0
    values = result(capsys.readouterr().out)
    merged = sum(row[-1] == "merge" for row in expected["duplicates.csv"])
    assert values["relabeled"] == 1 and 1 <= values["merged"] <= merged
    assert values["dropped"] == 1 + 2 * SHOTS  # an image, and a mixed identity


@pytest.mark.slow
@pytest.mark.skipif(browser.program() is None, reason="needs Chromium (apt-get install chromium)")
def test_the_page_works_on_a_phone_and_without_storage(cleaned: Path, tmp_path: Path):
    tab = browser.Browser(tmp_path / "browser")
    forbidden = "Object.defineProperty(window, 'localStorage', {get() { throw new Error(); }})"
    try:
        tab.send("Page.addScriptToEvaluateOnNewDocument", source=forbidden)
        tab.shape(390, 844, dark=True)
        tab.open(cleaned / "report.html")
        tab.click(".finding [data-decision=review]")
        assert "1 changed here" in tab.evaluate("document.getElementById('status').textContent")
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("document.getElementById('filters').open") is False
        # The list holds a page of findings, however many there are.
        _choose(tab, "size", "10")
        assert tab.evaluate("document.querySelectorAll('.finding').length") == 10
        tab.click("#next-too")
        assert tab.evaluate("document.activeElement.textContent.includes('11 of ')")
        tab.evaluate("Promise.all([...document.images].slice(0, 2).map((one) => one.decode()))")
    finally:
        tab.close()


def _decide(tab: browser.Browser, page: Path, rows: dict[str, list[list[str]]]) -> dict:
    """Makes five decisions and reloads the page; returns the rows that the files should have."""
    tab.shape(1280, 900)
    tab.open(page)
    count = sum(len(table) - 1 for table in rows.values())
    assert tab.evaluate("document.querySelectorAll('.finding').length") == min(25, count)
    assert tab.evaluate("window.broken") is None  # a name is no markup
    assert TAG in tab.evaluate("document.getElementById('list').textContent")
    _choose(tab, "kind", "duplicates.csv")
    tab.press("k")  # the first; then the second is the current one
    tab.press("k")
    tab.press("z")
    tab.press("ArrowDown")
    tab.click(".finding.current [data-decision=drop]")
    tab.press("z")
    _choose(tab, "kind", "mixed.csv")
    tab.click(".finding [data-decision=drop]")
    _choose(tab, "kind", "images.csv")
    tab.press("r")
    tab.press("ArrowDown")
    tab.press("ArrowUp")
    tab.press("d")
    _choose(tab, "kind", "duplicates.csv")
    tab.click(".finding:nth-last-child(1) [data-decision=keep]")
    assert "5 changed here" in tab.evaluate("document.getElementById('status').textContent")
    tab.open(page)
    assert "5 changed here" in tab.evaluate("document.getElementById('status').textContent")
    shown = tab.evaluate("[...document.querySelectorAll('.finding')].length")
    _choose(tab, "text", 'two \\"lines')
    assert 0 < tab.evaluate("document.querySelectorAll('.finding').length") < shown
    decided = {name: [list(row) for row in table] for name, table in rows.items()}
    first = _shown_order(rows["duplicates.csv"])
    decided["duplicates.csv"][first[0]][-1] = "keep"
    decided["duplicates.csv"][first[-1]][-1] = "keep"
    decided["mixed.csv"][1][-1] = "drop"
    decided["images.csv"][1][-1] = "relabel"
    decided["images.csv"][2][-1] = "drop"
    return decided


def _shown_order(rows: list[list[str]]) -> list[int]:
    """Line numbers as the page shows them: the pairs of a group follow its first one."""
    group = files.COLUMNS["duplicates.csv"].index("group")
    first: dict[str, int] = {}
    for number, row in enumerate(rows[1:], start=1):
        first.setdefault(row[group] or f"line {number}", number)
    numbers = range(1, len(rows))
    return sorted(numbers, key=lambda n: first[rows[n][group] or f"line {n}"])


def _choose(tab: browser.Browser, field: str, value: str) -> None:
    tab.evaluate(
        f"(() => {{ const field = document.getElementById('{field}'); field.value = \"{value}\";"
        "field.dispatchEvent(new Event('input')); })()"
    )
