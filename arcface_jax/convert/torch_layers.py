"""List the layers of a torch module by tracing its forward pass with `torch.fx`."""

import operator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from arcface_jax.convert.layer_sequence import INPUT, Layer, LayerGraph, Place


class BatchNormName(NamedTuple):
    """A BatchNorm in the module."""

    name: str
    epsilon: float


def layers(module: nn.Module) -> list[Layer]:
    """Returns the layers in the order of `layer_sequence`, with the names of their arrays.

    Args:
      module: a network of `arcface_jax.convert.twins`, on any device.
    """
    graph, places = LayerGraph(), {}
    for node in fx.Tracer().trace(module).nodes:
        if node.op == "output":
            return graph.sequence(places[node.args[0]])
        places[node] = _place(node, graph, places, module)
    raise AssertionError("a traced graph ends with its output")


def _place(node: fx.Node, graph: LayerGraph, places: dict, module: nn.Module) -> Place | None:
    """Returns where the result of a node is; None for a parameter and what depends on no image."""
    if node.op == "placeholder":
        return INPUT
    reads = list(dict.fromkeys(p for n in node.all_input_nodes if (p := places[n]) is not None))
    if node.op == "call_module":
        layer = _layer(str(node.target), module.get_submodule(str(node.target)))
        return reads[0] if layer is None else graph.layer(layer, reads[0])
    tables = [n for n in node.all_input_nodes if n.op == "get_attr"]
    if node.target is operator.add and tables:
        name = str(tables[0].target)
        table = Layer("table", tuple(module.get_parameter(name).shape), weight=name, where=name)
        return graph.layer(table, reads[0])
    if node.target is nn.functional.relu6:
        return graph.layer(Layer("activation", (), ("Clip", 0.0, 6.0), where="relu6"), reads[0])
    return graph.addition(reads) if reads else None


def _layer(name: str, module: nn.Module) -> Layer | None:
    """Describes a leaf module as a layer; None if it has no weights."""
    weight: Any = f"{name}.weight"
    bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
    match module:
        case nn.Conv2d():
            assert isinstance(module.padding, tuple)
            settings = (tuple(module.stride), tuple(module.padding * 2), module.groups)
            return Layer("conv", tuple(module.weight.shape), settings, weight, bias, where=name)
        case nn.Linear():
            return Layer("linear", tuple(module.weight.shape), (), weight, bias, where=name)
        case nn.LayerNorm():
            return Layer("norm", tuple(module.normalized_shape), (), weight, bias, where=name)
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            norm = BatchNormName(name, module.eps)
            return Layer("batchnorm", (module.num_features,), batchnorm=norm, where=name)
        case nn.PReLU():
            return Layer("prelu", tuple(module.weight.shape), (), weight, where=name)
    return None


def build_on_meta(twin: Any, network: str, *, embedding_size: int) -> nn.Module:
    """Builds the module of a network without memory for its weights."""
    with torch.device("meta"):
        return twin(network, embedding_size=embedding_size)
