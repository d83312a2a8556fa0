"""Peak speed of GPUs: products of 16-bit numbers, without sparsity, from data sheets."""

import re

# Patterns for the whole `device_kind`, as the CUDA driver spells it; others with the same beginning
# may be other cards (L4 and L40), or a part of one (MIG). FLOP/s.
_PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA A100(-(SXM4|SXM|PCIE)-\d+GB| \d+GB PCIe)": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak(device_kind: str, dtype: str) -> float | None:
    """Returns a device's peak in FLOP/s; None if unknown, as for float32 and for CPUs."""
    if dtype == "float32":
        return None
    return next((x for pattern, x in _PEAKS.items() if re.fullmatch(pattern, device_kind)), None)
