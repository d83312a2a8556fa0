"""`arcface-jax doctor` in a checkout: python scripts/doctor.py --help."""

import sys
from functools import partial

from arcface_jax.commands import doctor

main = partial(doctor.main, prog="doctor.py")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
