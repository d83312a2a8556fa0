"""`arcface-jax protocol` in a checkout: python scripts/evaluate_protocol.py --help."""

import sys
from functools import partial

from arcface_jax.commands import protocol

main = partial(protocol.main, prog="evaluate_protocol.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
