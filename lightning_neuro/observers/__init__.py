"""What each layer and each unit encodes: linear observers of attributes, and units that denote an attribute."""

from lightning_neuro.observers.callback import ObserverProbes
from lightning_neuro.observers.denotation import Denotation
from lightning_neuro.observers.depth import DepthCurve, depth_curve
from lightning_neuro.observers.metric import LinearObserver
from lightning_neuro.observers.options import ObserverOptions, ObserverSettings
from lightning_neuro.observers.plot import plot_attributes, plot_proportion
from lightning_neuro.observers.plot_units import plot_explanation, plot_maps
from lightning_neuro.observers.reading import read_attributes
from lightning_neuro.observers.result import ObserverResult

__all__ = [
    "Denotation",
    "DepthCurve",
    "LinearObserver",
    "ObserverOptions",
    "ObserverProbes",
    "ObserverResult",
    "ObserverSettings",
    "depth_curve",
    "plot_attributes",
    "plot_explanation",
    "plot_maps",
    "plot_proportion",
    "read_attributes",
]
