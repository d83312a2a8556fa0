"""`python -m convert.to_onnx` in a checkout."""

import sys

if __name__ == "__main__":
    from arcface_jax.commands import export

    sys.exit(export.onnx(sys.argv[1:], prog="python -m convert.to_onnx"))
else:
    from convert import moved

    sys.modules[__name__] = moved("to_onnx")
