"""Neuron communities as pure functions: activations in, graph and communities out.

The work is split by concept: :mod:`graph` (activations to a weighted graph), :mod:`detection` (graph to communities),
:mod:`null` (what the same units would give if they did not act together) and :mod:`mostafa2021` (the paper's graph).
"""

from lightning_neuro.communities.detection import (
    Communities,
    check_algorithm,
    detect_communities,
    modularity,
    partition_agreement,
)
from lightning_neuro.communities.graph import ActivationGraph, activation_graph

__all__ = [
    "ActivationGraph",
    "Communities",
    "activation_graph",
    "check_algorithm",
    "detect_communities",
    "modularity",
    "partition_agreement",
]
