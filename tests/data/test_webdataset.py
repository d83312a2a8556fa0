"""WebDataset tars: samples by name, labels from .cls, JSON or folders, damage named."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from witness import encode, smooth

from arcface_jax.config import DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.source import account
from arcface_jax.errors import DataError, ImageError

JPEGS = [encode(smooth(i), "JPEG", quality=90) for i in range(6)]
LABELS = [0, 0, 0, 1, 2, 2]
PEOPLE = [["ada", "bob", "eve"][label] for label in LABELS]


def opened(path, columns: str = ""):
    return open_source(DataConfig(path=str(path), columns=columns), seed=0)


def tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(labels: Sequence, suffix: str = "cls") -> list[tuple[str, bytes]]:
    files = []
    for number, label in enumerate(labels):
        content = json.dumps(label) if suffix == "json" else str(label)
        files += [
            (f"{number:05d}.jpg", JPEGS[number]),
            (f"{number:05d}.{suffix}", content.encode()),
        ]
    return files


FORMS = {
    "numbers": (samples(LABELS), None),
    "names": (samples(PEOPLE), PEOPLE),
    "JSON": (samples([{"width": 112, "label": label} for label in LABELS], "json"), None),
    "JSON, a name": (samples([{"identity": name, "n": 1} for name in PEOPLE], "json"), PEOPLE),
    "JSON, one field": (samples([{"who": name, "box": [1]} for name in PEOPLE], "json"), PEOPLE),
    "JSON, a bare number": (samples(LABELS, "json"), None),
    # Keys that repeat, as the names of files in folders of their own do.
    "one key for several": ([("a" + name[5:], content) for name, content in samples(LABELS)], None),
    "folders": ([(f"./x/{n}/{i}.a.JPG", JPEGS[i]) for i, n in enumerate(PEOPLE)], PEOPLE),
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_and_labels_of_every_form(tmp_path: Path, form: str):
    files, people = FORMS[form]
    source = opened(tar(tmp_path / "a.tar", files))
    assert source.labels().tolist() == LABELS and source.num_classes == 3
    assert [source.read(i) for i in range(6)] == list(zip(JPEGS, LABELS, strict=True))
    assert (source.names and list(source.names)) == (people and ["ada", "bob", "eve"])


def test_a_field_of_the_json_can_be_named(tmp_path: Path):
    files = samples([{"session": i % 2, "who": name} for i, name in enumerate(PEOPLE)], "json")
    path = tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=r"00000\.json has the fields session, who: which is"):
        opened(path)
    assert opened(path, "label=who").labels().tolist() == LABELS
    assert opened(path, "label=session").labels().tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(DataError, match="has the fields session, who"):
        opened(path, "label=nobody")


def test_a_folder_of_shards_and_a_range_are_one_set(tmp_path: Path):
    files = samples(LABELS)
    for number in range(3):
        tar(tmp_path / f"train-{number:03d}.tar", files[4 * number : 4 * number + 4])
    tar(tmp_path / "test-000.tar", files[:2])
    for path in (tmp_path, tmp_path / "train-{000..002}.tar"):
        source = opened(path)
        assert source.labels().tolist() == LABELS
        assert [source.read(i).data for i in range(6)] == JPEGS
        assert source.where(5) == f"{tmp_path / 'train-002.tar'}, 00005.jpg"
    assert len(opened(tmp_path / "train-{001..002}.tar")) == 4
    with pytest.raises(DataError, match=r"4 shards, of which 2 do not exist \(train-003\.tar"):
        opened(tmp_path / "train-{001..004}.tar")


def test_what_is_not_used_is_counted(tmp_path: Path):
    more = [("00000.txt", b"a caption"), ("._00001.jpg", b"x"), ("9.bin", b"x"), ("9", b"y")]
    source = opened(tar(tmp_path / "a.tar", [*samples(LABELS), *more]))
    line = "10 samples: 6 images used of 3 identities, 4 ignored"
    assert account(source) == f"{line} (.bin 1, .txt 1, hidden 1, no suffix 1)"


# As an unpacked folder has them: p0, p1 and p2.
NESTED = ["p0/0.jpg", "p0/more/1.jpg", "p1/2020/2.jpg", "p1/3.jpg", "p2/4.jpg", "p2/5.jpg"]
HIDDEN = ["__MACOSX/p0/0.jpg", ".ipynb_checkpoints/a.jpg", "p0/.thumbs/0.jpg", "p1/Thumbs.db"]


@pytest.mark.parametrize("top", ["", "./", "faces/"])
def test_folders_below_an_identity_and_hidden_ones_are_not_identities(tmp_path: Path, top: str):
    files = [(top + name, JPEGS[i % 6]) for i, name in enumerate([*NESTED, *HIDDEN])]
    loose = [("faces/cover.jpg", JPEGS[0])] if top == "faces/" else []
    source = opened(tar(tmp_path / "a.tar", files + loose))
    assert source.labels().tolist() == [0, 0, 1, 1, 2, 2]
    assert source.names is not None and list(source.names) == ["p0", "p1", "p2"]
    assert [source.read(i).data for i in range(6)] == JPEGS
    ignored = {"hidden": 4} | ({"loose images": 1} if loose else {})
    assert source.ignored == ignored


def test_the_level_of_the_identities_is_asked_for_and_can_be_given(tmp_path: Path):
    names = [f"{g}/{g}{p}/{i}.jpg" for g in "xy" for p in range(3) for i in range(1)]
    path = tar(tmp_path / "a.tar", [(name, JPEGS[i]) for i, name in enumerate(names)])
    with pytest.raises(DataError, match=r"a\.tar: .*is the identity x \(2 of them\) or x0 \(6\)"):
        opened(path)
    for level, labels in ((1, [0, 0, 0, 1, 1, 1]), (2, [0, 1, 2, 3, 4, 5])):
        source = open_source(DataConfig(path=str(path), identity_level=level), seed=0)
        assert source.labels().tolist() == labels
    with pytest.raises(DataError, match="has no image 3 folders deep"):
        open_source(DataConfig(path=str(path), identity_level=3), seed=0)


def test_hard_links_are_the_files_they_repeat_and_other_entries_are_counted(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, target, kind in (
            ("./p0/0.jpg", JPEGS[0], tarfile.REGTYPE),
            ("./p0/1.jpg", "./p0/0.jpg", tarfile.LNKTYPE),
            ("./p1/2.jpg", JPEGS[2], tarfile.REGTYPE),
            ("./p1/3.jpg", "./p0/1.jpg", tarfile.LNKTYPE),  # a link to a link
            ("./p1/4.jpg", "./p2/5.jpg", tarfile.LNKTYPE),  # the target comes later
            ("./p1/5.jpg", "2.jpg", tarfile.SYMTYPE),
            ("./p1/6.jpg", "", tarfile.FIFOTYPE),
            ("./p2/5.jpg", JPEGS[5], tarfile.REGTYPE),
            ("./p2", "", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type = kind
            data = target if isinstance(target, bytes) else b""
            member.size, member.linkname = len(data), "" if data else str(target)
            archive.addfile(member, io.BytesIO(data))
    source = opened(tmp_path / "a.tar")
    assert source.labels().tolist() == [0, 0, 1, 1, 2]
    assert [JPEGS.index(source.read(i).data) for i in range(5)] == [0, 0, 2, 0, 5]
    assert source.ignored == {"broken links": 1, "symbolic links": 1, "special files": 1}


def test_an_image_without_a_label_is_unreadable_and_the_others_are_not(tmp_path: Path):
    source = opened(tar(tmp_path / "a.tar", [*samples(LABELS), ("x.jpg", JPEGS[0])]))
    assert source.labels().tolist() == [*LABELS, -1]
    with pytest.raises(ImageError, match=r"a\.tar, x\.jpg: has no label"):
        source.read(6)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (30, r"a\.tar is truncated or damaged \(truncated header after byte 0 of 30\)"),
        (1000, r"truncated or damaged \(00000\.jpg ends at byte [0-9,]+ of 1,000\): copy it again"),
        (-11_000, r"truncated or damaged"),
    ],
)
def test_a_tar_that_is_cut_short_is_named(tmp_path: Path, size: int, message: str):
    data = tar(tmp_path / "a.tar", samples(LABELS)).read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:size])
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.tar")


def test_a_tar_without_its_end_is_read_with_a_warning(tmp_path: Path):
    path = tar(tmp_path / "a.tar", samples(LABELS))
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 512])
    source = opened(path)
    assert len(source) == 6 and "has no end mark" in source.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", b"no tar" * 200, r"a\.tar is not a tar file"),
        ("a.tar", b"", "truncated"),
        ("a.tar.gz", b"\x1f\x8b", r"is compressed and has no random access: unpack it"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name)


def test_the_index_is_kept_and_made_again_when_a_tar_changes(tmp_path: Path, capsys):
    path = tar(tmp_path / "a.tar", samples(LABELS))
    os.utime(path, (1, 1))
    index = tmp_path / "a.tar.arcface_index"
    source = opened(path)
    assert index.is_dir()
    sent = pickle.dumps(source)
    assert JPEGS[0] not in sent and len(sent) < 1500
    with ThreadPoolExecutor(8) as pool:
        again = pickle.loads(sent)
        assert list(pool.map(again.read, range(6))) == list(zip(JPEGS, LABELS, strict=True))
    array = index / "labels.npy"
    array.write_bytes(array.read_bytes()[:-4] + b"\1\0\0\0")
    assert opened(path).labels().tolist() == LABELS
    assert "labels.npy is not what was written: made again" in capsys.readouterr().err
    tar(path, samples([1, *LABELS[1:]]))
    os.utime(path, (2, 2))
    assert opened(path).labels().tolist() == [1, *LABELS[1:]]


def test_an_image_that_was_cut_off_later_is_one_error(tmp_path: Path):
    path = tar(tmp_path / "a.tar", samples(LABELS))
    source = opened(path)
    os.truncate(path, 2000)
    with pytest.raises(ImageError, match=r"a\.tar, 00000\.jpg: ends after 1488 of"):
        source.read(0)
    with pytest.raises(ImageError, match=r"a\.tar, byte \d+: ends after 0 of"):
        source.read(5)
