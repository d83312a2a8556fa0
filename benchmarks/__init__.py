"""Benchmarks of `python -m benchmarks`: time and memory, as ratios within one run."""
