"""`arcface-jax models` in a checkout: python scripts/models.py --help."""

import sys
from functools import partial

from arcface_jax.commands import models

main = partial(models.main, prog="models.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
