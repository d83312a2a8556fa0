"""Record files with every kind of header that arcface_torch trains on or packing scripts write."""

from pathlib import Path

import numpy as np
import pytest
from witness import encode, smooth

from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.recordio.reader import RecordWriter
from arcface_jax.errors import DataError, ImageError

JPEGS = [encode(smooth(i), "JPEG", quality=60) for i in range(4)]
LABELS = [0, 0, 2, 1]
IMAGES = list(zip(LABELS, JPEGS, strict=True))


def opened(folder: Path, records: list, **options):
    """(key, label, data) records as a training set."""
    with RecordWriter(folder / "train.rec") as writer:
        for key, label, data in records:
            writer.write(key, data, label=label)
    return open_source(DataConfig(path=str(folder), **options), seed=0)


def numbered(first: int = 1, *, extra: list | None = None, step: int = 1) -> list:
    more = extra or []
    return [(first + step * i, [y, *more] if more else y, x) for i, (y, x) in enumerate(IMAGES)]


def identities(first: int) -> list:
    return [(first + i, [1.0, 2.0], b"") for i in range(3)]


FORMS = {
    "insightface's": [(0, [5, 8], b""), *numbered(), *identities(5)],
    "images with a second label": [(0, [5, 8], b""), *numbered(extra=[30]), *identities(5)],
    "no identity records": [(0, [5, 5], b""), *numbered()],
    "no identity records, holes": [(0, [8, 8], b""), *numbered(step=2)],
    "identities announced but not stored": [(0, [5, 8], b""), *numbered()],
    "a blank record 0": [(0, 0.0, b""), *numbered()],
    "a byte that is no image in record 0": [(0, [5, 5], b"\0"), *numbered()],
    "no header": numbered(0),
    "no header, two labels": numbered(0, extra=[25]),
    "no header, two labels like a header": [(0, [0, 7], JPEGS[0]), *numbered(0, extra=[9])[1:]],
    "no header, keys from 1": numbered(1),
    "no header, keys from 7, holes": numbered(7, step=3),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_images_and_identities(tmp_path: Path, form: str):
    source = opened(tmp_path, FORMS[form])
    assert (len(source), source.num_classes) == (4, 3)
    assert source.labels().tolist() == LABELS
    assert [source.read(i) for i in range(4)] == [(x, y) for y, x in IMAGES]
    assert bool(source.notes) == ("label" in form)


REFUSED = {
    "identities far beyond": ([(0, [5, 16_777_215], b""), *numbered()], "16,777,210 classes for 4"),
    "a label far beyond": ([*numbered(), (5, 3e6, JPEGS[0])], r"record 5 has the label 3000000"),
    "no images below": ([(0, [1, 5], b""), *numbered()], r"header \[1\.0, 5\.0\] is not"),
    "the images of another file": ([(0, [900, 900], b""), *numbered()], r"\[900\.0, 900\.0\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_headers_and_labels_that_are_wrong_are_refused(tmp_path: Path, what: str):
    records, message = REFUSED[what]
    with pytest.raises(DataError, match=message):
        opened(tmp_path, records)


@pytest.mark.parametrize("header", [[], [(0, [5, 5], b"")]], ids=["none", "without identities"])
def test_any_of_several_labels_may_be_the_identity(tmp_path: Path, header: list):
    records = [*header, *((key, [20.0, 0.5, y], x) for key, y, x in numbered())]
    source = opened(tmp_path, records, label_index=2)
    assert source.num_classes == 3 and source.labels().tolist() == LABELS
    images, labels = np.zeros((4, 112, 112, 3), np.uint8), np.zeros(4, np.int32)
    assert not source.load(np.arange(4), np.arange(4), images, labels)
    assert labels.tolist() == LABELS == [source.read(i).label for i in range(4)]
    assert source.facts()["label index"] == 2


def test_a_record_with_too_few_labels_is_named(tmp_path: Path):
    records = [(1, [9.0, 1.0], JPEGS[0]), (2, 1.0, JPEGS[1]), (3, [9.0], JPEGS[2])]
    source = opened(tmp_path, records, label_index=1)
    assert source.labels().tolist() == [1, -1, -1]
    images, labels = np.zeros((3, 112, 112, 3), np.uint8), np.zeros(3, np.int32)
    failed = source.load(np.arange(3), np.arange(3), images, labels)
    assert [row for row, _ in failed] == [1, 2]
    with pytest.raises(ImageError, match=r"record 3: has 1 labels, and data\.label_index asks"):
        source.read(2)
