"""`python -m convert.to_stablehlo` in a checkout."""

import sys

from arcface_jax.convert import to_stablehlo

if __name__ == "__main__":
    sys.exit(to_stablehlo.main(sys.argv[1:]))
else:
    from convert import moved

    sys.modules[__name__] = moved("to_stablehlo")
