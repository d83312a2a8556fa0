"""`arcface-jax ijb` in a checkout: python scripts/evaluate_ijb.py --help."""

import sys
from functools import partial

from arcface_jax.commands import ijb

main = partial(ijb.main, prog="evaluate_ijb.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
