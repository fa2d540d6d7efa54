"""How alike the paths of concepts are: overlap beyond chance, reuse of units, and whether confusion follows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TOP = 3


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every path with every other.

    Args:
        a: bool (K, units).
        b: bool (J, units).

    Returns:
        float64 (K, J), NaN where both paths are empty.
    """
    a, b = a.double(), b.double()
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - both
    return torch.where(either > 0, both / either, float("nan"))


def chance_iou(a: Tensor, b: Tensor, units: int) -> Tensor:
    """The expected intersection over union of two random sets of given sizes.

    Exactly: the intersection of sets of a and b out of U units is hypergeometric. For many units it tends to
    pq / (p + q - pq), with p = a / U and q = b / U.

    Args:
        a: (K,) sizes.
        b: (J,) sizes.
        units: U.

    Returns:
        float64 (K, J), NaN where both sizes are 0.

    Example:
        >>> round(chance_iou(torch.tensor([1]), torch.tensor([1]), 4).item(), 6)
        0.25
    """
    sizes_a, where_a = torch.unique(a.long(), return_inverse=True)
    sizes_b, where_b = torch.unique(b.long(), return_inverse=True)
    log_factorial = torch.lgamma(torch.arange(1, units + 2, dtype=torch.float64, device=a.device))
    # Row by row: all sizes at once would take gigabytes where hundreds of paths differ in size.
    expected = torch.stack([_expected(size, sizes_b, log_factorial) for size in sizes_a.tolist()])
    return expected[where_a][:, where_b]


def _expected(a: int, b: Tensor, log_factorial: Tensor) -> Tensor:
    """(J,): the expected intersection over union of a random set of size a with random sets of sizes b."""
    units, b = len(log_factorial) - 1, b[:, None]
    shared = torch.arange(a + 1, device=b.device)[None]
    only_b, neither = b - shared, units - a - b + shared
    possible = (only_b >= 0) & (neither >= 0)
    only_b, neither = only_b.clamp(min=0), neither.clamp(min=0)
    ways = log_factorial[a] - log_factorial[shared] - log_factorial[a - shared]
    ways = ways + log_factorial[units - a] - log_factorial[only_b] - log_factorial[neither]
    total = log_factorial[units] - log_factorial[b] - log_factorial[units - b]
    chances = torch.where(possible, (ways - total).exp(), 0.0)
    found = (chances * shared / (a + only_b).clamp(min=1)).sum(1)
    return torch.where(b[:, 0] + a > 0, found, float("nan"))


def path_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union beyond chance: (IoU - E) / (1 - E), 1 for the same path and 0 for random ones.

    Args:
        a: bool (K, units).
        b: bool (J, units).

    Returns:
        float64 (K, J); NaN where a path is empty, and where both keep every unit, which no chance could avoid.
    """
    expected = chance_iou(a.sum(1), b.sum(1), a.shape[1])
    found = (iou(a, b) - expected) / (1 - expected)
    defined = (expected < 1 - 1e-9) & a.any(1)[:, None] & b.any(1)[None]
    return torch.where(defined, found, float("nan"))


def mean_between(similarity: Tensor) -> float:
    """The mean over pairs of different concepts, NaN if there is none."""
    between = ~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return float(similarity[between].nanmean())


def stability(now: Tensor, before: Tensor, overlap: float, self_overlap: float) -> float:
    """How much of what tells a concept's path from the others' has stayed since the evaluation before, 0 to 1.

    Args:
        now: bool (K, units).
        before: The same, earlier.
        overlap: Similarity of different concepts' paths: what a path would keep that turned into another concept's.
        self_overlap: Similarity of one concept's paths from two halves of its samples: what it would keep if only the
            samples had changed.

    Returns:
        A number, NaN where the paths of one concept are no more alike than those of different ones, or no concept
        has had a path both times.
    """
    kept = float(path_similarity(now, before).diagonal().nanmean())
    if not self_overlap > overlap or kept != kept:
        return float("nan")
    return min(1.0, max(0.0, (kept - overlap) / (self_overlap - overlap)))


def reuse(paths: Tensor) -> dict[str, float]:
    """Shares of the units that serve no concept, exactly one, and at least half of them.

    Args:
        paths: bool (K, units), K at least 2.
    """
    users, half = paths.sum(0), len(paths) / 2
    shares = {"dead_units": users == 0, "exclusive_units": users == 1, "shared_units": users >= max(2.0, half)}
    return {name: float(which.double().mean()) for name, which in shares.items()}


def cosine(features: Tensor) -> Tensor:
    """Cosine between the class means of a layer's activations, (K, units) -> (K, K), NaN where one is zero."""
    length = features.double().norm(dim=1, keepdim=True)
    direction = torch.where(length > 0, features.double() / length, float("nan"))
    return torch.mm(direction, direction.T)


def confusion_top3(confusion: Tensor, similarity: Tensor) -> float:
    """The share of wrong predictions whose class is among the three most similar to the true one.

    By chance alone it is 3 / (K - 1). Classes that are equally similar share the places there are for them.

    Args:
        confusion: (K, K), how often a sample of the row's class was taken for the column's.
        similarity: (K, K), of the classes; those with NaN are left out.

    Returns:
        A number; NaN with fewer than 5 classes, where chance would do, or no wrong prediction.

    Example:
        >>> closeness = -(torch.arange(6.0)[:, None] - torch.arange(6.0)).abs()
        >>> confusion_top3(torch.eye(6).roll(1, 1), closeness)
        0.8333333333333334
    """
    known = similarity.diagonal().isfinite()
    confusion, similarity = confusion[known][:, known].double(), similarity[known][:, known].double()
    if len(similarity) - 1 <= TOP:
        return float("nan")
    wrong = confusion.clone().fill_diagonal_(0)
    others = similarity.nan_to_num(nan=-2.0).clone().fill_diagonal_(float("-inf"))
    third = others.topk(TOP, dim=1).values[:, -1:]
    # Paths of few units are often equally similar, and the order of the classes must not decide between them.
    nearer, level = (others > third).double(), (others == third).double()
    places = nearer + level * (TOP - nearer.sum(1, keepdim=True)) / level.sum(1, keepdim=True)
    total = wrong.sum()
    return float((wrong * places).sum() / total) if total > 0 else float("nan")


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties sharing their mean: (N,) -> float64 (N,)."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    mean: Tensor = ends - (counts - 1) / 2
    return mean[inverse]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two (N,) tensors; NaN if one does not vary."""
    both = torch.stack([ranks(a), ranks(b)])
    both = both - both.mean(1, keepdim=True)
    lengths = both.norm(dim=1)
    return float(both[0] @ both[1] / lengths.prod()) if bool((lengths > 0).all()) else float("nan")


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a value of the first kind lies above one of the second (ties half); NaN if a kind is missing."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return float("nan")
    order = ranks(torch.cat([positive, negative]))
    return float((order[:n].sum() - n * (n + 1) / 2) / (n * m))


def hierarchy_correlation(similarity: Tensor, kinship: Tensor) -> float:
    """Rank correlation, over pairs of classes, between a similarity and the kinship in a class tree.

    Args:
        similarity: (K, K).
        kinship: (K, K), as `tree_kinship` gives it.

    Returns:
        -1 to 1; NaN where one of them does not vary.
    """
    row, column = torch.triu_indices(len(similarity), len(similarity), 1, device=similarity.device)
    a, b = similarity[row, column], kinship.to(similarity.device)[row, column]
    known = a.isfinite() & b.isfinite()
    return rank_correlation(a[known], b[known]) if int(known.sum()) > 2 else float("nan")


def tree_kinship(tree: Sequence[Any], num_classes: int | None = None) -> Tensor:
    """How deep in a class tree two classes part.

    Args:
        tree: Nested sequences whose leaves are class numbers: `[[0, 2, [4, 6]], [5, 7, 9], 1, 3, 8]`.
        num_classes: K; default: the largest class in the tree plus one.

    Returns:
        float64 (K, K): the depth of the smallest branch that holds both, 0 for the root; NaN for a class that the tree
        lacks, and with itself.

    Raises:
        ValueError: If a leaf is no class number, or stands there twice.

    Example:
        >>> tree_kinship([[0, 1], 2])[0].tolist()
        [nan, 1.0, 0.0]
    """
    parted: dict[tuple[int, int], int] = {}
    # A bare number is a leaf, and no tree.
    leaves = [] if isinstance(tree, int) else _leaves(tree, 0, parted)
    if len(set(leaves)) < len(leaves) or not leaves:
        raise ValueError(f"hierarchy must hold each class once, but holds {sorted(leaves)}.")
    size = max(leaves) + 1
    kinship = torch.full((size, size), float("nan"), dtype=torch.float64)
    for (one, other), depth in parted.items():
        kinship[one, other] = kinship[other, one] = float(depth)
    if num_classes is None:
        return kinship
    missing = max(0, num_classes - size)
    return torch.nn.functional.pad(kinship, (0, missing, 0, missing), value=float("nan"))[:num_classes, :num_classes]


def _leaves(branch: Any, depth: int, parted: dict[tuple[int, int], int]) -> list[int]:
    """The classes below a branch; notes at which depth each two of them part."""
    if isinstance(branch, int) and not isinstance(branch, bool) and branch >= 0:
        return [branch]
    if isinstance(branch, str) or not isinstance(branch, Sequence):
        raise ValueError(f"hierarchy must be nested sequences of class numbers, but holds {branch!r}.")
    parts = [_leaves(part, depth + 1, parted) for part in branch]
    for number, part in enumerate(parts):
        for later in parts[number + 1 :]:
            parted |= {(one, other): depth for one in part for other in later}
    return [leaf for part in parts for leaf in part]
