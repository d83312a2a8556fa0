"""`python -m arcface_jax`: the same as `arcface-jax`."""

import sys

from arcface_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
