"""`python -m convert.to_torch` in a checkout."""

import sys

from arcface_jax.convert import to_torch

if __name__ == "__main__":
    sys.exit(to_torch.main(sys.argv[1:]))
else:
    from convert import moved

    sys.modules[__name__] = moved("to_torch")
