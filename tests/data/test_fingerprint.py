"""Fingerprints: what leaves them alone, and that every change of the data has its name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from witness import encode, smooth

from arcface_jax.config import DataConfig, NoiseConfig, SyntheticConfig
from arcface_jax.data import fingerprint
from arcface_jax.data.opening import open_source
from arcface_jax.data.recordio.reader import RecordWriter
from arcface_jax.data.source import Sample, Source
from arcface_jax.errors import DataError, ImageError
from arcface_jax.runtime import launch

COUNT = 24
IMAGES = [encode(smooth(number), "JPEG", quality=80) for number in range(COUNT)]


def records(folder: Path, images: list[bytes] = IMAGES, *, labels: list[int] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with RecordWriter(folder / "train.rec") as writer:
        for key, data in enumerate(images):
            writer.write(key, data, label=float(key % 4 if labels is None else labels[key]))
    return str(folder)


def listed(folder: Path) -> str:
    people(folder)
    lines = [f"{number % 4}/{number:02d}.jpg,{number % 4}\n" for number in range(COUNT)]
    (folder / "all.csv").write_text("".join(lines))
    return str(folder / "all.csv")


def people(folder: Path) -> str:
    for number, data in enumerate(IMAGES):
        file = folder / str(number % 4) / f"{number:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return str(folder)


def parquet(folder: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": IMAGES, "label": [number % 4 for number in range(COUNT)]})
    parquet.write_table(table, folder / "train-0.parquet", row_group_size=5)
    return str(folder)


FORMS: dict[str, Callable[[Path], str]] = {
    "records": records,
    "list": listed,
    "folder": people,
    "parquet": parquet,
}


def of(path: str, **changes) -> fingerprint.Fingerprint:
    found = fingerprint.of_source(open_source(DataConfig(path=path, **changes), seed=0))
    return json.loads(json.dumps(found))  # as a checkpoint returns it


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("form", FORMS)
def test_moved_and_touched_data_keep_their_fingerprint(tmp_path: Path, form: str):
    path = FORMS[form](tmp_path / "here")
    first = of(path)
    for file in (tmp_path / "here").rglob("*"):
        os.utime(file, (1e9, 1e9))
    kept = of(path)  # of a record file that is old enough for its index to be kept
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(tmp_path / "here", tmp_path / "elsewhere" / "there")
    again = of(str(Path(moved) / Path(path).relative_to(tmp_path / "here")))
    assert first == kept == again
    assert (first["images"], first["classes"], len(first["sample"])) == (COUNT, 4, COUNT)
    assert fingerprint.differences(first, again) == []
    assert fingerprint.digest(first) == fingerprint.digest(again)


def test_every_change_of_a_record_file_is_named(tmp_path: Path):
    first = of(records(tmp_path / "a"))
    turned = [*IMAGES[1:], IMAGES[0]]
    one = bytearray(IMAGES[7])
    one[-5] ^= 1
    labels = [number % 4 for number in range(COUNT)]
    changes = {
        "one byte": (records(tmp_path / "b", [*IMAGES[:7], bytes(one), *IMAGES[8:]]), []),
        "fewer": (records(tmp_path / "c", IMAGES[:-1]), ["24 images then and 23 now", "bytes"]),
        "order": (records(tmp_path / "d", turned), ["record offsets differ", "sampled images"]),
        "labels": (records(tmp_path / "e", labels=[1, 0, *labels[2:]]), []),
        "classes": (records(tmp_path / "f", labels=[9, *labels[1:]]), ["4 classes then and 10"]),
        "form": (listed(tmp_path / "g"), ["form: record file then and image files now"]),
    }
    found = {name: fingerprint.differences(first, of(path)) for name, (path, _) in changes.items()}
    for name, (_, words) in changes.items():
        assert all(word in "; ".join(found[name]) for word in words), (name, found[name])
    assert found["one byte"] == ["1 of 24 sampled images differ (first: image 7)"]
    assert found["labels"] == ["labels of 2 of 24 sampled images differ (first: image 0)"]
    assert found["form"] == changes["form"][1]  # the same images, in the same order


def test_names_and_labels_of_image_files_are_named(tmp_path: Path):
    first = of(people(tmp_path / "a"))
    (tmp_path / "a" / "3" / "03.jpg").rename(tmp_path / "a" / "3" / "99.jpg")
    assert "file names differ" in fingerprint.differences(first, of(str(tmp_path / "a")))
    path = Path(listed(tmp_path / "b"))
    first = of(str(path))
    path.write_text(path.read_text().replace("02.jpg,2", "02.jpg,3"))
    assert fingerprint.differences(first, of(str(path))) == [
        "labels differ",
        "labels of 1 of 24 sampled images differ (first: image 2)",
    ]


def test_folders_are_read_in_one_order_whatever_the_disk_lists(tmp_path: Path, monkeypatch):
    path = people(tmp_path / "a")
    first, scan = of(path), os.scandir

    class Backwards(list):
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def backwards(folder):
        with scan(folder) as entries:
            return Backwards(reversed(sorted(entries, key=lambda entry: entry.name)))

    monkeypatch.setattr(os, "scandir", backwards)
    assert of(path) == first


def test_sets_without_files_are_known_by_their_parameters():
    small, large = (SyntheticConfig(identities=6, images_per_identity=n) for n in (4, 5))
    drawn = [of("synthetic", synthetic=parameters) for parameters in (small, large)]
    assert drawn[0]["sample"] == [] and drawn[0]["facts"]["seed"] == 0
    assert fingerprint.differences(*drawn) == [
        "24 images then and 30 now",
        "images per identity: 4 then and 5 now",
    ]
    noise = of("noise", noise=NoiseConfig(classes=6, images=24))
    assert "form: synthetic then and noise now" in fingerprint.differences(drawn[0], noise)


def test_joined_sets_name_the_part_that_changed(tmp_path: Path):
    both = f"{records(tmp_path / 'a')},{people(tmp_path / 'b')}"
    first = of(both)
    assert (first["images"], first["classes"]) == (2 * COUNT, 8)
    (tmp_path / "b" / "0" / "00.jpg").rename(tmp_path / "b" / "0" / "00b.jpg")
    assert fingerprint.differences(first, of(both))[0] == "set 2 file names differ"
    swapped = ",".join(reversed(both.split(",")))
    assert "set 1 form differ" in fingerprint.differences(first, of(swapped))


class Own(Source):
    """A plug-in that knows nothing of fingerprints; one image may be unreadable."""

    num_classes = 3

    def __init__(self, *, count: int = 1000, bad: int = -1, offset: int = 0):
        self._count, self._bad, self._offset = count, bad, offset

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Sample:
        if index == self._bad:
            raise ImageError("own", "is gone")
        return Sample(b"%d" % (index + self._offset), index % 3)


def test_a_plug_in_has_counts_and_a_keyed_sample_of_its_images():
    numbers = fingerprint.sample_of(1000)
    assert len(set(numbers.tolist())) == fingerprint.SAMPLE and numbers.max() < 1000
    assert np.array_equal(numbers, fingerprint.sample_of(1000))
    first = fingerprint.of_source(Own())
    assert len(first["sample"]) == fingerprint.SAMPLE and first["facts"] == {}
    assert fingerprint.differences(first, fingerprint.of_source(Own(offset=1))) == [
        f"128 of 128 sampled images differ (first: image {numbers[0]})"
    ]
    # An unreadable image is not other data: the run has its own limit for those.
    damaged = fingerprint.of_source(Own(bad=int(numbers[3])))
    assert fingerprint.differences(first, damaged) == []


def test_hosts_with_other_data_are_named(monkeypatch: pytest.MonkeyPatch):
    other = {"host": "b7", "data": fingerprint.of_source(Own(offset=1))}
    monkeypatch.setattr(launch, "gather_text", lambda text: [text, text, json.dumps(other)])
    monkeypatch.setattr(launch, "host_name", lambda: "a1")
    with pytest.raises(DataError, match=r"process 0 \(a1\), process 2 \(b7\): 128 of 128 sampled"):
        fingerprint.agreed(Own(), name="x")
    failed = {"host": "b7", "data": {}, "problem": "train.rec cannot be read"}
    monkeypatch.setattr(launch, "gather_text", lambda text: [text, text, json.dumps(failed)])
    with pytest.raises(DataError, match=r"in 1 of 3 processes \(b7: train\.rec cannot be read\)"):
        fingerprint.agreed(Own(), name="x")
    monkeypatch.setattr(launch, "gather_text", lambda text: [text, text])
    assert fingerprint.agreed(Own(), name="x") == fingerprint.of_source(Own())


def test_a_host_that_cannot_read_its_data_does_not_leave_the_others_waiting(monkeypatch):
    class Gone(Own):
        def facts(self):
            raise DataError("train.rec is gone")

    def gather(text: str) -> list[str]:
        assert json.loads(text)["problem"] == "train.rec is gone"
        return [text, text.replace("train.rec is gone", "")]

    monkeypatch.setattr(launch, "gather_text", gather)
    with pytest.raises(DataError, match=r"in 1 of 2 processes \(.*: train\.rec is gone\)"):
        fingerprint.agreed(Gone(), name="x")
