"""Lists of images in the forms that people have: encodings, separators, columns, headers."""

import codecs
from pathlib import Path

import pytest

from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.errors import ConfigError, DataError

FILES = [f"img/{person}/{number}.jpg" for person in ("Zoë K", "adam") for number in range(3)]
NAMES = ["Zoë K"] * 3 + ["adam"] * 3
NUMBERS = [1] * 3 + [0] * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files, of which a list needs only the names."""
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    return tmp_path


def opened(folder: Path, content: str | bytes, *, name: str = "a.csv", columns: str = ""):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    return open_source(DataConfig(path=str(folder / name), columns=columns), seed=0)


def check(source, folder: Path, *, named: bool) -> None:
    """Three images of each of two people."""
    assert [source.where(i) for i in range(len(source))] == [str(folder / file) for file in FILES]
    labels = source.labels().tolist()
    assert source.num_classes == 2 and sorted(labels) == [0, 0, 0, 1, 1, 1]
    assert labels[:3] == labels[:1] * 3
    if named:
        assert [source.names[label] for label in labels] == NAMES
    else:
        assert source.names is None and labels == NUMBERS


def rows(separator: str, *, labels=NAMES, header: str = "") -> str:
    lines = [f"{file}{separator}{label}" for file, label in zip(FILES, labels, strict=True)]
    return "\n".join([*([header] if header else []), *lines]) + "\n"


TEXT = rows(",", header="path,label")
ENCODED = {
    "UTF-8": TEXT.encode(),
    "UTF-8 with a byte order mark": codecs.BOM_UTF8 + TEXT.encode(),
    "UTF-16, little end first": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "UTF-16 without a mark": TEXT.encode("utf-16-le"),
    "Latin-1": TEXT.encode("latin-1"),
    "Windows' line ends": TEXT.replace("\n", "\r\n").encode(),
    "old Mac's line ends": TEXT.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_encodings(folder: Path, encoding: str):
    check(opened(folder, ENCODED[encoding]), folder, named=True)


WRITTEN = {
    "commas": rows(","),
    "commas and blanks": rows(", "),
    "semicolons": rows(";", header="path;label"),
    "tabs": rows("\t"),
    "blanks, label last": rows(" ", labels=NUMBERS),
    "blanks, label first": "\n".join(f"{n}  {f}" for f, n in zip(FILES, NUMBERS, strict=True)),
    "label first": "\n".join(f"{n},{f}" for f, n in zip(FILES, NAMES, strict=True)),
    "backslashes": rows(",").replace("/", "\\"),
    "double quotes": "\n".join(f'"{f}","{n}"' for f, n in zip(FILES, NAMES, strict=True)),
    "single quotes": "\n".join(f"'{f}','{n}'" for f, n in zip(FILES, NAMES, strict=True)),
    "./ before paths": "\n".join(f"./{f},{n}" for f, n in zip(FILES, NAMES, strict=True)),
    "comments and blank lines": "# made by hand\n\n" + rows(",").replace("\n", "\n\n") + "# end\n",
    "separators at the ends": rows(",").replace("\n", ",,\n"),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_separators_and_writing(folder: Path, form: str):
    source = opened(folder, WRITTEN[form])
    check(source, folder, named="blanks, label" not in form)
    comments = {"comment lines": 2} if "comments" in form else {}
    assert source.ignored == comments


def table(header: str, cells) -> str:
    lines = [cells(i, file, NAMES[i]) for i, file in enumerate(FILES)]
    return "\n".join([*([header] if header else []), *lines]) + "\n"


COLUMNS = {
    "another header": table("img_path,class_id", lambda i, f, n: f"{f},{n}"),
    "a header of other words": table("Bild,Mensch", lambda i, f, n: f"{f},{n}"),
    "a running number called id": table("filename,id,person_name", lambda i, f, n: f"{f},{i},{n}"),
    "an index before them": table(",path,label", lambda i, f, n: f"{i},{f},{n}"),
    "the same identity twice": table("id,name,file", lambda i, f, n: f"{i // 3},{n},{f}"),
    "a constant beside": table("file,person,split", lambda i, f, n: f"{f},{n},train"),
    "insightface's": table("", lambda i, f, n: f"1\t{f}\t{n}"),
    "insightface's with points": table("", lambda i, f, n: f"1\t{f}\t{n}\t0.5\t{i}"),
    "im2rec's": table("", lambda i, f, n: f"{i}\t{1 - i // 3}.000000\t{f}"),
    "no header, a score beside": table("", lambda i, f, n: f"{f},{n},0.{i}"),
}


@pytest.mark.parametrize("form", COLUMNS)
def test_columns_are_found_by_content(folder: Path, form: str):
    numbers = form in ("im2rec's", "the same identity twice")
    source = opened(folder, COLUMNS[form], name="a.lst")
    if form == "the same identity twice":
        assert source.names is None and source.labels().tolist() == [0, 0, 0, 1, 1, 1]
    else:
        check(source, folder, named=not numbers)


@pytest.mark.parametrize("columns", ["path=file,label=who", "label=3", "path=2,label=WHO"])
def test_columns_are_asked_for(folder: Path, columns: str):
    text = table("session,file,who", lambda i, f, n: f"{i % 2},{f},{n}")
    with pytest.raises(DataError, match=r"which column is the identity \(session or who\)"):
        opened(folder, text)
    check(opened(folder, text, columns=columns), folder, named=True)


def test_columns_that_are_not_there_are_named(folder: Path):
    with pytest.raises(DataError, match=r"no column 'who' for label: it has path, label"):
        opened(folder, rows(",", header="path,label"), columns="label=who")
    for wrong in ("who", "path=", "image=a", "path=a,path=b"):
        with pytest.raises(ConfigError, match="path=COLUMN,label=COLUMN"):
            DataConfig(path="x", columns=wrong)


def test_one_label_for_each_image_is_noted(folder: Path):
    lines = "".join(f"{i}.jpg,person{i}\n" for i in range(30))
    assert any("label of its own" in note for note in opened(folder, lines).notes)


def test_a_first_image_that_is_missing_is_no_header(folder: Path):
    source = opened(folder, "gone.jpg,adam\n" + rows(","))
    assert len(source) == 7 and source.where(0).endswith("gone.jpg")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (rows(",").replace("2.jpg,adam", "2.jpg,"), "a.csv, line 6: has no label"),
        (rows(",").replace(FILES[4], ""), "a.csv, line 5: has no path"),
        ("path,label\n", "has a header and no image|is neither"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(99), "a.csv is not text"),
        (rows(",").replace(FILES[1], f'"{FILES[1]}'), "line 2: a quote is not closed"),
        ("# only\n# comments\n", "a.csv is empty"),
        (f"path,label\n,adam\n{rows(',')}", "a.csv, line 2: has no path"),
        (
            "filename,id,person_name\n"
            + "".join(f"{file},{i // 3},p{i // 3}\n" for i, file in enumerate(FILES))
            + "last.jpg,1\n",
            "a.csv, line 8: 2 columns, but the first line has 3",
        ),
        (
            "filename,id\n"
            + "".join(f"{file},{i // 3},p{i % 2}\n" for i, file in enumerate(FILES)),
            r"which column is the identity \(id or 3\)",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(folder: Path, text, message: str):
    with pytest.raises(DataError, match=message):
        opened(folder, text)
