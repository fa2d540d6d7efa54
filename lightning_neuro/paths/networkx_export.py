"""Paths as a networkx graph, for further analysis."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import networkx as nx


def paths_graph(paths: Mapping[str, Tensor]) -> "nx.DiGraph":
    """A layered graph of the units that are in any path.

    Args:
        paths: Layer -> bool (concepts, units), the layers in the order of the forward pass.

    Returns:
        A directed graph. Nodes are (layer, unit), with the attributes `layer`, `unit`, `depth` (number of the layer)
        and `concepts` (a tuple of the concepts whose path contains the unit). An edge joins units of consecutive layers
        that share a concept, with the attributes `concepts` and `weight` (the number of shared concepts).

    Example:
        >>> import torch
        >>> masks = torch.eye(2, dtype=torch.bool)
        >>> graph = paths_graph({"fc1": masks, "fc2": masks})
        >>> sorted(graph.edges(data="concepts"))
        [(('fc1', 0), ('fc2', 0), (0,)), (('fc1', 1), ('fc2', 1), (1,))]
    """
    import networkx as nx

    graph = nx.DiGraph()
    earlier: dict[int, set[int]] = {}
    previous = ""
    for depth, (layer, masks) in enumerate(paths.items()):
        users = {unit: set(masks[:, unit].nonzero().flatten().tolist()) for unit in range(masks.shape[1])}
        users = {unit: concepts for unit, concepts in users.items() if concepts}
        for unit, concepts in users.items():
            graph.add_node((layer, unit), layer=layer, unit=unit, depth=depth, concepts=tuple(sorted(concepts)))
        for before, theirs in earlier.items():
            for unit, concepts in users.items():
                if both := theirs & concepts:
                    graph.add_edge((previous, before), (layer, unit), concepts=tuple(sorted(both)), weight=len(both))
        earlier, previous = users, layer
    return graph
