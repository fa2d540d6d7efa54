"""How predictable the units of each layer are: on/off and amplitude entropy, and what they tell about the class."""

from lightning_neuro.entropy.calibration import activation_range, merge_calibrations
from lightning_neuro.entropy.functional import count_states, entropy_from_counts, entropy_from_states, neuron_entropy
from lightning_neuro.entropy.metric import NeuronEntropy
from lightning_neuro.entropy.plot import plot_entropy
from lightning_neuro.entropy.result import EntropyResult

__all__ = [
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
