"""Neuron communities: which units of a layer are active together, and how clearly they are separated into groups."""

from lightning_neuro.communities.callback import NeuronCommunities
from lightning_neuro.communities.detection import Communities, detect_communities, modularity, partition_agreement
from lightning_neuro.communities.metric import NeuronModularity
from lightning_neuro.communities.options import CommunityOptions
from lightning_neuro.communities.plot import plot_communities
from lightning_neuro.communities.result import CommunityResult
from lightning_neuro.communities.unit_graph import ActivationGraph, activation_graph

__all__ = [
    "ActivationGraph",
    "Communities",
    "CommunityOptions",
    "CommunityResult",
    "NeuronCommunities",
    "NeuronModularity",
    "activation_graph",
    "detect_communities",
    "modularity",
    "partition_agreement",
    "plot_communities",
]
