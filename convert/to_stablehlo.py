"""`python -m convert.to_stablehlo` in a checkout."""

import sys

if __name__ == "__main__":
    from arcface_jax.commands import export

    sys.exit(export.stablehlo(sys.argv[1:], prog="python -m convert.to_stablehlo"))
else:
    from convert import moved

    sys.modules[__name__] = moved("to_stablehlo")
