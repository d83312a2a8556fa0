"""What a run writes: metrics.jsonl across resumption, TensorBoard, the clock, the terminal."""

import json
import math
import struct
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from arcface_jax.commands import Result, command
from arcface_jax.errors import CheckpointError
from arcface_jax.evaluation.report import plots
from arcface_jax.runtime import files, metrics
from arcface_jax.runtime.console import Terminal
from arcface_jax.runtime.metrics import MetricsFile
from arcface_jax.runtime.profiling import Clock


def written(workdir: Path) -> list[dict[str, float]]:
    """metrics.jsonl, strictly: every line must be whole."""
    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def log(workdir: Path, *, start: int, steps: range, loss: float = 1.0) -> None:
    file = MetricsFile(workdir, start=start, tensorboard=False)
    for step in steps:
        file.write(step, {"train/loss": loss})
    file.close()


def events(folder: Path) -> list[Event]:
    """All events: records of <u64 length> <u32 checksum> data <u32 checksum>, oldest file first."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    return [
        (value.tag, event.step, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
    ]


def test_each_write_is_one_line_that_is_on_disk_at_once(tmp_path: Path):
    file = MetricsFile(tmp_path, start=0, tensorboard=False)
    assert written(tmp_path) == []
    file.write(10, {"train/loss": 0.1, "train/lr": 1e-5})
    assert written(tmp_path) == [{"step": 10, "train/loss": 0.1, "train/lr": 1e-5}]
    file.write(20, {"eval/lfw/accuracy": 1.0})
    assert written(tmp_path)[1] == {"step": 20, "eval/lfw/accuracy": 1.0}
    file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_lines_behind_the_resumed_step_are_dropped(tmp_path: Path):
    log(tmp_path, start=0, steps=range(10, 60, 10), loss=1.0)
    log(tmp_path, start=30, steps=range(40, 70, 10), loss=2.0)
    assert [(line["step"], line["train/loss"]) for line in written(tmp_path)] == [
        (10, 1),
        (20, 1),
        (30, 1),
        (40, 2),
        (50, 2),
        (60, 2),
    ]


def test_a_run_that_starts_anew_keeps_what_was_logged_before_its_first_step(tmp_path: Path):
    log(tmp_path, start=0, steps=range(0, 30, 10))
    MetricsFile(tmp_path, start=0, tensorboard=False).close()
    assert [line["step"] for line in written(tmp_path)] == [0]


@pytest.mark.parametrize("cut", [1, 2, 7, 20, 38, 39])
def test_a_half_written_last_line_is_left_out_and_the_next_is_whole(tmp_path: Path, cut: int):
    log(tmp_path, start=0, steps=range(10, 40, 10), loss=0.123456789)
    path = tmp_path / "metrics.jsonl"
    line = len('{"step": 30, "train/loss": 0.123456789}\n')
    assert line == 40
    path.write_text(path.read_text()[:-cut])
    steps = [10, 20, 30] if cut == 1 else [10, 20]  # with nothing but its end lost, it is whole
    assert [line["step"] for line in metrics.read(path)] == steps
    log(tmp_path, start=30, steps=range(40, 50, 10))
    assert [line["step"] for line in written(tmp_path)] == [*steps, 40]


def test_a_history_that_cannot_be_rewritten_is_left_as_it_is(tmp_path: Path):
    log(tmp_path, start=0, steps=range(10, 40, 10))
    before = written(tmp_path)
    files.part_of(tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}: Is a directory"):
        MetricsFile(tmp_path, start=10, tensorboard=False)
    assert written(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}/missing: No such file"):
        MetricsFile(tmp_path / "missing", start=0, tensorboard=False)
    (tmp_path / "tensorboard").touch()
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}: (File|Not a dir)"):
        MetricsFile(tmp_path, start=0, tensorboard=True)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path):
    file = MetricsFile(tmp_path, start=0, tensorboard=True)
    file.write(10, {"train/loss": 0.5, "train/lr": 0.25})
    file.write(20, {"eval/lfw/accuracy": 0.75})
    file.close()
    assert scalars(tmp_path / "tensorboard") == [
        ("train/loss", 10, 0.5),
        ("train/lr", 10, 0.25),
        ("eval/lfw/accuracy", 20, 0.75),
    ]


def test_a_resumed_run_tells_tensorboard_from_where_to_forget(tmp_path: Path):
    for start, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        file = MetricsFile(tmp_path, start=start, tensorboard=True)
        for step in steps:
            file.write(step, {"train/loss": float(start)})
        file.close()
        newest = max((tmp_path / "tensorboard").iterdir())
        # File names carry whole seconds: keep the second file apart, and behind the first.
        newest.rename(newest.with_name(f"events.{start:02d}"))
    starts = [e for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert [(e.session_log.status, e.step) for e in starts] == [(1, 1), (1, 21)]
    assert scalars(tmp_path / "tensorboard")[3:] == [("train/loss", 30, 20), ("train/loss", 40, 20)]


class Time:
    """Stands in for time.perf_counter."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_the_clock_counts_images_and_waits_and_leaves_pauses_out(now: Time):
    clock = Clock(global_batch_size=32)
    for _ in range(4):
        with clock.waiting():
            now.now += 0.5
        now.now += 1.25
        with clock.blocked():
            now.now += 0.25
        clock.count_step()
    with clock.paused():
        now.now += 1000
    assert clock.read() == pytest.approx(
        {
            "perf/images_per_sec": 4 * 32 / 8,
            "perf/steps_per_sec": 4 / 8,
            "perf/data_wait_ms": 500,
            "perf/data_wait_share": 0.25,
            "perf/host_ms": 1750,
        }
    )


def test_a_reading_begins_the_next(now: Time):
    clock = Clock(global_batch_size=10)
    with clock.waiting(), clock.paused():
        now.now += 7
    clock.count_step()
    clock.read()
    now.now += 2
    clock.count_step()
    values = clock.read()
    assert values["perf/images_per_sec"] == 5
    assert values["perf/data_wait_ms"] == 0
    now.now += 3
    clock.restart()
    now.now += 1
    clock.count_step()
    assert clock.read()["perf/images_per_sec"] == 10


def test_without_a_step_there_is_nothing_to_read(now: Time):
    clock = Clock(global_batch_size=10)
    assert clock.read() == {}
    now.now += 1
    assert clock.read() == {}
    clock.count_step()  # in no time at all
    assert clock.read() == {}


def test_the_clock_runs_in_seconds():
    begin = time.perf_counter()
    clock = Clock(global_batch_size=100)
    with clock.waiting():
        time.sleep(0.02)
    with clock.paused():
        time.sleep(0.02)
    clock.count_step()
    values = clock.read()
    whole = time.perf_counter() - begin
    assert 20 <= values["perf/data_wait_ms"] <= 1e3 * whole
    assert 100 / (whole - 0.02) <= values["perf/images_per_sec"] <= 100 / 0.02
    assert 0 < values["perf/data_wait_share"] <= 1


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_terminal_each_log_step_is_a_plain_line_on_stderr(no_terminal, capsys):
    terminal = Terminal(total_steps=1000, start=0)
    terminal.print("r50 on 8 x cpu [bold] " + "x" * 300)
    terminal.advance()
    values = {"train/loss": 12.3456, "train/accuracy": 0.25}
    terminal.show(10, values)
    speed = {"perf/images_per_sec": 1234.5, "perf/data_wait_share": 0.07, "perf/steps_per_sec": 4.0}
    terminal.show(20, values | speed)
    terminal.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "r50 on 8 x cpu [bold] " + "x" * 300,
        "step 10/1000  loss 12.346  acc 0.250",
        "step 20/1000  loss 12.346  acc 0.250  1234 img/s  data wait 7%  4:05 left",
    ]


def test_on_a_terminal_a_bar_goes_along_and_lines_stay_above_it(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal(total_steps=50, start=20)
    terminal.advance()
    terminal.show(21, {"train/loss": 1.5, "train/accuracy": 0.5})
    terminal.print("lfw accuracy 0.9000")
    terminal.close()
    err = capsys.readouterr().err
    assert "step 20/50" in err and "step 21/50" in err
    assert "loss 1.500  acc 0.500" in err
    assert "lfw accuracy 0.9000\n" in err


def test_numbers_that_are_not_finite_are_null_and_come_back_as_nan(tmp_path: Path):
    file = MetricsFile(tmp_path, start=0, tensorboard=False, csv=True)
    file.write(1, {"train/loss": math.nan, "train/lr": math.inf, "train/accuracy": 0.5})
    file.close()
    log(tmp_path, start=1, steps=range(0))  # resumed: the line is read and written again

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=refuse)
    assert first == {"step": 1, "train/loss": None, "train/lr": None, "train/accuracy": 0.5}
    line = metrics.read(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(line["train/loss"]) and line["train/accuracy"] == 0.5
    assert plots.training_curves(tmp_path) == tmp_path / "eval" / "curves.png"


def test_a_result_line_is_json_whatever_was_measured(capsys):
    @command
    def measure() -> Result:
        return Result({"eval/x": math.nan, "bounds": (1.0, -math.inf), "file": Path("a")})

    assert measure() == 0
    text = capsys.readouterr().out.removeprefix("RESULT ")
    assert "NaN" not in text and "Infinity" not in text
    found = json.loads(text)
    assert found["eval/x"] is None and found["bounds"] == [1.0, None] and found["file"] == "a"
