"""The shape of activation space: Mapper graphs and persistent homology of a layer's activations."""

from lightning_neuro.topology.graph import MapperGraph
from lightning_neuro.topology.mapper import mapper
from lightning_neuro.topology.metric import ActivationShape
from lightning_neuro.topology.persistence import Persistence, persistence, topological_drift
from lightning_neuro.topology.plot import plot_graphs
from lightning_neuro.topology.plot_homology import plot_homology
from lightning_neuro.topology.purity import Purity, purity
from lightning_neuro.topology.radius import adaptive_eps
from lightning_neuro.topology.result import TopologyResult

__all__ = [
    "ActivationShape",
    "MapperGraph",
    "Persistence",
    "Purity",
    "TopologyResult",
    "adaptive_eps",
    "mapper",
    "persistence",
    "plot_graphs",
    "plot_homology",
    "purity",
    "topological_drift",
]
