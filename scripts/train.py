"""`arcface-jax train` in a checkout: python scripts/train.py --help."""

import sys
from collections.abc import Sequence

from arcface_jax import cli


def main(words: Sequence[str], *, own_process: bool = False) -> int:
    """Trains, and returns the exit code."""
    from arcface_jax.commands import train

    return train.main(words, prog="train.py", own_process=own_process)


if __name__ == "__main__":
    cli.prepare_process()
    sys.exit(main(sys.argv[1:], own_process=True))
