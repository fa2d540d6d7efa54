"""Entropy of the states of units: on/off and amplitude entropy of each layer, and class information."""

from lightning_neuro.entropy.calibration import activation_range, merge_calibrations
from lightning_neuro.entropy.callback import ActivationEntropy
from lightning_neuro.entropy.metric import NeuronEntropy
from lightning_neuro.entropy.options import EntropyOptions
from lightning_neuro.entropy.plot import plot_entropy
from lightning_neuro.entropy.result import EntropyResult
from lightning_neuro.entropy.state_counts import count_states, entropy_from_counts, entropy_from_states
from lightning_neuro.entropy.unit_entropy import neuron_entropy

__all__ = [
    "ActivationEntropy",
    "EntropyOptions",
    "EntropyResult",
    "NeuronEntropy",
    "activation_range",
    "count_states",
    "entropy_from_counts",
    "entropy_from_states",
    "merge_calibrations",
    "neuron_entropy",
    "plot_entropy",
]
