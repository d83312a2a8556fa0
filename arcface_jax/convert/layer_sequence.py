"""Represent a network as a sequence of layers with weights, in an order set by its structure.

Two descriptions of a network, an ONNX graph and a torch module, have the same sequence, whatever
the names of nodes and arrays and their order in the file: each is a graph of layers, read backwards
from the output. If two branches are added, the deeper one comes first. Operations without weights
are not layers; all their inputs have to come from one layer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["conv", "linear", "norm", "batchnorm", "prelu", "table", "activation"]
"""norm is LayerNorm; table is an array that is added to every image, such as position
embeddings."""


class Layer(NamedTuple):
    """A layer; its weights are arrays for a file, and names for a torch module."""

    kind: Kind
    shape: tuple[int, ...]
    """Shape of the weight in torch's layout."""
    settings: tuple[Any, ...] = ()
    """Strides, padding and groups of a convolution; name and bounds of an activation."""
    weight: Any = None
    bias: Any = None
    batchnorm: Any = None
    """The BatchNorm that follows a conv or linear layer as its only reader."""
    where: str = ""
    """Node or module, for messages."""

    @property
    def form(self) -> tuple[Any, ...]:
        """The properties in which two descriptions of a layer have to agree."""
        return self.kind, self.shape, self.settings

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        settings = ", ".join(map(str, self.settings))
        return " ".join(filter(None, [self.kind, shape, f"({settings})" if settings else ""]))


Place = int
"""A layer, an addition of branches, or the input, in a `LayerGraph`."""
INPUT: Place = 0


@dataclass
class LayerGraph:
    """Layers and their inputs."""

    _layers: list[Layer | None] = field(default_factory=lambda: [None])
    _reads: list[tuple[Place, ...]] = field(default_factory=lambda: [()])
    _depths: list[int] = field(default_factory=lambda: [0])

    def layer(self, layer: Layer, reads: Place) -> Place:
        """Adds a layer that reads the output of another."""
        return self._add(layer, (reads,))

    def addition(self, reads: Sequence[Place]) -> Place:
        """Adds the sum of branches; a branch added to itself is the branch."""
        different = tuple(dict.fromkeys(reads))
        return different[0] if len(different) == 1 else self._add(None, different)

    def _add(self, layer: Layer | None, reads: tuple[Place, ...]) -> Place:
        self._layers.append(layer)
        self._reads.append(reads)
        self._depths.append(1 + max(self._depths[place] for place in reads))
        return len(self._layers) - 1

    def sequence(self, output: Place) -> list[Layer]:
        """Returns the layers that the output depends on, with biases and BatchNorms merged in."""
        order = self._order(output)
        readers = Counter(place for reader in order for place in self._reads[reader])
        found: list[Layer] = []
        positions: dict[Place, int] = {}
        for place in order:
            layer = self._layers[place]
            if layer is None:
                continue
            read = self._reads[place][0]
            before = positions.get(read, -1)
            merged = _merged(found[before], layer) if before >= 0 and readers[read] == 1 else None
            if merged:
                found[before] = merged
                positions[place] = before
            else:
                positions[place] = len(found)
                found.append(layer)
        return found

    def _order(self, output: Place) -> list[Place]:
        """Orders everything that the output depends on, inputs before their readers."""
        order, seen = [], set()
        stack = [(output, False)]
        while stack:
            place, is_done = stack.pop()
            if is_done:
                order.append(place)
            elif place not in seen:
                seen.add(place)
                stack.append((place, True))
                deeper_last = sorted(self._reads[place], key=lambda read: self._depths[read])
                stack += [(read, False) for read in deeper_last]
        return order


def _merged(before: Layer, layer: Layer) -> Layer | None:
    """Merges a layer with the one after it, if that is a part of it; otherwise returns None."""
    if layer.kind == "batchnorm" and before.kind in ("conv", "linear") and not before.batchnorm:
        return before._replace(batchnorm=layer.batchnorm)
    is_bias = layer.kind == "table" and len(layer.shape) == 1
    takes_bias = before.kind in ("conv", "linear", "norm")
    if is_bias and takes_bias and before.bias is None and not before.batchnorm:
        return before._replace(bias=layer.weight)
    return None
