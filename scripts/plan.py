"""`arcface-jax plan` in a checkout: python scripts/plan.py --help."""

import sys
from functools import partial

from arcface_jax.commands import plan

main = partial(plan.main, prog="plan.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
