"""`python scripts/benchmark.py ...` is `python -m benchmarks ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.__main__ import app

if __name__ == "__main__":
    app.cli(prog="benchmark.py", description="Measure parts of the system; docs/benchmarks.md.")
