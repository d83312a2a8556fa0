"""The bench of the input: every stage is measured, and the slowest is named."""

import pytest

from arcface_jax.commands import data
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


def rates(read: float, decode: float, pipeline: float, sent: float) -> list[Rate]:
    stages = {"read": read, "decode": decode, "pipeline": pipeline, "to device": sent}
    return [Rate(name, 0, 1, rate, rate / 100) for name, rate in stages.items()]


def test_the_bottleneck_is_named():
    assert "decoding is the bottleneck" in input.bottleneck(rates(1000, 60, 90, 89))
    assert "reading is the bottleneck" in input.bottleneck(rates(80, 60, 90, 89))
    assert "copying to the device is the bottleneck" in input.bottleneck(rates(1000, 60, 90, 30))
