"""The shape of activation space: Mapper graphs and persistent homology of a layer's activations."""

from lightning_neuro.topology.callback import ActivationTopology
from lightning_neuro.topology.class_splits import ClassSplit, class_splits
from lightning_neuro.topology.drift import topological_drift
from lightning_neuro.topology.mapper import compute_mapper
from lightning_neuro.topology.mapper_graph import MapperGraph
from lightning_neuro.topology.metric import ActivationShape
from lightning_neuro.topology.options import MapperOptions, MapperSettings, TopologyOptions
from lightning_neuro.topology.persistence import Persistence, compute_persistence
from lightning_neuro.topology.plot import plot_graphs
from lightning_neuro.topology.plot_diagrams import plot_homology
from lightning_neuro.topology.plot_samples import plot_members
from lightning_neuro.topology.purity import Purity, compute_purity
from lightning_neuro.topology.radius import adaptive_eps
from lightning_neuro.topology.result import TopologyResult

__all__ = [
    "ActivationShape",
    "ActivationTopology",
    "ClassSplit",
    "MapperGraph",
    "MapperOptions",
    "MapperSettings",
    "Persistence",
    "Purity",
    "TopologyOptions",
    "TopologyResult",
    "adaptive_eps",
    "class_splits",
    "compute_mapper",
    "compute_persistence",
    "compute_purity",
    "plot_graphs",
    "plot_homology",
    "plot_members",
    "topological_drift",
]
