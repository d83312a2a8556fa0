"""`arcface-jax evaluate` in a checkout: python scripts/evaluate.py --help."""

import sys
from functools import partial

from arcface_jax.commands import evaluate

main = partial(evaluate.main, prog="evaluate.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
