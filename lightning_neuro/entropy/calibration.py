"""Where the bins of a unit end: the 99.9 percentile of its activations, from statistics that can be merged."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_neuro.entropy.inputs import SMALLEST_UPPER, check_batch, finite_samples

CALIBRATION_SIZE = 64
PERCENTILE = 0.999


def activation_range(activations: Tensor) -> Tensor:
    """The upper end of each unit's range: the 99.9 percentile of its activations.

    A unit that was active too rarely for its percentile to be positive gets its largest activation; a unit that was
    never active gets the median of the layer's other units, so that it has sensible bins should it come alive; and if
    none was active all get 1.

    Args:
        activations: (samples, units), any floating dtype. Samples with a NaN or infinite value are left out.

    Returns:
        float64 (units,) on the CPU, all positive.

    Raises:
        ValueError: If `activations` is not a floating (samples, units) tensor.

    Example:
        >>> import torch
        >>> from lightning_neuro.entropy import activation_range
        >>> [round(x, 3) for x in activation_range(torch.arange(1001.0)[:, None] * torch.tensor([1.0, 0.0])).tolist()]
        [999.0, 999.0]
    """
    check_batch(activations, None)
    activations, _, _ = finite_samples(activations, None)
    needed = math.ceil((1 - PERCENTILE) * len(activations)) + 1
    return range_from_calibration(*calibration_of(activations, size=max(CALIBRATION_SIZE, needed)))


def calibration_of(activations: Tensor, *, size: int = CALIBRATION_SIZE) -> tuple[Tensor, Tensor]:
    """What the range needs to know of a batch: each unit's largest activations, and the number of samples.

    Args:
        activations: (samples, units), finite.
        size: How many of the largest are kept. 64 give the exact 99.9 percentile of up to 63,000 samples; of more, they
            give a slightly higher one.

    Returns:
        float64 (size, units) in descending order, filled up with -inf, and the int64 count (); both on the CPU.
    """
    largest = activations.detach().topk(min(size, len(activations)), dim=0).values.cpu().to(torch.float64)
    missing = largest.new_full((size - len(largest), activations.shape[1]), -math.inf)
    return torch.cat([largest, missing]), torch.tensor(len(activations))


def merge_calibrations(calibrations: Iterable[tuple[Tensor, Tensor | int]]) -> tuple[Tensor, Tensor]:
    """The calibration of all samples from those of parts of them (batches, shards, ranks), in any order.

    Args:
        calibrations: Pairs of the largest activations, (k, units), and the count, as `NeuronEntropy.calibration` gives
            them. Pairs with a count of 0 are skipped.

    Returns:
        One such pair, (64, units) and (); with no samples at all, (64, 0) and 0.

    Raises:
        ValueError: If the pairs do not have the same number of units.

    Example:
        >>> import torch
        >>> from lightning_neuro.entropy import merge_calibrations
        >>> top, count = merge_calibrations([(torch.tensor([[3.0]]), 1), (torch.tensor([[5.0], [2.0]]), 2)])
        >>> top[:3].flatten().tolist(), count.item()
        ([5.0, 3.0, 2.0], 3)
    """
    parts = [(top.cpu().to(torch.float64), int(count)) for top, count in calibrations if int(count)]
    if not parts:
        return torch.empty(CALIBRATION_SIZE, 0, dtype=torch.float64), torch.tensor(0)
    units = {top.shape[-1] for top, _ in parts}
    if len(units) > 1 or any(top.ndim != 2 for top, _ in parts):
        shapes = ", ".join(str(tuple(top.shape)) for top, _ in parts)
        raise ValueError(
            f"calibrations must hold (k, units) tensors with one number of units, got the shapes {shapes}."
        )
    top, _ = calibration_of(torch.cat([top for top, _ in parts]))
    return top, torch.tensor(sum(count for _, count in parts))


def range_from_calibration(top: Tensor, count: Tensor | int) -> Tensor:
    """The range of `activation_range` from a calibration, (k, units) and () -> (units,)."""
    if not int(count):
        return torch.ones(top.shape[1], dtype=torch.float64)
    position = (1 - PERCENTILE) * (int(count) - 1)
    low = min(math.floor(position), len(top) - 1)
    high = min(math.ceil(position), len(top) - 1)
    percentile = torch.lerp(top[low], top[high], position - math.floor(position))
    upper = torch.where(percentile > 0, percentile, top[0])
    live = upper > 0
    spare = upper[live].median().item() if live.any() else 1.0
    return torch.where(live, upper, spare).clamp(min=SMALLEST_UPPER)
