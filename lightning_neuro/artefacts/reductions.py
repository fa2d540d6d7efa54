"""What is stored smaller than it is: symmetric matrices, and what only the next evaluation of a run needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

LEFT_OUT = frozenset({("TopologyResult", "drift_distances")})
"""Pairs of dataclass and field that are not stored, so that they have their default after reading.

The distances between samples serve to compute the drift to the next evaluation, which is stored itself."""
SYMMETRIC = {("CommunityResult", "adjacency"): "labels"}
"""Pairs of dataclass and field that hold a symmetric matrix -> the field with the groups of its rows."""
MAX_SIDE = 256
"""Number of rows from which on a symmetric matrix is stored as means of blocks."""
_LEVELS = 255


@dataclass(frozen=True, eq=False)
class Triangle:
    """The upper triangle of a symmetric matrix, with its diagonal.

    Attributes:
        values: (side (side + 1) / 2,), row by row.
        side: Number of rows.
    """

    values: Tensor
    side: int


@dataclass(frozen=True, eq=False)
class Blocks:
    """A symmetric matrix whose rows are put into an order and divided into groups: the mean of each block of groups.

    Attributes:
        levels: int64 (groups (groups + 1) / 2,), the upper triangle of the means, in 255 steps from `low` to `high`.
        low: The smallest mean.
        high: The largest mean.
        order: int64 (side,), the rows in the order in which they are divided.
        groups: Number of groups; row `order[p]` is in group `p * groups // side`.
    """

    levels: Tensor
    low: float
    high: float
    order: Tensor
    groups: int


def as_triangle(matrix: Tensor) -> Triangle | None:
    """A symmetric matrix with at most 256 rows as its upper triangle; None for any other."""
    if len(matrix) > MAX_SIDE or not _is_symmetric(matrix):
        return None
    i, j = torch.triu_indices(len(matrix), len(matrix))
    return Triangle(matrix[i, j], len(matrix))


def as_blocks(matrix: Tensor, labels: Tensor, groups: int = MAX_SIDE) -> Blocks | None:
    """A finite symmetric matrix as the means of blocks without the diagonal; None for any other.

    Args:
        matrix: (side, side), with at least `groups` rows.
        labels: (side,), rows with equal labels are put next to each other; empty: the order stays.
        groups: Number of groups.
    """
    side = len(matrix)
    if side < groups or not _is_symmetric(matrix) or not bool(matrix.isfinite().all()):
        return None
    order = torch.argsort(labels, stable=True) if len(labels) == side else torch.arange(side)
    group = torch.empty_like(order)
    group[order] = _groups(side, groups)
    by_row = torch.zeros(groups, side, dtype=matrix.dtype).index_add_(0, group, matrix)
    sums = torch.zeros(groups, groups, dtype=matrix.dtype).index_add_(1, group, by_row)
    sums -= torch.diag(torch.zeros(groups, dtype=matrix.dtype).index_add_(0, group, matrix.diagonal()))
    sizes = torch.bincount(group, minlength=groups).double()
    pairs = torch.outer(sizes, sizes) - torch.diag(sizes)
    means = sums / pairs.clamp(min=1)
    i, j = torch.triu_indices(groups, groups)
    upper = means[i, j]
    low, high = float(upper.min()), float(upper.max())
    levels = ((upper - low) / max(high - low, 1e-300) * _LEVELS).round().long()
    return Blocks(levels, low, high, order, groups)


def restored(reduced: Triangle | Blocks) -> Tensor:
    """The symmetric matrix, float64; each element of a block is its mean, and 0 on the diagonal."""
    if isinstance(reduced, Triangle):
        return _symmetric(reduced.values, reduced.side)
    values = reduced.low + reduced.levels.double() / _LEVELS * (reduced.high - reduced.low)
    group = torch.empty_like(reduced.order)
    group[reduced.order] = _groups(len(group), reduced.groups)
    return _symmetric(values, reduced.groups)[group][:, group].fill_diagonal_(0.0)


def _groups(side: int, groups: int) -> Tensor:
    return torch.arange(side) * groups // side


def _symmetric(upper: Tensor, side: int) -> Tensor:
    matrix = torch.zeros(side, side, dtype=upper.dtype)
    i, j = torch.triu_indices(side, side)
    matrix[i, j] = upper
    matrix[j, i] = upper
    return matrix


def _is_symmetric(matrix: Tensor) -> bool:
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and matrix.is_floating_point()
    return square and torch.equal(matrix, matrix.T)
