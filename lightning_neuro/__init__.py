"""Interpretability as training curves: PyTorch Lightning callbacks that log what a network is learning."""

# ruff: noqa
# Transitional while the rooms move to the new base class: a room that is not ported yet is left out.
from contextlib import suppress

from lightning_neuro.__about__ import __version__
from lightning_neuro.callback import MetricCallback
from lightning_neuro.checks import ArgumentError
from lightning_neuro.probe import Probe

with suppress(ImportError):
    from lightning_neuro.communities.callback import NeuronCommunities
with suppress(ImportError):
    from lightning_neuro.entropy.callback import ActivationEntropy
with suppress(ImportError):
    from lightning_neuro.observers.callback import ObserverProbes
with suppress(ImportError):
    from lightning_neuro.topology.callback import ActivationTopology
with suppress(ImportError):
    from lightning_neuro.paths.callback import ConceptPaths
with suppress(ImportError):
    from lightning_neuro.refinement.callback import RepresentationRefinement
