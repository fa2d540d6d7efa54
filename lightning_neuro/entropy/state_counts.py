"""Counts of the states of units, and the entropies computed from them.

In mode "states" a unit's activation is turned into one of `num_bins + 1` states: state 0 means "inactive" (a <= 0),
state b means that the activation lies in (upper (b - 1) / num_bins, upper b / num_bins], and the last state also holds
everything above `upper`. All measures are functions of the counts of these states, and counts add up over batches,
shards and ranks.

Source: S. Mostafa, D. Mondal, *On the Evolution of Neuron Communities in a Deep Learning Architecture*,
arXiv 2106.04693 (2021), for mode "mostafa2021"; G. A. Miller, *Note on the bias of information estimates* (1955), for
the correction.
"""

import math

import torch
from torch import Tensor

from lightning_neuro.entropy.calibration import SMALLEST_UPPER
from lightning_neuro.entropy.result import MAX_CLASSES, EntropyResult

_CHUNK = 1024
# A value on a bin's upper edge belongs to that bin; rounding of the float64 product must not move it over the edge.
_EDGE_TOLERANCE = 1e-12


def count_states(activations: Tensor, upper: Tensor, *, num_bins: int = 10, targets: Tensor | None = None) -> Tensor:
    """Count how often each unit was in each state, by class: the sufficient statistic of all entropies.

    Args:
        activations: (N, units), finite, any floating dtype.
        upper: Upper end of each unit's range, (units,), positive.
        num_bins: Equal-width bins on (0, upper].
        targets: Integer class labels, (N,); negative ones mean "no label".

    Returns:
        int64 (1 + classes, units, num_bins + 1) on the device of the activations, where `classes` is the largest label
        + 1. Row 0 counts the samples without a label, row c + 1 those of class c; the last axis starts with "inactive".

    Example:
        >>> import torch
        >>> from lightning_neuro.entropy import count_states
        >>> count_states(torch.tensor([[-1.0], [0.0], [0.5], [0.6], [7.0]]), torch.ones(1), num_bins=2).tolist()
        [[[2, 1, 2]]]
    """
    if activations.device.type == "mps":  # has no float64
        activations = activations.cpu()
    device, (num_samples, units) = activations.device, activations.shape
    rows = torch.zeros(num_samples, dtype=torch.int64, device=device)
    if targets is not None:
        rows = targets.to(device, torch.int64).clamp(min=-1) + 1
    num_rows = int(rows.max()) + 1 if num_samples else 1
    per_row = units * (num_bins + 1)
    scale = (num_bins / upper.to(device, torch.float64).clamp(min=SMALLEST_UPPER)) * (1 - _EDGE_TOLERANCE)
    first_state = torch.arange(units, device=device) * (num_bins + 1)
    counts = torch.zeros(num_rows * per_row, dtype=torch.int64, device=device)
    for chunk, row in zip(
        torch.split(activations, _CHUNK), torch.split(rows, _CHUNK), strict=True
    ):  # small enough to stay in cache
        states = (chunk.to(torch.float64) * scale).ceil_().clamp_(0, num_bins).to(torch.int64)
        states += first_state + row[:, None] * per_row
        counts += torch.bincount(states.flatten(), minlength=counts.numel())
    return counts.view(num_rows, units, num_bins + 1)


def entropy_from_counts(counts: Tensor, *, miller_madow: bool = True) -> Tensor:
    """Shannon entropy of the last axis of a table of counts.

    Args:
        counts: Non-negative counts, (..., states).
        miller_madow: Whether to add (occupied states - 1) / (2 n) nats.

    Returns:
        Bits, float64 (...); 0 where nothing was counted.

    Example:
        >>> import torch
        >>> from lightning_neuro.entropy import entropy_from_counts
        >>> entropy_from_counts(torch.tensor([[2, 2], [4, 0], [0, 0]]), miller_madow=False).tolist()
        [1.0, 0.0, 0.0]
    """
    counts = counts.to(torch.float64)
    n = counts.sum(-1).clamp(min=1)
    share = counts / n[..., None]
    nats = torch.special.entr(share).sum(-1)
    if miller_madow:
        nats = nats + ((counts > 0).sum(-1) - 1).clamp(min=0) / (2 * n)
    bits: Tensor = nats / math.log(2)
    return bits


def entropy_from_states(
    counts: Tensor, *, miller_madow: bool = True, num_nonfinite: int = 0, largest_label: int | None = None
) -> EntropyResult:
    """The result of mode "states" from the counts of `count_states`, added up over any number of batches.

    Args:
        counts: int64 (1 + classes, units, num_bins + 1), as `count_states` returns them.
        miller_madow: Whether to correct every entropy for the bias of few samples. The chain rule stays exact.
        num_nonfinite: Number of samples that were left out, for the notes.
        largest_label: The largest class label; by default it follows from the number of rows. With a label of 256 or
            more there is no class information.

    Returns:
        The entropies per unit.
    """
    counts = counts.cpu()
    if largest_label is None:
        largest_label = len(counts) - 2
    states = counts.sum(0)
    active = states[:, 1:]
    num_active = active.sum(-1)
    on_off = entropy_from_counts(torch.stack([states[:, 0], num_active], -1), miller_madow=miller_madow)
    amplitude = entropy_from_counts(active, miller_madow=miller_madow)
    p_on = num_active.to(torch.float64) / states.sum(-1).clamp(min=1)
    by_class = counts[1:]
    num_labelled = int(by_class[:, :1].sum())
    informative = num_labelled >= 2 and largest_label < MAX_CLASSES
    return EntropyResult(
        mode="states",
        total=on_off + p_on * amplitude,
        live=num_active > 0,
        counts=states,
        num_samples=int(states[:1].sum()),
        num_nonfinite=num_nonfinite,
        on_off=on_off,
        amplitude=amplitude,
        class_information=_class_information(by_class, miller_madow) if informative else None,
        num_labelled=num_labelled,
        largest_label=largest_label,
    )


def _class_information(by_class: Tensor, miller_madow: bool) -> Tensor:
    """I(state; class) = H(state) - sum_c p_c H(state | c), (classes, units, states) -> (units,)."""
    per_class = by_class.sum(-1).to(torch.float64)
    share = per_class / per_class.sum(0)
    within = entropy_from_counts(by_class, miller_madow=miller_madow)
    return entropy_from_counts(by_class.sum(0), miller_madow=miller_madow) - (share * within).sum(0)


def mostafa_entropy(activations: Tensor, *, num_bins: int, num_nonfinite: int) -> EntropyResult:
    """The entropy of Mostafa and Mondal: per unit, equal-width bins on (0, max), inactive samples left out.

    Args:
        activations: (N, units), finite: all samples at once, because the bins end at the largest of them.
        num_bins: Number of bins.
        num_nonfinite: Number of samples that were left out, for the notes.

    Returns:
        The result of mode "mostafa2021".
    """
    units = activations.shape[1]
    peak = activations.amax(0).cpu().to(torch.float64) if len(activations) else torch.zeros(units, dtype=torch.float64)
    upper = torch.where(peak > 0, peak, 1.0)
    states = count_states(activations, upper, num_bins=num_bins)[0].cpu()
    return EntropyResult(
        mode="mostafa2021",
        total=entropy_from_counts(states[:, 1:], miller_madow=False),
        live=peak > 0,
        counts=states,
        num_samples=len(activations),
        num_nonfinite=num_nonfinite,
    )
