"""Control attributes: random sets of classes with as many classes as the attribute.

In a network of ten classes nearly every set of classes can be predicted. The selectivity of an attribute is its
balanced accuracy minus the mean of such sets (after Hewitt and Liang, 2019, whose control tasks are random functions of
words).
"""

from dataclasses import dataclass
from functools import lru_cache
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
    if k < 3 or num_controls < 1 or not attributes.shape[1]:
        return empty
    member = (labels[:, None] == classes).to(torch.float64)
    own, is_set = _own_sets(attributes, member)
    size_of_set = own.sum(1).minimum(k - own.sum(1)).long()
    share = attributes.nanmean(0).nan_to_num(nan=0.5).clamp(0, 1)
    by_share = (share.clamp(max=1 - share) * k).round().long().clamp(1, k // 2)
    # For a set of classes the number of classes is known, independent of the number of their samples.
    sizes = torch.where(is_set & (size_of_set > 0), size_of_set, by_share)
    # One more than requested, because an attribute's own set is left out.
    drawn = [_subsets(k, size, num_controls + 1) for size in torch.unique(sizes).tolist()]
    sets = torch.cat(drawn).to(labels.device, torch.float64)
    of = sizes[:, None] == sets.sum(1).long()
    # All members in common, or none, and of the same size: the attribute's own set or its complement.
    common = own @ sets.T
    same = (common == sizes[:, None]) & (own.sum(1) == sizes)[:, None]
    opposite = (common == 0) & (own.sum(1) == k - sizes)[:, None]
    of &= ~(is_set[:, None] & (same | opposite))
    of &= of.cumsum(1) <= num_controls
    values = (member @ sets.T).to(attributes.dtype)
    return Controls(torch.where(labels[:, None] >= 0, values, torch.nan), of)


def _own_sets(attributes: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """The classes all of whose samples have the attribute, float64 (A, K); and whether it is a set of classes, (A,)."""
    known = attributes.isfinite().to(torch.float64)
    rates = (attributes.nan_to_num(nan=0.0).to(torch.float64).T @ member) / (known.T @ member)
    whole = rates == 1
    return whole.to(torch.float64), (whole | (rates == 0)).all(1)


@lru_cache(maxsize=256)  # the same at every layer and evaluation
def _subsets(k: int, size: int, number: int) -> Tensor:
    """Distinct sets of `size` of k classes, bool (sets, k), no two of which are complements."""
    generator = torch.Generator().manual_seed(SEED + 1000 * k + size)
    available = comb(k, size) // (2 if 2 * size == k else 1)
    if available <= max(4 * number, 64):
        every = [chosen for chosen in combinations(range(k), size) if 2 * size != k or 0 in chosen]
        order = torch.randperm(len(every), generator=generator).tolist()
        return _as_rows([every[i] for i in order[:number]], k)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < number:
        chosen = set(torch.randperm(k, generator=generator)[:size].tolist())
        if 2 * size == k and 0 not in chosen:
            chosen = set(range(k)) - chosen
        found[tuple(sorted(chosen))] = None
    return _as_rows(list(found), k)


def _as_rows(sets: list[tuple[int, ...]], k: int) -> Tensor:
    rows = torch.zeros(len(sets), k, dtype=torch.bool)
    rows.scatter_(1, torch.tensor(sets).view(len(sets), -1), True)
    return rows
