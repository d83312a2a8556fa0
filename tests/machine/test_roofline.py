"""The modeled time of a program, against sums made by hand."""

from pathlib import Path

import pytest

from arcface_jax.machine import gpu, hlo, roofline

PROGRAMS = Path(__file__).parent / "programs"


def assumed(devices: int = 1) -> roofline.Assumptions:
    return roofline.assume("h100", devices=devices)


def test_a_kernel_takes_the_longest_of_launch_traffic_and_products():
    base = hlo.parse((PROGRAMS / "elementwise.hlo").read_text()).kernels[0]
    bandwidth = 0.85 * 3352e9
    assert roofline.kernel_seconds(base, assumed()) == pytest.approx(12 * 2**20 / bandwidth)
    small = base._replace(read=0, written=4)
    assert roofline.kernel_seconds(small, assumed()) == 2.5e-6
    product = base._replace(flops=10**12, dtype="bf16")
    assert roofline.kernel_seconds(product, assumed()) == pytest.approx(1e12 / (0.45 * 989e12))
    exact = product._replace(dtype="f32")
    assert roofline.kernel_seconds(exact, assumed()) == pytest.approx(1e12 / (0.45 * 67e12))


def test_what_the_heads_loops_touch_within_the_cache_comes_from_there():
    base = hlo.parse((PROGRAMS / "elementwise.hlo").read_text()).kernels[0]
    base = base._replace(read=20 * 2**20)
    inside = base._replace(part="head", loops=("while",))
    seconds = [roofline.kernel_seconds(kernel, assumed()) for kernel in (base, inside)]
    assert seconds[0] / seconds[1] == pytest.approx(1.93)
    large = inside._replace(read=60 * 2**20)  # beyond 60 % of 50 MiB
    assert roofline.kernel_seconds(large, assumed()) > 60 * 2**20 / (0.86 * 3352e9)


def test_collectives_form_a_ring_and_kernels_beside_them_hide_them():
    text = """HloModule hand
ENTRY %main () -> f32[] {
  %x = f32[25000000]{0} parameter(0)
  %a = f32[25000000]{0} all-reduce-start(%x), to_apply=%add
  %c = f32[25000000]{0} copy(%x)
  %d = f32[25000000]{0} all-reduce-done(%a)
  ROOT %e = f32[25000000]{0} copy(%d)
}
"""
    found = roofline.estimate(hlo.parse(text), assumed(8), devices=8)
    ring = 20e-6 + 2 * 7 / 8 * 100e6 / (0.8 * 450e9)
    copy = 200e6 / (0.85 * 3352e9)
    assert found.collectives == pytest.approx(ring)
    assert found.exposed == pytest.approx(ring - copy)
    assert found.seconds == pytest.approx(2 * copy + ring - copy)
    hosts = roofline.assume("h100", devices=16)
    assert hosts.link == 50e9  # 400 Gb/s between hosts


@pytest.mark.parametrize("name", gpu.NAMES)
def test_each_gpu_has_assumptions_that_are_stated(name: str):
    found = roofline.assume(name, devices=8)
    lines = " ".join(found.lines())
    assert f"{found.peak / 1e12:.0f} TFLOP/s" in lines and "not measured" in lines
    assert found.peak > found.peak_float32 and found.link > 1e9
