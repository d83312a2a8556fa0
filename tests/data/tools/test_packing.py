"""What `data.py` writes, read by an independent reader, interrupted and gone on with."""

import filecmp
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import witness
from commands import HANG
from damage import DAMAGES, delete, extra_file, symlink_away
from damage import name as damage_name
from witness import encode, face, smooth

from arcface_jax.config import DataConfig
from arcface_jax.data import fingerprint
from arcface_jax.data.opening import open_source
from arcface_jax.data.recordio.reader import RecordReader, RecordWriter
from arcface_jax.data.source import Source
from arcface_jax.data.tools import packing, splitting, tfds_writing, webdataset_writing
from arcface_jax.errors import DataError, ImageError, UserError

ROOT = Path(__file__).parents[3]
LFW = os.environ.get("ARCFACE_JAX_LFW", "")
needs_lfw = pytest.mark.skipif(not LFW, reason="set ARCFACE_JAX_LFW to the folder of train.rec")
MAGIC = struct.pack("<I", witness.MAGIC)


def opened(path) -> Source:
    return open_source(DataConfig(path=str(path)), seed=0)


def run(*words) -> tuple[dict, str]:
    """Runs scripts/data.py; returns its RESULT, and all that it printed."""
    command = [sys.executable, "scripts/data.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("RESULT ")
    return json.loads(last.removeprefix("RESULT ")), done.stdout


def listed(folder: Path, labels: list[int]) -> Path:
    """A list of as many small JPEG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(labels)):
        data = encode(smooth(number), "JPEG", quality=80)
        (folder / f"{number}.jpg").write_bytes(data)
    text = "".join(f"{number}.jpg,{label}\n" for number, label in enumerate(labels))
    (folder / "all.csv").write_text(text)
    return folder / "all.csv"


# ---- The independent witness --------------------------------------------------------------------


@needs_lfw
def test_files_of_other_code_are_read_as_the_independent_reader_reads_them():
    source, seen = opened(LFW), witness.read(Path(LFW) / "train.rec")
    assert seen[0].labels == (len(source) + 1, len(source) + 1 + source.num_classes)
    assert len(seen) == 1 + len(source) + source.num_classes
    labels = source.labels()
    for index in range(len(source)):
        record = seen[index + 1]
        assert source.read(index) == (record.data, record.labels[0])
        assert labels[index] == record.labels[0]


@needs_lfw
def test_packing_what_other_code_wrote_gives_the_same_bytes(tmp_path: Path):
    result, _ = run("pack", LFW, tmp_path / "again")
    assert (result["images"], result["identities"], result["skipped"]) == (9525, 4038, 0)
    for name in ("train.rec", "train.idx", "property"):
        assert filecmp.cmp(tmp_path / "again" / name, Path(LFW) / name, shallow=False), name


def test_the_writer_is_read_back_by_the_independent_reader(tmp_path: Path):
    rng = np.random.default_rng(0)
    pieces = [MAGIC, MAGIC[:3], b"wxyz", b"ab", bytes(4)]
    payloads = [b"".join(pieces[i] for i in rng.integers(5, size=n)) for n in range(40)]
    with RecordWriter(tmp_path / "a.rec") as writer:
        for key, data in enumerate(payloads):
            writer.write(key, data, label=[float(key), 0.5] if key % 3 == 0 else float(key))
    assert sum(data[: len(data) // 4 * 4].count(MAGIC) for data in payloads) > 20
    seen = witness.read(tmp_path / "a.rec")
    for key, data in enumerate(payloads):
        labels = (float(key), 0.5) if key % 3 == 0 else (float(key),)
        number = key
        assert seen[key] == witness.Seen(labels, number, data)
        assert RecordReader(tmp_path / "a.rec").read(key).data == data


# ---- pack ---------------------------------------------------------------------------------------


def test_images_stand_identity_after_identity_with_the_key_ranges_of_each(tmp_path: Path):
    labels = [2, 0, 4, 0, 2, 2]  # 1 and 3 have no image
    source = opened(listed(tmp_path / "in", labels))
    done = packing.pack(source, packing.select(source), tmp_path / "out")
    assert (done.images, done.identities, done.skipped) == (6, 5, [])
    seen = witness.read(tmp_path / "out" / "train.rec")
    assert (tmp_path / "out" / "property").read_text() == "5,112,112\n"
    assert seen[0] == witness.Seen((7.0, 12.0), 0, b"")
    assert [seen[key].labels[0] for key in range(1, 7)] == [0, 0, 2, 2, 2, 4]
    files = [1, 3, 0, 4, 5, 2]
    for key, number in enumerate(files, start=1):
        assert seen[key].data == (tmp_path / "in" / f"{number}.jpg").read_bytes()
    assert [seen[key].labels for key in range(7, 12)] == [(1, 3), (3, 3), (3, 6), (6, 6), (6, 7)]
    renumbered = packing.select(source, renumber=True)
    assert (renumbered.num_classes, renumbered.labels.tolist()) == (3, [0, 0, 1, 1, 1, 2])


@pytest.mark.parametrize("kind", ["recordio", "tfds"])
def test_an_interrupted_job_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch, kind: str):
    source = opened(listed(tmp_path / "in", [i % 7 for i in range(60)]))
    selection = packing.select(source)

    def write(folder: Path):
        if kind == "recordio":
            return packing.pack(source, selection, folder, threads=2)
        return tfds_writing.write(source, selection, folder, name="x", shard_images=16, threads=2)

    expected = write(tmp_path / "whole")
    read, looked = packing.checked, []

    def failing(source: Source, number: int):
        looked.append(number)
        if len(looked) == 41:
            raise KeyboardInterrupt
        return read(source, number)

    monkeypatch.setattr(packing, "checked", failing)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "part")
    assert not list((tmp_path / "part").rglob("train.rec"))
    assert not list((tmp_path / "part").rglob("dataset_info.json"))
    again: list[int] = []
    monkeypatch.setattr(packing, "checked", lambda s, n: (again.append(n), read(s, n))[1])
    done = write(tmp_path / "part")
    assert len(again) < 60 and done.images == expected.images == 60
    for one, other in zip(expected.files, done.files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.parametrize("cut", [0, 1, 7, 40, 500, 4000])
def test_a_record_file_cut_anywhere_is_gone_on_with(tmp_path: Path, cut: int):
    source = opened(listed(tmp_path / "in", [i % 4 for i in range(12)]))
    selection = packing.select(source)
    packing.pack(source, selection, tmp_path / "whole")
    folder = tmp_path / "part"
    folder.mkdir()
    packing.Journal(folder / "packing.json", packing.fingerprint(source, selection, "stop"))
    for name, size in (("rec", cut), ("idx", cut // 20)):  # two buffers, two places
        data = (tmp_path / "whole" / f"train.{name}").read_bytes()
        (folder / f"packing.{name}").write_bytes(data[: len(data) - size])
    packing.pack(source, selection, folder)
    for name in ("train.rec", "train.idx", "property"):
        assert filecmp.cmp(folder / name, tmp_path / "whole" / name, shallow=False), name
    assert not list(folder.glob("packing*"))


def interrupted(folder: Path, source: Source) -> packing.Selection:
    """A job of which all but the end of the record file is there."""
    selection = packing.select(source)
    packing.pack(source, selection, folder.with_name("whole"))
    folder.mkdir()
    job = packing.fingerprint(source, selection, "stop")
    packing.Journal(folder / "packing.json", job, fingerprint.of_source(source))
    for name, cut in (("rec", 2000), ("idx", 20)):
        data = (folder.with_name("whole") / f"train.{name}").read_bytes()
        (folder / f"packing.{name}").write_bytes(data[:-cut])
    return selection


def check_packed(folder: Path) -> None:
    for name in ("train.rec", "train.idx", "property"):
        assert filecmp.cmp(folder / name, folder.with_name("whole") / name, shallow=False), name


@pytest.mark.parametrize("damage", DAMAGES, ids=damage_name)
def test_a_damaged_journal_is_refused_and_a_missing_one_starts_over(tmp_path: Path, capsys, damage):
    source = opened(listed(tmp_path / "in", [i % 4 for i in range(12)]))
    selection = interrupted(tmp_path / "part", source)
    damage(tmp_path / "part" / "packing.json")
    if damage in (delete, extra_file, symlink_away):
        packing.pack(source, selection, tmp_path / "part")
        check_packed(tmp_path / "part")
        assert ("starts over" in capsys.readouterr().err) == (damage is delete)
        return
    with pytest.raises(UserError, match=r"packing\.json.*: remove it to start over"):
        packing.pack(source, selection, tmp_path / "part")


@pytest.mark.parametrize(
    "line", ["3\t9999999\n", "x\n", "3\t-8\n", "4\t8\n", "3\t13\n", "3\t\xb2\n"]
)
def test_a_damaged_line_of_the_unfinished_index_ends_what_is_kept(tmp_path: Path, line: str):
    source = opened(listed(tmp_path / "in", [i % 4 for i in range(12)]))
    selection = interrupted(tmp_path / "part", source)
    index = tmp_path / "part" / "packing.idx"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines[:3], line, *lines[4:]]))
    packing.pack(source, selection, tmp_path / "part")
    check_packed(tmp_path / "part")


def test_a_job_does_not_resume_on_other_images_of_the_same_names(tmp_path: Path):
    path = listed(tmp_path / "in", [i % 4 for i in range(12)])
    source = opened(path)
    selection = interrupted(tmp_path / "part", source)
    (tmp_path / "in" / "7.jpg").write_bytes(encode(smooth(99), "JPEG", quality=80))
    with pytest.raises(UserError, match=r"1 of 12 sampled images differ \(first: image 7\)"):
        packing.pack(opened(path), selection, tmp_path / "part")


def test_pack_writes_nothing_through_links(tmp_path: Path):
    source = opened(listed(tmp_path / "in", [i % 4 for i in range(12)]))
    selection = interrupted(tmp_path / "part", source)
    before = {}
    for name in ("packing.rec", "packing.idx"):
        symlink_away(tmp_path / "part" / name)
        before[name] = (tmp_path / "part" / name).read_bytes()
    packing.pack(source, selection, tmp_path / "part")
    check_packed(tmp_path / "part")
    for name, content in before.items():
        assert (tmp_path / f"part.{name}.moved").read_bytes() == content


def test_bad_images_stop_the_job_or_are_left_out(tmp_path: Path):
    path = listed(tmp_path / "in", [0, 1, 1, 2])
    (tmp_path / "in" / "1.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "2.jpg").write_bytes(encode(face(0, height=50)))
    source = opened(path)
    with pytest.raises(ImageError, match=r"1\.jpg: 8 bytes that are not an image"):
        packing.pack(source, packing.select(source), tmp_path / "a")
    done = packing.pack(source, packing.select(source), tmp_path / "b", bad="skip")
    assert (done.images, done.identities, len(done.skipped)) == (2, 3, 2)
    seen = witness.read(tmp_path / "b" / "train.rec")
    assert [seen[key].labels for key in range(6)] == [(3, 6), (0,), (2,), (1, 2), (2, 2), (2, 3)]


@pytest.mark.parametrize("kind", ["recordio", "folder", "webdataset"])
def test_no_thread_outlives_an_error(tmp_path: Path, kind: str):
    """A progress bar that still runs is drawn below the message, and may fail when collected."""
    path = listed(tmp_path / "in", [0, 1, 1, 2])
    (tmp_path / "in" / "1.jpg").write_bytes(b"no image")
    source, before = opened(path), set(threading.enumerate())
    write = {
        "recordio": packing.pack,
        "folder": splitting.write_folder,
        "webdataset": webdataset_writing.write,
    }[kind]
    with pytest.raises(ImageError) as caught:
        write(source, packing.select(source), tmp_path / "a")
    for thread in set(threading.enumerate()) - before:  # rich stops its thread, but does not wait
        thread.join(HANG)
        assert not thread.is_alive(), caught


@pytest.mark.parametrize("kind", ["recordio", "folder", "webdataset"])
def test_a_set_without_a_good_image_is_not_written(tmp_path: Path, kind: str):
    path = listed(tmp_path / "in", [0, 1])
    for name in ("0.jpg", "1.jpg"):
        (tmp_path / "in" / name).write_bytes(b"no image")
    write = {
        "recordio": packing.pack,
        "folder": splitting.write_folder,
        "webdataset": webdataset_writing.write,
    }[kind]
    source, output = opened(path), tmp_path / "a"
    for _ in range(2):  # it is not a set on the second try either
        with pytest.raises(DataError, match=r"all 2 images were left out.*0\.jpg: 8 bytes"):
            write(source, packing.select(source), output, bad="skip")
    assert not {"train.rec", "train-000000.tar"} & {path.name for path in output.iterdir()}


def test_what_cannot_be_packed_says_why(tmp_path: Path):
    source = opened(listed(tmp_path / "in", [0, 1]))
    packing.pack(source, packing.select(source), tmp_path / "a")
    with pytest.raises(UserError, match=r"has a train\.rec already"):
        packing.pack(source, packing.select(source), tmp_path / "a")
    (tmp_path / "b").mkdir()
    packing.Journal(tmp_path / "b" / "packing.json", "another job")
    with pytest.raises(UserError, match="holds an unfinished job of other images"):
        packing.pack(source, packing.select(source), tmp_path / "b")
    with pytest.raises(DataError, match="no image to pack"):
        packing.pack(source, packing.select(source, identities=np.array([9])), tmp_path / "c")
    with pytest.raises(UserError, match="--name Faces: TFDS takes lower-case"):
        tfds_writing.write(source, packing.select(source), tmp_path, name="Faces", shard_images=5)


# ---- split and merge ----------------------------------------------------------------------------


def test_a_split_shares_no_identity_and_loses_no_image(tmp_path: Path):
    labels = np.repeat(np.arange(40), np.arange(40) % 5 + 1)
    train, held_out = splitting.divide(labels, fraction=0.25, seed=1)
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted([*train, *held_out]) == list(range(40))
    again, _ = splitting.divide(labels, fraction=0.25, seed=1)
    other, _ = splitting.divide(labels, fraction=0.25, seed=2)
    assert np.array_equal(train, again) and not np.array_equal(train, other)
    several, rest = splitting.divide(labels, fraction=0.25, seed=1, min_images=3)
    assert all(identity % 5 >= 2 for identity in [*several, *rest]) and len(several) == 18
    for wrong in (0.0, 1.0, 0.001):
        with pytest.raises(UserError, match="--fraction"):
            splitting.divide(labels, fraction=wrong, seed=0)


@needs_lfw
def test_split_and_merge_by_the_command(tmp_path: Path):
    result, _ = run("split", LFW, tmp_path, "--fraction", 0.2, "--min-images", 6)
    sides = {name: witness.read(tmp_path / name / "train.rec") for name in ("train", "eval")}
    original = {}
    for record in witness.read(Path(LFW) / "train.rec").values():
        original.setdefault(record.data, record.labels[0])
    people = {
        name: {original[r.data] for r in side.values() if r.data} for name, side in sides.items()
    }
    assert not people["train"] & people["eval"]
    assert (
        len(people["eval"])
        == result["eval/identities"]
        == round(0.2 * (result["train/identities"] + result["eval/identities"]))
    )
    merged, _ = run("merge", tmp_path / "m", "--paths", tmp_path / "train", tmp_path / "eval")
    assert merged["images"] == result["train/images"] + result["eval/images"]
    whole = opened(tmp_path / "m")
    assert whole.num_classes == len(people["train"]) + len(people["eval"])
    assert np.bincount(whole.labels()).min() >= 6
