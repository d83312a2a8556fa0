"""Between arcface_jax and PyTorch: twins of the networks, weights both ways, parity checks."""
