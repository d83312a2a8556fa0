"""`python -m convert.centers` in a checkout."""

import sys

from arcface_jax.convert import centers

if __name__ == "__main__":
    sys.exit(centers.main(sys.argv[1:]))
else:
    from convert import moved

    sys.modules[__name__] = moved("centers")
