"""The upper end of a unit's bins: the 99.9 percentile of its activations, from statistics that can be merged."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_neuro.checks import ArgumentError, ArrayLike, as_activations, finite_rows, require

CALIBRATION_SIZE = 64
PERCENTILE = 0.999
# Below this, num_bins / upper could overflow.
SMALLEST_UPPER = 1e-300


def activation_range(activations: ArrayLike) -> Tensor:
    """The upper end of each unit's range: the 99.9 percentile of its activations.

    If a unit was active too rarely for its percentile to be positive, its range ends at its largest activation. If it
    was never active, its range ends at the median of the layer's other units, so that its bins are sensible if it
    becomes active later. If no unit was active, all ranges end at 1.

    Args:
        activations: (N, units), of any real dtype. Samples with a NaN or infinite value are left out.

    Returns:
        float64 (units,) on the CPU, all positive.

    Raises:
        ArgumentError: If `activations` is not a real (N, units) tensor or array.

    Example:
        >>> import torch
        >>> from lightning_neuro.entropy import activation_range
        >>> [round(x, 3) for x in activation_range(torch.arange(1001.0)[:, None] * torch.tensor([1.0, 0.0])).tolist()]
        [999.0, 999.0]
    """
    values = as_activations(activations)
    values = values[finite_rows(values)]
    needed = math.ceil((1 - PERCENTILE) * len(values)) + 1
    return range_from_calibration(*calibration_of(values, size=max(CALIBRATION_SIZE, needed)))


def calibration_of(activations: Tensor, *, size: int = CALIBRATION_SIZE) -> tuple[Tensor, Tensor]:
    """The statistics of a batch from which the range is computed: each unit's largest activations, and the count.

    Args:
        activations: (N, units), finite.
        size: How many of the largest are kept. With 64 the 99.9 percentile is exact for up to 63,000 samples; for more
            it is slightly too high.

    Returns:
        float64 (size, units) in descending order, padded with -inf, and the int64 count (); both on the CPU.
    """
    largest = activations.topk(min(size, len(activations)), dim=0).values.cpu().to(torch.float64)
    missing = largest.new_full((size - len(largest), activations.shape[1]), -math.inf)
    return torch.cat([largest, missing]), torch.tensor(len(activations))


def merge_calibrations(calibrations: Iterable[tuple[Tensor, Tensor | int]]) -> tuple[Tensor, Tensor]:
    """The calibration of all samples from those of parts of them (batches, shards, ranks), in any order.

    Args:
        calibrations: Pairs of the largest activations, (k, units), and the count, as in `NeuronEntropy.calibration`.
            Pairs with a count of 0 are skipped.

    Returns:
        One such pair, (64, units) and (); with no samples at all, (64, 0) and 0.

    Raises:
        ArgumentError: If the pairs do not have the same number of units.

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
        raise ArgumentError(
            f"`calibrations` must hold (k, units) tensors with the same number of units; got the shapes {shapes}."
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


def as_range(upper: Tensor | None, mode: str) -> Tensor | None:
    """A range given by the user, as a float64 copy on the CPU.

    Raises:
        ArgumentError: If it is not a (units,) tensor of positive numbers, or the mode determines the range itself.
    """
    if upper is None:
        return None
    own = "be None in mode 'mostafa2021', whose bins end at each unit's largest activation"
    require(mode != "mostafa2021", "upper", own, upper)
    vector = isinstance(upper, Tensor) and upper.ndim == 1 and upper.is_floating_point()
    require(vector, "upper", "be a floating-point tensor of shape (units,)", upper)
    positive = bool((upper.isfinite() & (upper > 0)).all())
    require(positive, "upper", "hold positive finite numbers", f"a smallest value of {upper.min().item()}")
    return upper.detach().cpu().to(torch.float64, copy=True)
