"""`arcface-jax COMMAND`: finds the command's module and passes it the remaining arguments.

Importing this module, and parsing any command line, imports neither JAX nor OpenCV.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import arcface_jax
from arcface_jax import errors

PROG = "arcface-jax"


class Command(NamedTuple):
    """Location of a command, and a one-line description."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "demo": Command("train", "demo", "train on synthetic faces, without any download"),
    "train": Command("train", "main", "train a recipe, or resume a run"),
    "status": Command("status", "main", "what a run does: step, last save, metrics, disk"),
    "evaluate": Command("evaluate", "main", "verification on pairs: accuracy, ROC, TAR@FAR"),
    "ijb": Command("ijb", "main", "IJB-B and IJB-C: 1:1 and 1:N"),
    "protocol": Command("protocol", "main", "rank retrieval, groups of people, all-to-all"),
    "calibrate": Command("calibrate", "main", "find the threshold for a false accept rate"),
    "verify": Command("embed", "verify", "compare two images"),
    "embed": Command("embed", "embed", "embed an image or a folder"),
    "gallery": Command("gallery", "main", "save embeddings, and find the most similar faces"),
    "data": Command("data", "main", "inspect, convert, split, merge, align training sets"),
    "import": Command("imports", "main", "PyTorch weights or class centers to this project"),
    "export": Command(
        "export", "main", "a network to PyTorch, ONNX, StableHLO, safetensors, a hub"
    ),
    "models": Command("models", "main", "networks with their sizes and costs"),
    "recipes": Command("recipes", "main", "list recipes, or copy one to edit"),
    "plan": Command("plan", "main", "memory that a run needs on each device"),
    "doctor": Command("doctor", "main", "check this machine for a recipe"),
    "notebooks": Command("notebooks", "main", "list the notebooks, or copy them"),
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names; returns its exit code.

    Args:
      words: the command line after the program's name; by default this process's, in which case
        `train` may restart the process.
    """
    own_process = words is None
    words = sys.argv[1:] if words is None else list(words)
    first = words[0] if words else ""
    if first in ("-h", "--help"):
        print(_help())
        return 0
    if first == "--version":
        print(f"{PROG} {arcface_jax.__version__}")
        return 0
    if first not in COMMANDS:
        with errors.reported():
            raise errors.UserError(errors.unknown(first, COMMANDS, prog=PROG))
    found = COMMANDS[first]
    training = found.module == "train"
    if training and own_process:
        prepare_process()
    options = {"own_process": own_process} if training else {}
    with errors.reported():
        module = importlib.import_module(f"arcface_jax.commands.{found.module}")
        return getattr(module, found.function)(words[1:], prog=f"{PROG} {first}", **options)


def prepare_process() -> None:
    """Makes the process outlive the reader of its output, and note signals until it can stop.

    For a process that only trains; call it before the slow imports.
    """
    from arcface_jax.runtime import signals, streams

    signals.remember()
    streams.outlive_readers()


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [OPTIONS]",
            "",
            "Face recognition training in JAX: train, evaluate, deploy.",
            "",
            *(f"  {name:{width}}  {found.summary}" for name, found in COMMANDS.items()),
            "",
            f"  {PROG} COMMAND --help   options of a command",
            f"  {PROG} --version",
        ]
    )
