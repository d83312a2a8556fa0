"""What `scripts/benchmark.py` measures: time and memory, as ratios within one run."""
