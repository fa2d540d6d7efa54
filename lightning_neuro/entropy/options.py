"""Options of activation entropy: their types and their documentation."""

from typing import Literal, TypedDict

Mode = Literal["states", "mostafa2021"]
Calibrate = Literal["each", "first"]


class EntropyOptions(TypedDict, total=False):
    """Options of `NeuronEntropy`, which `ActivationEntropy` and `neuron_entropy` accept as well.

    Args:
        mode: `"states"`: the entropy of a unit's state, "inactive" or one of `num_bins` bins. `"mostafa2021"`: the
            entropy of the paper: per unit over all samples, `num_bins` bins on (0, max), inactive samples left out and
            the rest renormalised, uncorrected. Default: `"states"`.
        num_bins: Number of equal-width bins of the active range, at least 2. Default: 10.
        miller_madow: Whether to add the Miller-Madow correction, (occupied states - 1) / (2 samples) nats, which
            removes most of the bias of few samples; not in mode `"mostafa2021"`. Default: True.
    """

    mode: Mode
    num_bins: int
    miller_madow: bool
