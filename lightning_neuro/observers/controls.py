"""Control attributes: random sets of classes with as many classes as the attribute.

In a network of ten classes nearly every set of classes can be predicted. The selectivity of an attribute is its
balanced accuracy minus the mean of such sets (after Hewitt and Liang, 2019, whose control tasks are random functions of
words).
"""

from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor

SEED = 20_103


@dataclass(frozen=True, eq=False)
class Controls:
    """Holds control attributes, and which of them belong to which attribute.

    Attributes:
        values: (N, C) of 0 and 1, NaN for samples without a class.
        of: (A, C) bool, whether a control belongs to an attribute.
    """

    values: Tensor
    of: Tensor


def control_attributes(attributes: Tensor, labels: Tensor, num_controls: int) -> Controls:
    """Draw the controls of each attribute: up to `num_controls` distinct sets with as many classes as the attribute.

    A set and its complement are the same classification task, so they count as one; the attribute's own set, if it is
    a set of classes, is left out. For a single class the controls are the other classes.

    Args:
        attributes: (N, A) of 0, 1 and NaN.
        labels: int64 (N,) class labels, negative if unlabelled.
        num_controls: Number of sets for each size of an attribute.

    Returns:
        The controls; none if there are fewer than three classes.
    """
    classes = torch.unique(labels[labels >= 0])
    k = len(classes)
    empty = Controls(attributes[:, :0], torch.zeros(attributes.shape[1], 0, dtype=torch.bool, device=labels.device))
    if k < 3 or num_controls < 1:
        return empty
    member = labels[:, None] == classes
    rates = _rates(attributes, member)
    share = attributes.nanmean(0).nan_to_num(nan=0.5).clamp(0, 1)
    sizes = (share.clamp(max=1 - share) * k).round().long().clamp(1, k // 2)
    own_sets = [_own_set(rate) for rate in rates]
    for a, own in enumerate(own_sets):
        # For a set of classes the number of classes is known, independent of the number of their samples.
        if own and len(own) < k:
            sizes[a] = min(len(own), k - len(own))
    sets: list[frozenset[int]] = []
    of_size: dict[int, list[int]] = {}
    for size in sorted(set(sizes.tolist())):
        # One more than requested, because an attribute's own set is left out.
        drawn = _subsets(k, size, num_controls + 1)
        of_size[size] = list(range(len(sets), len(sets) + len(drawn)))
        sets += drawn
    in_set = torch.zeros(len(sets), k, dtype=torch.bool)
    for row, chosen in enumerate(sets):
        in_set[row, list(chosen)] = True
    in_set = in_set.to(labels.device)
    of = torch.zeros(len(sizes), len(sets), dtype=torch.bool, device=labels.device)
    for a, size in enumerate(sizes.tolist()):
        own = own_sets[a]
        others = [s for s in of_size[size] if own is None or sets[s] not in (own, frozenset(range(k)) - own)]
        of[a, others[:num_controls]] = True
    values = (member.to(torch.float64) @ in_set.T.to(torch.float64)).to(attributes.dtype)
    return Controls(torch.where(labels[:, None] >= 0, values, torch.nan), of)


def _rates(attributes: Tensor, member: Tensor) -> Tensor:
    """(A, K) fraction of each class with the attribute; NaN where unknown."""
    known = attributes.isfinite().to(torch.float64)
    one_hot = member.to(torch.float64)
    return (attributes.nan_to_num(nan=0.0).to(torch.float64).T @ one_hot) / (known.T @ one_hot)


def _own_set(rates: Tensor) -> frozenset[int] | None:
    """The classes of an attribute if it is a set of classes, else None."""
    known = rates.nan_to_num(nan=0.5)
    return frozenset(torch.nonzero(known == 1).flatten().tolist()) if ((known == 0) | (known == 1)).all() else None


def _subsets(k: int, size: int, number: int) -> list[frozenset[int]]:
    """Distinct sets of `size` of k classes, no two of which are complements."""
    generator = torch.Generator().manual_seed(SEED + 1000 * k + size)
    available = comb(k, size) // (2 if 2 * size == k else 1)
    if available <= max(4 * number, 64):
        every = [frozenset(chosen) for chosen in combinations(range(k), size)]
        if 2 * size == k:
            every = [chosen for chosen in every if 0 in chosen]
        order = torch.randperm(len(every), generator=generator).tolist()
        return [every[i] for i in order[:number]]
    found: dict[frozenset[int], None] = {}
    while len(found) < number:
        chosen = frozenset(torch.randperm(k, generator=generator)[:size].tolist())
        if 2 * size == k and 0 not in chosen:
            chosen = frozenset(range(k)) - chosen
        found[chosen] = None
    return list(found)
