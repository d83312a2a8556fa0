"""What `python -m benchmarks` measures: time and memory, as ratios within one run."""
