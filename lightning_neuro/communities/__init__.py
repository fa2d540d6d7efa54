"""Neuron communities: which units of a layer fire together, and how sharply the layer falls apart into such groups."""

from lightning_neuro.communities.functional import (
    ActivationGraph,
    Communities,
    activation_graph,
    check_algorithm,
    detect_communities,
    modularity,
    partition_agreement,
)
from lightning_neuro.communities.metric import NeuronModularity
from lightning_neuro.communities.plot import plot_communities
from lightning_neuro.communities.result import CommunityResult

__all__ = [
    "ActivationGraph",
    "Communities",
    "CommunityResult",
    "NeuronModularity",
    "activation_graph",
    "check_algorithm",
    "detect_communities",
    "modularity",
    "partition_agreement",
    "plot_communities",
]
