"""Control attributes: random sets of classes, of the same size as the attribute, which the data did not ask for.

A network of ten classes lets nearly every set of classes be read. What an attribute gives beyond the mean of such sets
is its selectivity (after Hewitt and Liang, 2019, whose control tasks are random functions of the word).
"""

from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor

SEED = 20_103


@dataclass(frozen=True, eq=False)
class Controls:
    """Control attributes, and which of them stand against which attribute.

    Attributes:
        values: (N, C) of 0 and 1, NaN for samples without a class.
        of: (A, C) bool, whether a control is one of an attribute's.
    """

    values: Tensor
    of: Tensor


def control_attributes(attributes: Tensor, labels: Tensor, number: int) -> Controls:
    """Draw the controls of each attribute: up to `number` distinct sets of as many classes as it is large.

    A set and the set of the other classes are the same question, so they count as one; the attribute's own set, where
    it is one, is left out. Of single classes the controls are the other classes.

    Args:
        attributes: (N, A) of 0, 1 and NaN.
        labels: int64 (N,) class labels, negative where there is none.
        number: How many sets for each size of an attribute.

    Returns:
        The controls; none where there are fewer than three classes.
    """
    classes = torch.unique(labels[labels >= 0])
    k = len(classes)
    empty = Controls(attributes[:, :0], torch.zeros(attributes.shape[1], 0, dtype=torch.bool, device=labels.device))
    if k < 3 or number < 1:
        return empty
    member = labels[:, None] == classes
    rates = _rates(attributes, member)
    share = attributes.nanmean(0).nan_to_num(nan=0.5).clamp(0, 1)
    sizes = (share.clamp(max=1 - share) * k).round().long().clamp(1, k // 2)
    own_sets = [_own_set(rate) for rate in rates]
    for a, own in enumerate(own_sets):
        # Of a set of classes the number is known, however many samples these have.
        if own and len(own) < k:
            sizes[a] = min(len(own), k - len(own))
    sets: list[frozenset[int]] = []
    of_size: dict[int, list[int]] = {}
    for size in sorted(set(sizes.tolist())):
        # One more than asked for, because an attribute's own set does not count for it.
        drawn = _subsets(k, size, number + 1)
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
        of[a, others[:number]] = True
    values = (member.to(torch.float64) @ in_set.T.to(torch.float64)).to(attributes.dtype)
    return Controls(torch.where(labels[:, None] >= 0, values, torch.nan), of)


def _rates(attributes: Tensor, member: Tensor) -> Tensor:
    """(A, K) share of each class with the attribute; NaN where unknown."""
    known = attributes.isfinite().to(torch.float64)
    one_hot = member.to(torch.float64)
    return (attributes.nan_to_num(nan=0.0).to(torch.float64).T @ one_hot) / (known.T @ one_hot)


def _own_set(rates: Tensor) -> frozenset[int] | None:
    """The classes of an attribute that is a set of classes, else None."""
    known = rates.nan_to_num(nan=0.5)
    return frozenset(torch.nonzero(known == 1).flatten().tolist()) if ((known == 0) | (known == 1)).all() else None


def _subsets(k: int, size: int, number: int) -> list[frozenset[int]]:
    """Distinct sets of `size` of k classes, of which no two are each other's complement."""
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
