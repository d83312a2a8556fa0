"""Lists and folders that `data pack` writes: read back as the set they were written from."""

from pathlib import Path

import pytest
from witness import encode, smooth

from arcface_jax.cleaning import apply, files
from arcface_jax.config import DataConfig
from arcface_jax.data import fingerprint, label_map, names
from arcface_jax.data.opening import open_source
from arcface_jax.data.source import Source
from arcface_jax.data.tools import list_writing, packing, splitting
from arcface_jax.errors import DataError, UserError
from arcface_jax.runtime.files import PART

PNGS = [encode(smooth(i), "PNG") for i in range(6)]
PACKED = ["0000000", "0000001", "0000002"]


def opened(path: Path) -> Source:
    return open_source(DataConfig(path=str(path)), seed=0)


def folders(place: Path, people: list[str], *, first: int = 0) -> Path:
    """Two images of each of some people."""
    for number, person in enumerate(people):
        (place / person).mkdir(parents=True)
        for i in (0, 1):
            (place / person / f"{i}.png").write_bytes(PNGS[(first + 2 * number + i) % 6])
    return place


def content(source: Source) -> list[tuple[bytes, int, str]]:
    samples = [source.read(i) for i in range(len(source))]
    return [(x.data, x.label, names.name_of(source.names, x.label)) for x in samples]


SETS = {
    "names in another order": (PACKED, ["zoe", "adam", "eve"]),
    "one name for two": (PACKED, ["zoe", "adam", "zoe"]),
    "numbers": (["1", "2", "10"], None),
    "a comment": (["#1", "'a'", " b"], None),
    "separators": (["a,b", "c;d\te", 'f"g'], None),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_list_has_the_labels_and_names_of_its_set(tmp_path: Path, kind: str):
    people, table = SETS[kind]
    folders(tmp_path / "in", people)
    if table:
        names.write(tmp_path / "in", table)
    source = opened(tmp_path / "in")
    done = list_writing.write(source, packing.select(source), tmp_path / "in" / "all.csv")
    assert done.files[1].name == "all.csv.identities.txt"
    listed = opened(tmp_path / "in" / "all.csv")
    assert content(listed) == content(source) and len(listed) == 6
    assert listed.num_classes == source.num_classes == 3


def test_a_list_of_sparse_labels_keeps_them(tmp_path: Path):
    source = opened(folders(tmp_path / "in", ["a", "b"]))
    names_of_all = [f"p{label}" for label in range(50)]
    source.names, source.num_classes = names.Names(names_of_all), 50
    source.labels()[2:] = 49
    list_writing.write(source, packing.select(source), tmp_path / "all.csv")
    listed = opened(tmp_path / "all.csv")
    assert listed.labels().tolist() == [0, 0, 49, 49] and listed.num_classes == 50
    assert listed.names is not None and list(listed.names) == names_of_all


def test_a_list_without_its_own_table_is_read_by_its_labels(tmp_path: Path):
    folders(tmp_path, ["a", "b"])
    names.write(tmp_path, ["x", "y", "z"])  # the table of another set there
    (tmp_path / "old.csv").write_text("path,label\na/0.png,0\nb/0.png,1\nb/1.png,1\n")
    numbered = opened(tmp_path / "old.csv")
    assert (numbered.num_classes, numbered.names) == (2, None)
    (tmp_path / "named.csv").write_text("path,label\na/0.png,zoe\nb/0.png,ada\nb/1.png,ada\n")
    named = opened(tmp_path / "named.csv")
    assert named.labels().tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", "a\udcff", "c "])
def test_a_name_that_a_list_cannot_hold_is_refused(tmp_path: Path, name: str):
    source = opened(folders(tmp_path / "in", ["a", "b"]))
    last = tmp_path / "in" / "b" / name
    last.write_bytes(PNGS[0])
    source = opened(tmp_path / "in")
    with pytest.raises(DataError, match=r"which a list cannot hold: rename it") as error:
        list_writing.write(source, packing.select(source), tmp_path / "out" / "all.csv")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_cleaned_list_has_the_labels_of_its_label_map(tmp_path: Path):
    folders(tmp_path / "in", PACKED)
    names.write(tmp_path / "in", ["zoe", "adam", "eve"])
    source = opened(tmp_path / "in")
    about = {"data": fingerprint.of_source(source), "rank_one": 1.0, "weak": False, "model": "x"}
    (tmp_path / "clean").mkdir()
    files.write_about(tmp_path / "clean", about, files=[])
    header = ",".join(files.COLUMNS[files.MIXED])
    (tmp_path / "clean" / "mixed.csv").write_text(f"{header}\n1,1,1,.1,.1,.1,drop\n")
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "new.csv"
    apply.apply(source, tmp_path / "clean", target, actions=apply.Actions(drop=True))
    mapped = label_map.read(tmp_path / "out")
    assert mapped is not None and mapped.tolist() == [0, -1, 1]
    old = {data: mapped[label] for data, label, _ in content(source)}
    assert all(old[data] == label for data, label, _ in content(opened(target)))
    other, actions = tmp_path / "out" / "other.csv", apply.Actions(drop=True)
    with pytest.raises(UserError, match=r"has the label_map\.csv of another set"):
        apply.apply(source, tmp_path / "clean", other, actions=actions)
    assert not other.exists()


def write_folder(source: Source, folder: Path, **options) -> packing.Packed:
    return splitting.write_folder(source, packing.select(source, **options), folder, threads=1)


def test_a_folder_is_of_one_set(tmp_path: Path):
    first = opened(folders(tmp_path / "a", ["a", "b"]))
    other = opened(folders(tmp_path / "b", ["x", "y"], first=2))
    write_folder(first, tmp_path / "out")
    for source in (first, other):
        with pytest.raises(UserError, match=r"out is not empty \(it has .*name another folder"):
            write_folder(source, tmp_path / "out")
    expected = [x[:2] for x in content(first)]
    assert [x[:2] for x in content(opened(tmp_path / "out"))] == expected


def test_an_interrupted_folder_is_resumed_by_the_same_job_only(tmp_path: Path, monkeypatch):
    source = opened(folders(tmp_path / "a", ["a", "b", "c"]))
    checked, read = packing.checked, []

    def interrupted(source: Source, number: int):
        read.append(number)
        if len(read) == 5:
            raise OSError("the disk is full")
        return checked(source, number)

    monkeypatch.setattr(packing, "checked", interrupted)
    with pytest.raises(OSError, match="disk is full"):
        write_folder(source, tmp_path / "out")
    partial = tmp_path / "out" / "0000000" / f"000000000.png.host-1{PART}"
    partial.write_bytes(PNGS[0])  # a killed call leaves its images without their final name
    other = opened(folders(tmp_path / "b", ["x", "y"]))
    with pytest.raises(UserError, match="holds an unfinished job of other images or options"):
        write_folder(other, tmp_path / "out")
    kept = len(list(tmp_path.glob("out/*/*.png")))
    read[:] = [-1] * 5
    done = write_folder(source, tmp_path / "out")
    assert (done.images, len(read)) == (6, 5 + 6 - kept) and kept >= 4
    assert content(opened(tmp_path / "out")) == content(source)
    assert not partial.exists() and not (tmp_path / "out" / "packing.json").exists()


def test_tars_of_another_set_are_not_added_to(tmp_path: Path):
    from arcface_jax.data.tools import webdataset_writing

    source = opened(folders(tmp_path / "a", ["a", "b"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-000001.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"has a train-000001\.tar already"):
        webdataset_writing.write(source, packing.select(source), tmp_path / "out")
