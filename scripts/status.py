"""`arcface-jax status` in a checkout: python scripts/status.py --help."""

import sys
from functools import partial

from arcface_jax.commands import status

main = partial(status.main, prog="status.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
