"""The entropy of a layer's units from all of its activations at once."""

from typing import Unpack

from torch import Tensor

from lightning_neuro.checks import ArrayLike
from lightning_neuro.entropy.calibration import activation_range
from lightning_neuro.entropy.metric import NeuronEntropy
from lightning_neuro.entropy.options import EntropyOptions
from lightning_neuro.entropy.result import EntropyResult


def neuron_entropy(
    activations: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    upper: Tensor | None = None,
    **options: Unpack[EntropyOptions],
) -> EntropyResult:
    """Entropy of the state of each unit of a layer, in bits.

    A low on/off entropy means that a unit is nearly always active or nearly always inactive, a high amplitude entropy
    that it uses its whole range when it is active, and the class information is the part of these bits that
    distinguishes the classes. The entropy does not predict accuracy. Compare a layer with itself over time and not with
    other layers, because the bins follow each layer's own range.

    Args:
        activations: (N, units), of any real dtype. Samples with a NaN or infinite value are left out and counted.
        targets: Integer class labels, (N,); a negative label means "no label". Without them there is no class
            information.
        upper: Upper end of each unit's range, (units,), positive; by default `activation_range(activations)`. Pass the
            same range to make results comparable. Only for mode "states".
        **options: See `EntropyOptions`.

    Returns:
        The entropies per unit, with `scalars()`, `notes()` and `histogram()`.

    Raises:
        ArgumentError: If an argument has a wrong shape, dtype or value.

    Source:
        Mostafa and Mondal, arXiv 2106.04693 (2021); Miller (1955).

    Example:
        >>> import torch
        >>> from lightning_neuro.entropy import neuron_entropy
        >>> activations = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> result = neuron_entropy(activations, torch.tensor([1, 0, 1, 0]), miller_madow=False)
        >>> result.total.tolist(), result.class_information.tolist(), result.num_dead
        ([0.0, 1.0], [0.0, 1.0], 1)
    """
    # Unlike a calibration by batches, this range is exact for any number of samples.
    automatic = upper is None and options.get("mode") != "mostafa2021"
    # The metric is local to this process: it must not wait for other ranks.
    own = activation_range(activations) if automatic else upper
    metric = NeuronEntropy(upper=own, sync_on_compute=False, **options)
    metric.update(activations, targets)
    result: EntropyResult = metric.compute()
    return result
