"""`python -m convert.from_torch` in a checkout."""

import sys

if __name__ == "__main__":
    from arcface_jax.commands import imports

    sys.exit(imports.torch(sys.argv[1:], prog="python -m convert.from_torch"))
else:
    from convert import moved

    sys.modules[__name__] = moved("from_torch")
