"""`python -m convert.from_torch` in a checkout."""

import sys

from arcface_jax.convert import from_torch

if __name__ == "__main__":
    sys.exit(from_torch.main(sys.argv[1:]))
else:
    from convert import moved

    sys.modules[__name__] = moved("from_torch")
