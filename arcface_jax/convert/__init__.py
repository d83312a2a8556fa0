"""Import and export of weights: torch, ONNX, StableHLO, safetensors. The only package that imports
torch.
"""
