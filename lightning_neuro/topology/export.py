"""Mapper graphs as files for other tools."""

from collections.abc import Mapping
from pathlib import Path

from lightning_neuro.loggers import file_name
from lightning_neuro.topology.mapper_graph import MapperGraph, flat_attributes
from lightning_neuro.topology.result import TopologyResult


def write_graphs(folder: Path, results: Mapping[str, TopologyResult]) -> None:
    """Write each layer's graph as `<layer>.json` and `<layer>.graphml` (Gephi, Cytoscape, yEd) into a folder."""
    taken: set[str] = set()
    for layer, result in results.items():
        if result.graph is None:
            continue
        name = file_name(layer)
        while name in taken:  # names of two layers may differ only in characters that file names cannot contain
            name += "_"
        taken.add(name)
        (folder / f"{name}.json").write_text(result.graph.to_json(), encoding="utf-8")
        write_graphml(result.graph, folder / f"{name}.graphml")


def write_graphml(graph: MapperGraph, path: Path) -> None:
    """Write one graph as GraphML, in which lists are stored as JSON text."""
    import networkx as nx

    network = graph.to_networkx()
    for _, attributes in network.nodes(data=True):
        flat = flat_attributes(attributes)
        attributes.clear()
        attributes.update(flat)
    nx.write_graphml(network, path)
