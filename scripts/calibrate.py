"""`arcface-jax calibrate` in a checkout: python scripts/calibrate.py --help."""

import sys
from functools import partial

from arcface_jax.commands import calibrate

main = partial(calibrate.main, prog="calibrate.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
