"""Tools of `arcface-jax data`: inspect, pack, split, merge, align, and make pairs."""
