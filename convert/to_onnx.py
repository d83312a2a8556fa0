"""`python -m convert.to_onnx` in a checkout."""

import sys

from arcface_jax.convert import to_onnx

if __name__ == "__main__":
    sys.exit(to_onnx.main(sys.argv[1:]))
else:
    from convert import moved

    sys.modules[__name__] = moved("to_onnx")
