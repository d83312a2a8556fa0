"""Weights in and out: torch, ONNX, StableHLO, safetensors. The one package that imports torch."""
