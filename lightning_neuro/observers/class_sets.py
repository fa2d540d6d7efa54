"""Each unit's own best set of classes: those in which it is most often active."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neuro.observers.thresholds import SortedUnits, best_cut_of_own, sort_units
from lightning_neuro.stats import matthews

_CUTS = 15
_CELLS = 2**22


@dataclass(frozen=True, eq=False)
class ClassSets:
    """Each unit's best set of classes.

    Attributes:
        threshold: (units,), infinite if the unit does not vary.
        members: (units, K) bool.
        firing: int64 (units,), number of samples above the threshold.
        class_sizes: int64 (K,), number of samples in each class.
    """

    threshold: Tensor
    members: Tensor
    firing: Tensor
    class_sizes: Tensor


def best_class_sets(x: Tensor, labels: Tensor, units: SortedUnits | None = None) -> ClassSets:
    """The threshold and the set of classes with the largest Matthews correlation, for each unit.

    For a given threshold the best set is one of the K - 1 sets of the classes in which the unit is active most often,
    so no search over 2^K sets is needed. The sets are found at 0 and at fifteen quantiles; the threshold of the best
    set is then optimized over all values.

    Args:
        x: (n, units), finite.
        labels: int64 (n,), negative if unlabelled.
        units: `sort_units(x)`, if known.

    Returns:
        The sets and thresholds of all units.
    """
    labelled = labels >= 0
    if units is None or not bool(labelled.all()):
        x, labels = x[labelled], labels[labelled]
        units = sort_units(x)
    num_units = x.shape[1]
    num_classes = int(labels.max()) + 1 if len(labels) else 0
    if num_classes < 2:
        none = torch.zeros(num_units, 0, dtype=torch.bool, device=x.device)
        empty = torch.zeros(num_units, dtype=torch.int64, device=x.device)
        return ClassSets(units.values.new_full((num_units,), torch.inf), none, empty, empty[:0])
    # Classes without samples would only be sorted to the end.
    present, own_class, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    cuts = torch.cat([units.values.new_zeros(1, num_units), _quantiles(units.values)])
    mcc, chosen = _sets_at(x, cuts, own_class, sizes)
    # The first of the best, with some slack, because rounding must not decide between equal ones.
    first = (mcc >= mcc.amax(0) - 1e-12).to(torch.uint8).argmax(0)
    unit = torch.arange(num_units, device=x.device)
    best = mcc[first, unit]
    useful = best > 1e-12
    threshold = torch.where(useful, cuts[first, unit], torch.inf)
    inside = chosen[first, unit] & useful[:, None]
    exact, cut = best_cut_of_own(units, inside.T[own_class].to(torch.float64).gather(0, units.order))
    threshold = torch.where(exact > best.clamp(min=0.0), cut, threshold)
    members = torch.zeros(num_units, num_classes, dtype=torch.bool, device=x.device)
    members[:, present] = inside
    return ClassSets(threshold, members, (x > threshold).sum(0), torch.bincount(labels, minlength=num_classes))


def _quantiles(values: Tensor) -> Tensor:
    """(15, units), as `torch.quantile`, whose input is limited to 16 million values."""
    at = torch.linspace(0, 1, _CUTS + 2, dtype=values.dtype, device=values.device)[1:-1] * (len(values) - 1)
    low = at.floor().long()
    return values[low].lerp(values[at.ceil().long()], (at - low)[:, None])


def _sets_at(x: Tensor, cuts: Tensor, own_class: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The correlation, (cuts, units), and the best set, (cuts, units, K), for each cut of each unit."""
    one_hot = torch.nn.functional.one_hot(own_class, len(sizes)).float()
    by_unit = x.T.contiguous()
    some = max(1, _CELLS // max(1, x.numel()))
    # Counts are exact in float32 up to 2^24.
    counts = [(by_unit > part[:, :, None]).float() @ one_hot for part in torch.split(cuts, some)]
    return best_top_set(torch.cat(counts).double(), sizes.double())


def best_top_set(counts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The set of classes that best predicts whether a unit is active, and its Matthews correlation.

    Args:
        counts: (..., K), number of samples of each class in which a unit is active.
        sizes: (K,), number of samples of each class.

    Returns:
        The correlation, (...), and the set, bool (..., K).
    """
    best, order, last, _ = _best_top(counts, sizes)
    inside = torch.arange(counts.shape[-1], device=counts.device) <= last
    return best, torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, inside)


def best_top_set_size(counts: Tensor, sizes: Tensor) -> Tensor:
    """The number of samples, (...), in the set of `best_top_set`; the sizes may be of the shape of the counts."""
    return _best_top(counts, sizes)[3]


def _best_top(counts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The correlation, (...), the classes by rate, (..., K), the set's last place in these, (..., 1), and its size."""
    rates = counts / sizes.clamp(min=1)
    order = torch.where(sizes > 0, rates, -1.0).argsort(dim=-1, descending=True, stable=True)
    hits = counts.gather(-1, order).cumsum(-1)[..., :-1]
    size = sizes.expand_as(counts).gather(-1, order).cumsum(-1)[..., :-1]
    on, total = counts.sum(-1, keepdim=True), sizes.sum(-1, keepdim=True)
    mcc = matthews(hits, on - hits, size - hits, total - on - size + hits).nan_to_num(nan=-1.0)
    best = mcc.max(dim=-1, keepdim=True)
    return best.values[..., 0], order, best.indices, size.gather(-1, best.indices)[..., 0]
