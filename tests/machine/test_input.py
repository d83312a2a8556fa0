"""The bench of the input: every stage is measured, and the slowest is named."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from witness import encode, smooth

from arcface_jax.commands import data
from arcface_jax.errors import UserError
from arcface_jax.machine import input
from arcface_jax.machine.input import Rate


@pytest.mark.slow
def test_every_stage_is_measured_beside_the_bare_loops():
    result = data.bench("synthetic", workers=(0,), batch_size=16, rounds=1, seconds=0.1)
    rates = {rate["stage"]: rate for rate in result["rates"]}
    assert list(rates) == ["bare decode", "read", "decode", "pipeline", "to device"]
    assert all(rate["images_per_second"] > 0 for rate in rates.values())
    assert rates["bare decode"]["of_bare"] == 1
    expected = rates["pipeline"]["images_per_second"] / rates["bare decode"]["images_per_second"]
    assert abs(rates["pipeline"]["of_bare"] - expected) < 1e-9


@pytest.fixture
def no_bare_loops(monkeypatch):
    """Without processes, which take seconds to start."""

    @contextmanager
    def loops(encoded, seconds):
        assert encoded
        yield lambda: 100.0

    monkeypatch.setattr(input, "_bare_loops", loops)


def test_a_damaged_image_is_counted_and_ends_nothing(no_bare_loops, tmp_path: Path, capsys):
    for number in range(6):
        path = tmp_path / str(number % 2) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(smooth(number)))
    (tmp_path / "1" / "3.png").write_bytes(encode(smooth(3))[:200])
    result = data.bench(str(tmp_path), workers=(0,), batch_size=4, rounds=1, seconds=0.02)
    assert (result["damaged"], result["sampled"]) == (1, 6)
    assert "1 of 6 sampled images are damaged and were skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rounds", "0"], "--rounds 0 must be 1 or more"),
        (["--seconds", "0"], "--seconds 0 must be above 0"),
        (["--seconds", "nan"], "--seconds nan must be above 0"),
        (["--workers"], "--workers is empty"),
        (["--batch-size", "1000000"], "fewer than one batch of 1000000: use --batch-size"),
    ],
)
def test_bad_options_are_one_message(no_bare_loops, capsys, words: list[str], named: str):
    with pytest.raises(SystemExit) as stop:
        data.main(["bench", "synthetic", *words])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert named in message and "--data." not in message


def test_a_dead_decode_loop_is_an_error(monkeypatch):
    monkeypatch.setattr(input, "_decode_loop", print)  # it ends at once
    with (
        input._bare_loops([b"x"], 0.1) as bare,
        pytest.raises(UserError, match=r"bare decode loops died \(exit code 0, 0\)"),
    ):
        bare()


def rates(read: float, decode: float, pipeline: float, sent: float) -> list[Rate]:
    stages = {"read": read, "decode": decode, "pipeline": pipeline, "to device": sent}
    return [Rate(name, 0, 1, rate, rate / 100) for name, rate in stages.items()]


def test_the_bottleneck_is_named():
    assert "decoding is the bottleneck" in input.bottleneck(rates(1000, 60, 90, 89))
    assert "reading is the bottleneck" in input.bottleneck(rates(80, 60, 90, 89))
    assert "copying to the device is the bottleneck" in input.bottleneck(rates(1000, 60, 90, 30))
