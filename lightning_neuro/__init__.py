"""Interpretability as training curves: PyTorch Lightning callbacks that log what a network is learning."""

from lightning_neuro.__about__ import __version__
from lightning_neuro.callback import MetricCallback
from lightning_neuro.communities import NeuronModularity, activation_graph, detect_communities, modularity
from lightning_neuro.communities.callback import NeuronCommunities
from lightning_neuro.entropy import NeuronEntropy, neuron_entropy
from lightning_neuro.entropy.callback import ActivationEntropy
from lightning_neuro.observers import LinearObserver
from lightning_neuro.observers.callback import ObserverProbes
from lightning_neuro.paths.callback import ConceptPaths
from lightning_neuro.probe import Probe
from lightning_neuro.refinement.callback import RepresentationRefinement
from lightning_neuro.topology.callback import ActivationTopology

__all__ = [
    "ActivationEntropy",
    "ActivationTopology",
    "ConceptPaths",
    "LinearObserver",
    "MetricCallback",
    "NeuronCommunities",
    "NeuronEntropy",
    "NeuronModularity",
    "ObserverProbes",
    "Probe",
    "RepresentationRefinement",
    "__version__",
    "activation_graph",
    "detect_communities",
    "modularity",
    "neuron_entropy",
]
