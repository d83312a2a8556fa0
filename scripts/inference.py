"""`arcface-jax embed` and `verify` as one command: python scripts/inference.py --help."""

import sys
from functools import partial

from arcface_jax.commands import embed

main = partial(embed.inference, prog="inference.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
