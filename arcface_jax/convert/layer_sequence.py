"""A network as the sequence of its layers with weights, in an order that its structure decides.

Two descriptions of one network, an ONNX graph and a torch module, give the same sequence, whatever
the nodes and arrays are called and in whatever order an exporter wrote them: each is a graph of
layers, read from the output backwards. Where two branches are added, the deeper one comes first.
Operations without weights are not layers; all that they read has to come from one layer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["conv", "linear", "norm", "batchnorm", "prelu", "table", "activation"]
"""norm is LayerNorm, table an array that is added to every image, as positions of tokens are."""


class Layer(NamedTuple):
    """A layer; its weights are arrays for a file, and names for a torch module."""

    kind: Kind
    shape: tuple[int, ...]
    """Of the weight, as torch has it."""
    settings: tuple[Any, ...] = ()
    """Of a convolution strides, padding and groups; of an activation its name and bounds."""
    weight: Any = None
    bias: Any = None
    batchnorm: Any = None
    """Of the BatchNorm that follows a conv or linear and reads nothing else."""
    where: str = ""
    """The node or module, for messages."""

    @property
    def form(self) -> tuple[Any, ...]:
        """What two descriptions of one layer agree in."""
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
    """Layers and what each reads."""

    _layers: list[Layer | None] = field(default_factory=lambda: [None])
    _reads: list[tuple[Place, ...]] = field(default_factory=lambda: [()])
    _depths: list[int] = field(default_factory=lambda: [0])

    def layer(self, layer: Layer, reads: Place) -> Place:
        """Adds a layer that reads the output of another."""
        return self._add(layer, (reads,))

    def addition(self, reads: Sequence[Place]) -> Place:
        """Adds the sum of branches; a branch added to itself is that branch."""
        different = tuple(dict.fromkeys(reads))
        return different[0] if len(different) == 1 else self._add(None, different)

    def _add(self, layer: Layer | None, reads: tuple[Place, ...]) -> Place:
        self._layers.append(layer)
        self._reads.append(reads)
        self._depths.append(1 + max(self._depths[place] for place in reads))
        return len(self._layers) - 1

    def sequence(self, output: Place) -> list[Layer]:
        """The layers that the output depends on; biases and BatchNorms are part of their layer."""
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
        """Everything below the output, what is read before what reads it."""
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
    """The layer with what follows it, if that is a part of it."""
    if layer.kind == "batchnorm" and before.kind in ("conv", "linear") and not before.batchnorm:
        return before._replace(batchnorm=layer.batchnorm)
    is_bias = layer.kind == "table" and len(layer.shape) == 1
    takes_bias = before.kind in ("conv", "linear", "norm")
    if is_bias and takes_bias and before.bias is None and not before.batchnorm:
        return before._replace(bias=layer.weight)
    return None
