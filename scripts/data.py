"""`arcface-jax data` in a checkout: python scripts/data.py --help."""

import sys
from functools import partial

from arcface_jax.commands import data

main = partial(data.main, prog="data.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
