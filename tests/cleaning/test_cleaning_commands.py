"""`data clean`, `overlap` and `apply` on toy people with known errors, through the script."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pattern_faces
import pytest
from commands import result, script

from arcface_jax.cleaning import apply, files, leaks, photos
from arcface_jax.config import Config, DataConfig
from arcface_jax.data.opening import open_source
from arcface_jax.data.source import Source
from arcface_jax.errors import DataError, UserError
from arcface_jax.inference import open_model
from arcface_jax.training import saved_runs

PEOPLE, SHOTS = 40, 6
TWICE, MIXED, LOST = 3, (5, 6), (9, 2)  # one person as two; two as one; an image under another


def people() -> list[tuple[int, int, str]]:
    listed = []
    for number in range(PEOPLE):
        for shot in range(SHOTS):
            label = f"person{number:02d}"
            if number == TWICE and shot >= 3:
                label = "person90"
            if number == MIXED[1]:
                label = f"person{MIXED[0]:02d}"
            if (number, shot) == LOST:
                label = "person12"
            listed.append((number, shot, label))
    return listed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return pattern_faces.write_model(tmp_path_factory.mktemp("model") / "squares.onnx")


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    return pattern_faces.write_list(tmp_path_factory.mktemp("set") / "faces", people())


def run(*words) -> int:
    return script("data").main([str(word) for word in words])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def opened(path: Path) -> Source:
    return open_source(DataConfig(path=str(path)), seed=0)


def label_of(source: Source, name: str) -> int:
    return list(source.names or ()).index(name)


def test_centers_and_network_are_of_one_checkpoint(model, faces, tmp_path, monkeypatch):
    read = {}

    def restore_dataset(path, which):
        assert (path, which) == (model, "best")
        return Config(), 7, {}

    def restore_centers(path, which):
        read["centers"] = which
        return np.ones((opened(faces).num_classes, 4), np.float32), None

    def open_path(path, *, step, **options):
        read["network"] = step
        raise UserError("far enough")

    monkeypatch.setattr(saved_runs, "restore_dataset", restore_dataset)
    monkeypatch.setattr(saved_runs, "restore_centers", restore_centers)
    monkeypatch.setattr(open_model, "open_path", open_path)
    words = ("clean", model, "--data", faces, "--level", "centers", "--step", "best")
    with pytest.raises(SystemExit):
        run(*words, "--output", tmp_path / "out")
    assert read == {"centers": 7, "network": 7}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("clean MODEL --data FACES --level centers --find mixed", "--find mixed needs the embedd"),
        ("clean MODEL --data nowhere", "--data nowhere does not exist: set --data to"),
        ("overlap nowhere FACES --model MODEL", "A nowhere does not exist: set A to"),
        ("overlap FACES no_module:name --model MODEL", "B no_module:name: cannot import no_module"),
        ("overlap FACES no.bin --model MODEL", "name an existing set with B"),
        ("pairs PAIRS:gone x.bin", "append the folder: PATH "),
    ],
)
def test_errors_name_the_options_of_the_command(model, faces, tmp_path, capsys, words, named):
    (tmp_path / "pairs.csv").write_text("a.jpg,b.jpg,1\n")
    named_files = {"MODEL": model, "FACES": faces, "PAIRS:gone": f"{tmp_path / 'pairs.csv'}:gone"}
    with pytest.raises(SystemExit) as stop:
        run(*(named_files.get(word, word) for word in words.split()))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert named in message and "--data." not in message and "targets" not in message


@pytest.fixture(scope="module")
def cleaned(model, faces, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("clean") / "out"
    assert run("clean", model, "--data", faces, "--output", output) == 0
    return output


def decide(folder: Path, target: Path, name: str, decision: str) -> Path:
    """A copy of the findings in which every line of a file has a decision."""
    if not target.exists():
        target.mkdir()
        for path in folder.glob("*.*"):
            (target / path.name).write_bytes(path.read_bytes())
    found = rows(target / name)
    with (target / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, files.COLUMNS[name])
        writer.writeheader()
        writer.writerows([{**row, "decision": decision} for row in found])
    return target


def test_planted_errors_are_found(cleaned, faces):
    source = opened(faces)
    (pair,) = [row for row in rows(cleaned / "duplicates.csv") if row["decision"] == "merge"]
    expected = sorted(label_of(source, name) for name in ("person03", "person90"))
    assert [int(pair[name]) for name in ("label_a", "label_b")] == expected
    assert (pair["images_a"], pair["images_b"], pair["mutual"]) == ("3", "3", "1")
    assert pair["group"] == str(expected[0]) and pair["same_photo"] == "0"
    first = rows(cleaned / "mixed.csv")[0]
    assert int(first["label"]) == label_of(source, "person05")
    assert (first["images_a"], first["images_b"]) == ("6", "6") and first["decision"] == "review"
    wrong = rows(cleaned / "images.csv")[0]
    assert wrong["path"].endswith("9_2.png") and wrong["decision"] == "review"
    assert int(wrong["given_label"]) == label_of(source, "person12")
    assert int(wrong["suggested_label"]) == label_of(source, "person09")
    about = json.loads((cleaned / "clean.json").read_text())
    assert about["weak"] is False and about["rank_one"] == 1
    named = {"duplicates.csv", "mixed.csv", "images.csv", "label_issues.csv"}
    assert set(about["checksums"]) == named
    issue = rows(cleaned / "label_issues.csv")[0]
    assert issue["is_label_issue"] == "True" and issue["index"] == wrong["index"]
    assert issue["predicted_label"] == wrong["suggested_label"]


def test_a_stopped_clean_resumes_to_the_same_bytes(cleaned, model, faces, tmp_path, monkeypatch):
    from arcface_jax.cleaning import embedding

    names = ["duplicates.csv", "mixed.csv", "images.csv", "clean.json"]
    monkeypatch.setattr(embedding, "SHARD", 64)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run("clean", model, "--data", faces, "--output", whole) == 0
    load, calls = embedding._shards, []

    def interrupted(*words, **options):
        for number, *rest in load(*words, **options):
            calls.append(number)
            if number == 2 and len(calls) == 3:
                raise KeyboardInterrupt
            yield number, *rest

    monkeypatch.setattr(embedding, "_shards", interrupted)
    with pytest.raises(SystemExit):
        run("clean", model, "--data", faces, "--output", stopped)
    assert run("clean", model, "--data", faces, "--output", stopped) == 0
    assert calls == [0, 1, 2, 2, 3]
    for name in names:
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_apply_writes_a_new_set(cleaned, faces, tmp_path, capsys):
    decided = decide(cleaned, tmp_path / "decided", "images.csv", "keep")
    found = rows(decided / "images.csv")
    found[0]["decision"] = "relabel"
    with (decided / "images.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, files.COLUMNS["images.csv"])
        writer.writeheader()
        writer.writerows(found)
    decide(cleaned, decided, "mixed.csv", "drop")
    output = tmp_path / "new"
    assert run("apply", faces, decided, output, "--merge", "--drop", "--relabel") == 0
    values = result(capsys.readouterr().out)
    old, new = opened(faces), opened(output)
    dropped = len(rows(decided / "mixed.csv"))
    assert values["merged"] == 1 and values["relabeled"] == 1
    assert values["identities"] == new.num_classes == old.num_classes - 1 - dropped
    assert len(new) == values["images"] == len(old) - values["dropped"]
    names = list(new.names or ())
    assert "person90" not in names and "person05" not in names and "person03" in names
    images = {old.read(i).data: i for i in range(len(old))}
    for index in range(len(new)):
        data, label = new.read(index)
        number = int(Path(old.where(images[data])).stem.split("_")[0])
        assert names[label] == f"person{number:02d}"
    mapped = {int(row["old_label"]): row["new_label"] for row in rows(output / "label_map.csv")}
    for name in ("person03", "person90"):
        assert int(mapped[label_of(old, name)]) == names.index("person03")
    assert mapped[label_of(old, "person05")] == ""
    lines = rows(output / "applied.csv")
    assert [line["action"] for line in lines].count("merge") == 1
    assert {line["source"] for line in lines} == {"duplicates.csv", "images.csv", "mixed.csv"}
    assert json.loads((output / "cleaned.json").read_text())["actions"]["merge"] is True


def test_an_image_moved_to_a_dropped_identity_counts_as_dropped(cleaned, faces, tmp_path, capsys):
    decided = decide(cleaned, tmp_path / "decided", "mixed.csv", "drop")
    decide(cleaned, decided, "images.csv", "keep")
    (label, *_), found = (rows(decided / name) for name in ("mixed.csv", "images.csv"))
    moved = found[0] | {"decision": "relabel", "suggested_label": label["label"]}
    files.write(decided, "images.csv", [moved.values(), *(row.values() for row in found[1:])])
    assert run("apply", faces, decided, tmp_path / "new", "--drop", "--relabel") == 0
    values = result(capsys.readouterr().out)
    assert values["relabeled"] == 0 and values["images"] == 240 - values["dropped"]
    (line,) = [row for row in rows(tmp_path / "new" / "applied.csv") if row["image"]]
    assert (line["action"], line["image"], line["new_label"]) == ("drop", moved["index"], "")


def test_a_row_that_is_too_short_is_named(tmp_path):
    path = tmp_path / "duplicates.csv"
    path.write_text("decision," + ",".join(files.COLUMNS["duplicates.csv"][:-1]) + "\nmerge,1\n")
    with pytest.raises(DataError, match=r"duplicates\.csv: label_b '' is not a whole number"):
        apply.groups_in(path, num_classes=3)


def test_apply_writes_a_list(cleaned, faces, tmp_path):
    target = tmp_path / "lists" / "merged.csv"
    assert run("apply", faces, cleaned, target, "--merge") == 0
    old, new = opened(faces), opened(target)
    assert len(new) == len(old) and new.num_classes == old.num_classes - 1
    mapped = rows(target.parent / "label_map.csv")
    assert [name for name in new.names or ()] == [
        row["name"]
        for row in sorted(mapped, key=lambda r: int(r["new_label"]))
        if row["old_label"] != str(label_of(old, "person90"))
    ]


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, [], "--merge, --drop or --relabel"),
        ("weak", ["--merge"], "too weak .*--force"),
        ("other", ["--merge"], "another training set"),
        ("decision", ["--merge"], "line 2: decision 'yes' is not one of merge"),
    ],
)
def test_apply_refuses(cleaned, faces, tmp_path, capsys, change, words, message):
    decision = "yes" if change == "decision" else "merge"
    decided = decide(cleaned, tmp_path / "decided", "duplicates.csv", decision)
    about = json.loads((decided / "clean.json").read_text())
    if change == "weak":
        about |= {"weak": True, "rank_one": 0.3}
    if change == "other":
        about["data"]["images"] += 1
    (decided / "clean.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit) as error:
        run("apply", faces, decided, tmp_path / "new", *words)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_leaks_into_a_verification_set(model, faces, tmp_path, capsys):
    strangers = range(100, 110)
    pairs = [((n, 0), (n, 1)) for n in strangers] + [((n, 2), (n + 50, 3)) for n in strangers]
    pairs[4] = ((7, 20), (7, 21))  # two new photographs of a person of the set
    pairs[15] = ((105, 2), (8, 3))  # the same photograph as one of the set
    target = pattern_faces.write_bin(tmp_path / "pairs.bin", pairs)
    output = tmp_path / "overlap"
    assert run("overlap", faces, target, "--model", model, "--output", output) == 0
    values = result(capsys.readouterr().out)
    found = {int(row["index"]): row for row in rows(output / "overlap.csv")}
    assert set(found) == {8, 9, 31} and values["people"] == 2 and values["same_photo"] == 1
    assert found[31]["same_photo"] == "1" and found[31]["path_a"].endswith("8_3.png")
    with pytest.raises(DataError, match=r"lists images of pairs, not of lfw, cfp: name the"):
        leaks.left_out(output / "overlap.csv", {"lfw": 40, "cfp": 40})
    options = ["--targets", target, "--leave-out", output / "overlap.csv"]
    report = tmp_path / "report"
    words = ["--onnx", str(model), *map(str, options), "--report", str(report)]
    assert script("evaluate").main(words) == 0
    out = capsys.readouterr().out
    assert "2 of 20 pairs are flagged" in out
    assert {"eval/pairs/accuracy", "eval/pairs_without_overlap/accuracy"} <= result(out).keys()
    page = (report / "index.html").read_text()
    assert re.search(r"\bpairs\b.*\b20\b", page) and "pairs_without_overlap" in page


def test_two_sets_are_merged_by_their_people(model, faces, tmp_path, capsys):
    other = pattern_faces.write_list(
        tmp_path / "other",
        [(n, s, f"name{n}") for n in [1, 2, *range(200, 220)] for s in range(10, 15)],
    )
    output = tmp_path / "overlap"
    assert run("overlap", faces, other, "--model", model, "--output", output) == 0
    first, second = opened(faces), opened(other)
    found = {(int(r["label_a"]), int(r["label_b"])) for r in rows(output / "merge.csv")}
    assert found == {
        (label_of(first, f"person{n:02d}"), label_of(second, f"name{n}")) for n in (1, 2)
    }
    merged = tmp_path / "merged"
    same = ["--same", output / "merge.csv"]
    assert run("merge", merged, "--paths", faces, other, *same) == 0
    source = opened(merged)
    assert source.num_classes == first.num_classes + second.num_classes - 2
    counts = np.bincount(source.labels())
    assert counts[label_of(source, "person01")] == SHOTS + 5


def test_a_split_keeps_duplicates_on_one_side(cleaned, faces, tmp_path):
    same = ["--same", cleaned / "duplicates.csv"]
    for seed in range(3):
        output = tmp_path / str(seed)
        words = ["--fraction", 0.5, "--seed", seed, *same]
        assert run("split", faces, output, *words) == 0
        sides = [set(opened(output / side).names or ()) for side in ("train", "eval")]
        assert (
            sides[0] & sides[1] == set() and len(sides[0] | sides[1]) == opened(faces).num_classes
        )
        assert any({"person03", "person90"} <= side for side in sides)


def test_one_photograph_survives_recompression():
    import cv2

    smooth = cv2.GaussianBlur(pattern_faces.image(0, 0), (0, 0), 9)
    other = cv2.GaussianBlur(pattern_faces.image(0, 1), (0, 0), 9)
    jpeg = cv2.imdecode(cv2.imencode(".jpg", smooth, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 1)
    moved = np.roll(jpeg, 3, axis=1)
    assert photos.correlation(smooth, jpeg) > 0.99
    assert photos.correlation(smooth, moved) > photos.SAME > photos.correlation(smooth, other)
    assert photos.correlation(smooth, smooth[:, ::-1]) > 0.99
