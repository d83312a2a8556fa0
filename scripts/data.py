"""Looks at training sets, and turns one kind into another (docs/data.md).

python scripts/data.py {inspect,pack,to-tfds,merge,split,pairs,align,bench} ... [--help]
"""

import json
import sys
import time

import tyro

from arcface_jax import errors
from arcface_jax.commands import data as commands
from arcface_jax.machine import input as benchmark

COMMANDS = {
    "inspect": commands.inspect,
    "pack": commands.pack,
    "to-tfds": commands.to_tfds,
    "merge": commands.merge,
    "split": commands.split,
    "pairs": commands.pairs,
    "align": commands.align,
    "bench": benchmark.command,
}


def main(argv: list[str]) -> None:
    """The command."""
    begin = time.perf_counter()
    with errors.reported():
        result = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            args=argv,
            prog="data.py",
            description=__doc__,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    result |= {"seconds": round(time.perf_counter() - begin, 1)}
    print("RESULT " + json.dumps(result, default=str))


if __name__ == "__main__":
    main(sys.argv[1:])
