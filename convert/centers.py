"""`python -m convert.centers` in a checkout."""

import sys

if __name__ == "__main__":
    from arcface_jax.commands import imports

    sys.exit(imports.centers(sys.argv[1:], prog="python -m convert.centers"))
else:
    from convert import moved

    sys.modules[__name__] = moved("centers")
