"""Peak speed of GPUs: products of 16-bit numbers, without sparsity, from data sheets."""

# The first match counts; `device_kind` as the CUDA driver spells it. FLOP/s.
_PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100": 312e12,
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
    return next((value for kind, value in _PEAKS.items() if device_kind.startswith(kind)), None)
