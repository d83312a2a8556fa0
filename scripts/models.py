"""Prints every network with its size and its cost for one image.

python scripts/models.py
"""

import json

import tyro
from rich.console import Console
from rich.table import Table

from arcface_jax.machine import cost
from arcface_jax.models import registry


def main(embedding_size: int = 512) -> None:
    """The command.

    Args:
      embedding_size: Length of the embedding.
    """
    table = Table("network", "M parameters", "GMAC")
    result = {}
    for network in registry.NETWORKS:
        found = cost.measure(network, embedding_size=embedding_size)
        table.add_row(network, f"{found.parameters / 1e6:.2f}", f"{found.macs / 1e9:.2f}")
        result[network] = found._asdict()
    Console().print(table)
    print("GMAC: multiply-accumulates of convolutions, linear layers and attention, one image")
    print("RESULT " + json.dumps({**result, "files": []}))


if __name__ == "__main__":
    tyro.cli(main, prog="models.py", description=__doc__)
