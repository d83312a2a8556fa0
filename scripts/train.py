"""`arcface-jax train` in a checkout: python scripts/train.py --help."""

import sys
from functools import partial

from arcface_jax.commands import train

main = partial(train.main, prog="train.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], own_process=True))
