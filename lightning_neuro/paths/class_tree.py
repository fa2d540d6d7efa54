"""A tree of the classes, and whether classes that are close in it have similar paths."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_neuro.checks import ArgumentError
from lightning_neuro.stats import spearman


def hierarchy_correlation(similarity: Tensor, kinship: Tensor) -> float:
    """Rank correlation, over pairs of classes, between a similarity and the kinship in a class tree.

    Args:
        similarity: (K, K).
        kinship: (K, K), as `tree_kinship` returns it.

    Returns:
        -1 to 1; NaN if one of them does not vary, or fewer than three pairs are known.
    """
    row, column = torch.triu_indices(len(similarity), len(similarity), 1, device=similarity.device)
    a, b = similarity[row, column], kinship.to(similarity.device)[row, column]
    known = a.isfinite() & b.isfinite()
    return float(spearman(a[known][None], b[known][None])) if int(known.sum()) > 2 else math.nan


def tree_kinship(tree: Sequence[Any], num_classes: int | None = None) -> Tensor:
    """The depth in a class tree at which each two classes separate.

    Args:
        tree: Nested sequences whose leaves are class numbers: `[[0, 2, [4, 6]], [5, 7, 9], 1, 3, 8]`.
        num_classes: K; default: the largest class in the tree plus one.

    Returns:
        float64 (K, K): the depth of the smallest branch that holds both classes, 0 for the root; NaN for a class that
        is not in the tree, and on the diagonal.

    Raises:
        ArgumentError: If a leaf is not a class number, or a class is in the tree twice.

    Example:
        >>> tree_kinship([[0, 1], 2])[0].tolist()
        [nan, 1.0, 0.0]
    """
    parted: dict[tuple[int, int], int] = {}
    # A single number is a leaf and not a tree.
    leaves = [] if isinstance(tree, int) else _leaves(tree, 0, parted)
    if len(set(leaves)) < len(leaves) or not leaves:
        raise ArgumentError(f"`hierarchy` must hold each class once; got the classes {sorted(leaves)}.")
    size = max(leaves) + 1
    kinship = torch.full((size, size), float("nan"), dtype=torch.float64)
    for (one, other), depth in parted.items():
        kinship[one, other] = kinship[other, one] = float(depth)
    if num_classes is None:
        return kinship
    missing = max(0, num_classes - size)
    return torch.nn.functional.pad(kinship, (0, missing, 0, missing), value=float("nan"))[:num_classes, :num_classes]


def _leaves(branch: Any, depth: int, parted: dict[tuple[int, int], int]) -> list[int]:
    """The classes below a branch; records in `parted` the depth at which each two of them separate."""
    if isinstance(branch, int) and not isinstance(branch, bool) and branch >= 0:
        return [branch]
    if isinstance(branch, str) or not isinstance(branch, Sequence):
        raise ArgumentError(f"`hierarchy` must be nested sequences of class numbers; got {branch!r} in it.")
    parts = [_leaves(part, depth + 1, parted) for part in branch]
    for number, part in enumerate(parts):
        for later in parts[number + 1 :]:
            parted |= {(one, other): depth for one in part for other in later}
    return [leaf for part in parts for leaf in part]
