"""Print every network with its size and its cost per image.

arcface-jax models
"""

from collections.abc import Sequence
from dataclasses import dataclass

from arcface_jax.commands import Result, command, console
from arcface_jax.config import command_line


@dataclass(frozen=True)
class Arguments:
    """Options of `models`."""

    embedding_size: int = 512
    """Length of the embedding."""


@command
def main(words: Sequence[str] = (), *, prog: str = "arcface-jax models") -> Result:
    """Prints the table of networks."""
    arguments = command_line.parse(
        Arguments, words, prog=prog, description=__doc__ or "", options_only=True
    )
    from arcface_jax.machine import cost
    from arcface_jax.models import registry
    from arcface_jax.runtime import tables

    table = tables.new(None, ["M parameters", "GMAC"], names=["network"])
    values = {}
    for network in registry.NETWORKS:
        found = cost.measure(network, embedding_size=arguments.embedding_size)
        table.add_row(network, f"{found.parameters / 1e6:.2f}", f"{found.macs / 1e9:.2f}")
        values[network] = found._asdict()
    console().print(table)
    print("GMAC: multiply-accumulates of convolutions, linear layers and attention, one image")
    return Result(values)
