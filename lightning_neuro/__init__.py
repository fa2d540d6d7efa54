"""Interpretability as training curves: PyTorch Lightning callbacks that log what a network is learning."""

from lightning_neuro.__about__ import __version__
from lightning_neuro.artefacts import SaveResults, load_run
from lightning_neuro.callback import MetricCallback
from lightning_neuro.checks import ArgumentError
from lightning_neuro.communities import NeuronCommunities, NeuronModularity
from lightning_neuro.count_evaluations import CountEvaluations
from lightning_neuro.entropy import ActivationEntropy, NeuronEntropy
from lightning_neuro.observers import LinearObserver, ObserverProbes
from lightning_neuro.paths import ConceptPaths, LayerPaths
from lightning_neuro.print_summary import PrintSummary
from lightning_neuro.probe import Probe
from lightning_neuro.refinement import RefinementSummary, RepresentationRefinement
from lightning_neuro.topology import ActivationShape, ActivationTopology
from lightning_neuro.unit_report import UnitReport, unit_report

__all__ = [
    "ActivationEntropy",
    "ActivationShape",
    "ActivationTopology",
    "ArgumentError",
    "ConceptPaths",
    "CountEvaluations",
    "LayerPaths",
    "LinearObserver",
    "MetricCallback",
    "NeuronCommunities",
    "NeuronEntropy",
    "NeuronModularity",
    "ObserverProbes",
    "PrintSummary",
    "Probe",
    "RefinementSummary",
    "RepresentationRefinement",
    "SaveResults",
    "UnitReport",
    "__version__",
    "load_run",
    "unit_report",
]
