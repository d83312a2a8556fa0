"""Files that are written in one move: what is left after a failure, a kill, and two at once."""

import errno
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from arcface_jax.errors import CheckpointError
from arcface_jax.runtime import files
from arcface_jax.runtime.files import atomic, atomic_files, atomic_folder, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_writer_that_fails_midway_leaves_the_old_content_and_no_part(tmp_path: Path, error):
    path = tmp_path / "metrics.csv"
    write_atomic(path, "old\n")
    with pytest.raises(error), atomic(path) as file:
        file.write("half of the n")
        file.flush()
        assert names(tmp_path) == ["metrics.csv", files.part_of(path).name]
        raise error
    assert path.read_text() == "old\n" and names(tmp_path) == ["metrics.csv"]
    with pytest.raises(error), atomic_files(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old\n" and names(tmp_path) == ["metrics.csv"]
    with pytest.raises(error), atomic_folder(tmp_path / "index") as folder:
        (folder / "a").write_text("half")
        raise error
    assert names(tmp_path) == ["metrics.csv"]


def test_a_part_has_one_suffix_and_the_name_of_its_process(tmp_path: Path):
    part = files.part_of(tmp_path / "a.npy")
    assert part.name == f"a.npy.{platform.node()}-{os.getpid()}.part"
    with atomic(tmp_path / "a.npy", "wb") as file:
        assert names(tmp_path) == [part.name]
        np.save(file, np.arange(3))
    assert names(tmp_path) == ["a.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), [0, 1, 2])


def test_text_is_utf_8_and_bytes_are_bytes(tmp_path: Path):
    write_atomic(tmp_path / "a", "Größe: 1 m²\n")
    assert (tmp_path / "a").read_bytes() == "Größe: 1 m²\n".encode()
    write_atomic(tmp_path / "a", b"\xff\x00", durable=False)
    assert (tmp_path / "a").read_bytes() == b"\xff\x00"


def test_a_file_is_synced_before_it_is_moved(tmp_path: Path, monkeypatch):
    seen = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(names(tmp_path)), sync(number)))
    write_atomic(tmp_path / "a", "x")
    assert seen == [[files.part_of(tmp_path / "a").name], ["a"]]  # the file, then its folder
    write_atomic(tmp_path / "b", "x", durable=False)
    assert len(seen) == 2


def test_the_missing_folder_is_the_callers_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "gone" / "a", "x")
    assert names(tmp_path) == []


def test_side_files_come_first_and_the_named_one_last(tmp_path: Path, monkeypatch):
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    with atomic_files(tmp_path / "model.onnx") as path:
        assert path.name == "model.onnx" and path.parent.parent == tmp_path
        path.write_text("graph")
        for side in ("model.onnx.data", "a.data"):
            path.with_name(side).write_text("weights")
    assert moved == ["a.data", "model.onnx.data", "model.onnx"]
    assert names(tmp_path) == ["a.data", "model.onnx", "model.onnx.data"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path):
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "index") as folder:
            (folder / content).write_text(content)
    assert names(tmp_path) == ["index"] and names(tmp_path / "index") == ["two"]


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_atomic(tmp_path / "link", "x")
    assert (tmp_path / "real" / "file").read_text() == "x" and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_atomic(tmp_path / "pipe", "through")
    reader.join()
    assert found == ["through"] and (tmp_path / "pipe").is_fifo()


WRITES = """
import sys, time
from pathlib import Path
from arcface_jax.runtime.files import atomic
with atomic(Path(sys.argv[1])) as file:
    file.write(sys.argv[2])
    file.flush()
    print("half", flush=True)
    sys.stdin.read()
    file.write(sys.argv[2])
"""


def writer(path: Path, text: str) -> subprocess.Popen:
    """A process that has written half of its file, and waits for the end of its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(path), text],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    return process


def test_two_processes_that_write_one_file_do_not_mix(tmp_path: Path):
    path = tmp_path / "settings.json"
    first, second = writer(path, "a"), writer(path, "b")
    assert len(names(tmp_path)) == 2 and not path.exists()
    for process, content in ((second, "bb"), (first, "aa")):
        process.communicate()
        assert process.returncode == 0 and path.read_text() == content
    assert names(tmp_path) == ["settings.json"]


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path: Path):
    path = tmp_path / "a.txt"
    killed, running = writer(path, "k"), writer(path, "r")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(names(tmp_path)) == 2
    other_host = tmp_path / f"a.txt.{platform.node()}x-{killed.pid}.part"
    other_file = tmp_path / f"b.txt.{platform.node()}-{killed.pid}.part"
    for kept in (other_host, other_file):
        kept.write_text("in use, for all that is known here")
    write_atomic(path, "x")
    of_running = f"a.txt.{platform.node()}-{running.pid}.part"
    assert names(tmp_path) == sorted(["a.txt", of_running, other_host.name, other_file.name])
    running.communicate()
    assert path.read_text() == "rr"


@pytest.mark.parametrize("kind", ["atomic", "atomic_files", "atomic_folder"])
def test_a_file_is_synced_before_its_move_and_its_folder_after_it(tmp_path, monkeypatch, kind):
    events: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(number: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{number}"))
        events.append("sync the folder" if place == tmp_path else f"sync {place.name[:6]}")
        fsync(number)

    def moved(move):
        return lambda self, target: (events.append("move"), move(self, target))[1]

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", moved(replace))
    monkeypatch.setattr(Path, "rename", moved(rename))
    target = tmp_path / "target"
    if kind == "atomic":
        write_atomic(target, "new")
    elif kind == "atomic_files":
        with atomic_files(target) as part:
            part.write_text("new")
    else:
        with atomic_folder(target) as folder:
            (folder / "target").write_text("new")
    before = ["sync target", "sync target"] if kind == "atomic_folder" else ["sync target"]
    assert events == [*before, "move", "sync the folder"]


def test_a_disk_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(number: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{number}")).is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(number)

    monkeypatch.setattr(os, "fsync", only_files)
    write_atomic(tmp_path / "target", "new")
    assert (tmp_path / "target").read_text() == "new"


# ---- Symbolic links ------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A file that nothing may write to."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("not ours\n")
    return tmp_path / "elsewhere" / "file"


def test_a_link_out_of_the_folder_is_replaced(tmp_path: Path, elsewhere: Path):
    link = tmp_path / "out" / "file"
    for opened in (lambda: atomic(link), lambda: files.open_own(link, "w")):
        link.symlink_to(elsewhere)
        with opened() as file:
            file.write("new\n")
        assert link.read_text() == "new\n" and not link.is_symlink()
        assert elsewhere.read_text() == "not ours\n"
        link.unlink()


@pytest.mark.parametrize(("mode", "expected"), [("a", "not ours\nnew\n"), ("r+", "new\nours\n")])
def test_what_is_continued_through_a_link_becomes_a_copy(
    tmp_path: Path, elsewhere: Path, mode: str, expected: str
):
    link = tmp_path / "out" / "file"
    link.symlink_to(elsewhere)
    with files.open_own(link, mode) as file:
        file.write("new\n")
    assert link.read_text() == expected and elsewhere.read_text() == "not ours\n"
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    with files.open_own(link, "a") as file:
        file.write("new\n")
    assert link.read_text() == "new\n" and not (tmp_path / "gone").exists()


def test_folders_that_lead_out_are_refused(tmp_path: Path, elsewhere: Path):
    out = tmp_path / "out"
    assert files.below(out, "ada/more/1.jpg").parent.is_dir()
    (out / "bob").symlink_to(elsewhere.parent)
    (out / "eve").symlink_to(out / "ada")
    assert files.below(out, "eve/1.jpg") == out / "eve" / "1.jpg"
    with pytest.raises(CheckpointError, match=r"bob leads out of .*out by a symbolic link"):
        files.below(out, "bob/1.jpg")


def test_standard_output_is_not_replaced(tmp_path: Path):
    code = "from pathlib import Path; from arcface_jax.runtime.files import write_atomic;"
    code += "write_atomic(Path('/dev/stdout'), 'x')"
    with (tmp_path / "redirected").open("w") as output:
        subprocess.run([sys.executable, "-c", code], stdout=output, check=True)
    assert (tmp_path / "redirected").read_text() == "x" and Path("/dev/stdout").is_symlink()


# ---- Folders that cannot be replaced -------------------------------------------------------------


def fill(path: Path) -> None:
    with atomic_folder(path) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")


def failing_renames(monkeypatch, path: Path, number: int) -> None:
    """Renames from and to a path fail as those of a mount point or of a forbidden folder do."""
    rename = Path.rename

    def refused(self, target):
        if path in (self, Path(target)):
            raise OSError(number, os.strerror(number), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)


def test_an_empty_mount_point_is_filled_and_another_stays(tmp_path: Path, monkeypatch):
    mount = tmp_path / "mount"
    mount.mkdir()
    failing_renames(monkeypatch, mount, errno.EBUSY)
    fill(mount)
    assert names(mount) == ["a", "b"] and (mount / "a").read_text() == "new"
    (mount / "a").write_text("old")
    with pytest.raises(OSError, match="not empty"):
        fill(mount)
    assert (mount / "a").read_text() == "old" and names(tmp_path) == ["mount"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EXDEV])
def test_a_folder_that_cannot_be_moved_into_place_is_an_error(tmp_path: Path, monkeypatch, number):
    target = tmp_path / "target"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(number)):
        failing_renames(patch, target, number)
        fill(target)
    assert names(tmp_path) == []
    target.mkdir()
    (target / "old").write_text("x")
    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(number)):
        failing_renames(patch, target, number)
        fill(target)
    assert names(tmp_path) == ["target"] and names(target) == ["old"]


def test_the_old_folder_returns_if_the_new_one_cannot_take_its_place(tmp_path: Path, monkeypatch):
    target, rename = tmp_path / "target", Path.rename
    target.mkdir()
    (target / "old").write_text("x")

    def refused(self, to):
        if to == target and self.parent == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fill(target)
    assert names(tmp_path) == ["target"] and names(target) == ["old"]


def test_a_folder_that_appears_in_the_meantime_stays(tmp_path: Path, monkeypatch):
    target, rename = tmp_path / "target", Path.rename

    def late(self, to):
        target.mkdir()
        (target / "theirs").write_text("x")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)
    fill(target)
    assert names(tmp_path) == ["target"] and names(target) == ["theirs"]


def test_the_working_directory_is_filled(tmp_path: Path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fill(Path())
    assert os.listdir() and names(Path.cwd()) == ["a", "b"] and names(tmp_path) == ["here"]
    with pytest.raises(OSError, match="not empty"):
        fill(Path())
