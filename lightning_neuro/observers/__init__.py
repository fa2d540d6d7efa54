"""What each layer, and each unit, knows: linear observers of attributes, and units that denote something."""

from lightning_neuro.observers.denotation import Denotation
from lightning_neuro.observers.depth import DepthCurve, depth_curve
from lightning_neuro.observers.functional import read_attributes
from lightning_neuro.observers.metric import LinearObserver
from lightning_neuro.observers.result import ObserverResult

__all__ = ["Denotation", "DepthCurve", "LinearObserver", "ObserverResult", "depth_curve", "read_attributes"]
