"""Model the minimum time of a GPU's program, by part; nothing is timed.

A kernel takes the longest of three times: a launch, its memory traffic, its products. The shares of
the data sheet's figures are assumptions, which `Assumptions.lines` prints.
"""

from typing import NamedTuple

from arcface_jax.errors import UserError
from arcface_jax.machine import gpu, hlo, peaks
from arcface_jax.machine.hlo import Collective, Kernel, Part

# Bytes per second that a GPU sends to the others of its host: half of the bidirectional figure in
# data sheets. The L40S has PCIe 4.0 x16 and no NVLink.
_LINKS = {"a100": 300e9, "h100": 450e9, "h200": 450e9, "b200": 900e9, "l40s": 32e9}
# FLOP/s of the FP32 units, from data sheets.
_FLOAT32 = {"a100": 19.5e12, "h100": 67e12, "h200": 67e12, "b200": 75e12, "l40s": 91.6e12}
_NETWORK = 400e9 / 8


class Assumptions(NamedTuple):
    """Assumptions of the model for one kind of GPU."""

    gpu: gpu.Target
    peak: float
    """FLOP/s of 16-bit products, from the data sheet."""
    peak_float32: float
    link: float
    """Bytes per second that a device sends to its neighbors."""
    bandwidth_share: float = 0.85
    """Achieved share of the memory bandwidth."""
    peak_share: float = 0.45
    """Achieved share of the peak."""
    link_share: float = 0.8
    """Achieved share of the link's bandwidth."""
    launch: float = 2.5e-6
    """Minimum seconds of a kernel."""
    l2_share: float = 0.6
    """Share of the L2 cache that the head's loops can use; data that fits is read from there."""
    l2_speed: float = 1.93
    """Speed of the L2 cache relative to the memory bandwidth."""
    latency: float = 20e-6
    """Minimum seconds of a collective."""

    def lines(self) -> list[str]:
        """Describes the assumptions of the model."""
        return [
            "modeled, not measured (an H100 took 0.89 to 1.10 times as long for five programs): "
            f"each kernel takes the longest of {1e6 * self.launch:g} us, its "
            f"HBM traffic at {self.bandwidth_share:.0%} of {self.gpu.bandwidth / 1e12:.2f} TB/s, "
            f"and its FLOPs at {self.peak_share:.0%} of the peak ({self.peak / 1e12:.0f} TFLOP/s "
            f"in 16 bits, {self.peak_float32 / 1e12:.3g} in float32)",
            f"kernels of the head's loops that touch less than {self.l2_share:.0%} of the "
            f"{self.gpu.l2 / 2**20:.0f} MiB of L2 run at {self.l2_speed:g} x HBM bandwidth; "
            f"collectives form a ring at {self.link_share:.0%} of {self.link / 1e9:.0f} GB/s a "
            "GPU and overlap with concurrently scheduled kernels",
        ]


class PartTime(NamedTuple):
    """One part of a step."""

    kernels: int
    bytes: int
    flops: int
    seconds: float
    """Modelled seconds."""


class Roofline(NamedTuple):
    """A program's modeled time."""

    parts: dict[Part, PartTime]
    """Times by part, without collectives."""
    collectives: float
    """Seconds of all collectives."""
    exposed: float
    """Seconds of collectives that no concurrent kernel hides."""
    assumptions: Assumptions

    @property
    def seconds(self) -> float:
        """Modelled seconds of a step."""
        return sum(part.seconds for part in self.parts.values()) + self.exposed


def assume(name: str, *, devices: int) -> Assumptions:
    """Returns the assumptions about a GPU.

    Raises:
      UserError: the GPU's peak is not known.
    """
    target = gpu.target(name)
    peak = peaks.peak(target.device_kind, "bfloat16")
    if peak is None:
        raise UserError(f"the peak of {target.device_kind} is unknown: add it to machine/peaks.py")
    link = _LINKS[name] if devices <= gpu.GPUS_A_HOST else min(_NETWORK, _LINKS[name])
    return Assumptions(target, peak, _FLOAT32[name], link)


def estimate(module: hlo.Module, assumptions: Assumptions, *, devices: int) -> Roofline:
    """Models the time of one call of a program on each of `devices` GPUs."""
    parts = {}
    for part in hlo.PARTS:
        kernels = [k for k in module.kernels if k.part == part and k.kind != "collective"]
        seconds = sum(k.runs * kernel_seconds(k, assumptions) for k in kernels)
        parts[part] = PartTime(*hlo.total(kernels), seconds)
    found = {c.name: c for c in module.collectives}
    times = {n: c.runs * collective_seconds(c, assumptions, devices) for n, c in found.items()}
    exposed = sum(max(0.0, times[n] - covered(module, n, assumptions)) for n in found)
    return Roofline(parts, sum(times.values()), exposed, assumptions)


def kernel_seconds(kernel: Kernel, assumptions: Assumptions) -> float:
    """Models one run of a kernel."""
    speed = assumptions.bandwidth_share * assumptions.gpu.bandwidth
    if kernel.part == "head" and kernel.loops:
        in_cache = kernel.bytes < assumptions.l2_share * assumptions.gpu.l2
        speed *= assumptions.l2_speed if in_cache else 1
    peak = assumptions.peak_float32 if kernel.dtype == "f32" else assumptions.peak
    products = kernel.flops / (peak * assumptions.peak_share)
    return max(assumptions.launch, kernel.bytes / speed, products)


def collective_seconds(collective: Collective, assumptions: Assumptions, devices: int) -> float:
    """Models one run of a collective over a ring (Patarasuk and Yuan, JPDC 2009)."""
    return assumptions.latency + sent_bytes(collective, devices) / (
        assumptions.link * assumptions.link_share
    )


def sent_bytes(collective: Collective, devices: int) -> float:
    """Returns the bytes that a device of a ring sends per run."""
    share = (devices - 1) / devices
    return collective.bytes * share * (2 if collective.kind == "all-reduce" else 1)


def covered(module: hlo.Module, name: str, assumptions: Assumptions) -> float:
    """Returns the modeled seconds of kernels scheduled between a collective's start and end."""
    seconds, running = 0.0, False
    for item in module.schedule:
        if isinstance(item, hlo.Done):
            if item.start == name:
                return seconds
        elif isinstance(item, Kernel):
            if running and item.kind != "collective":
                seconds += item.runs * kernel_seconds(item, assumptions)
            running = running or item.name == name
    return 0.0  # it ends where it starts
