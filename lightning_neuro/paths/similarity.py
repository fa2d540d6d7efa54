"""How similar the paths of concepts are: overlap beyond chance, reuse of units, stability, and confused classes."""

import math

import torch
from torch import Tensor

TOP = 3


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every path with every other.

    Args:
        a: bool (K, units).
        b: bool (J, units).

    Returns:
        float64 (K, J), NaN if both paths are empty.
    """
    a, b = a.double(), b.double()
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - both
    return torch.where(either > 0, both / either, float("nan"))


def chance_iou(a: Tensor, b: Tensor, num_units: int) -> Tensor:
    """The expected intersection over union of two random sets of given sizes.

    It is exact: the intersection of sets of sizes a and b out of U units is hypergeometric. For many units it tends to
    pq / (p + q - pq), with p = a / U and q = b / U.

    Args:
        a: (K,) sizes.
        b: (J,) sizes.
        num_units: U.

    Returns:
        float64 (K, J), NaN if both sizes are 0.

    Example:
        >>> round(chance_iou(torch.tensor([1]), torch.tensor([1]), 4).item(), 6)
        0.25
    """
    sizes_a, where_a = torch.unique(a.long(), return_inverse=True)
    sizes_b, where_b = torch.unique(b.long(), return_inverse=True)
    log_factorial = torch.lgamma(torch.arange(1, num_units + 2, dtype=torch.float64, device=a.device))
    # Row by row, because all sizes at once would need gigabytes if hundreds of paths differ in size.
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
    probability = torch.where(possible, (ways - total).exp(), 0.0)
    found = (probability * shared / (a + only_b).clamp(min=1)).sum(1)
    return torch.where(b[:, 0] + a > 0, found, float("nan"))


def path_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union beyond chance: (IoU - E) / (1 - E), 1 for identical paths and 0 for random ones.

    Args:
        a: bool (K, units).
        b: bool (J, units).

    Returns:
        float64 (K, J); NaN if a path is empty, or if both keep every unit, because such paths are necessarily
        identical.
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
    """Stability of the paths since the previous evaluation, (s - overlap) / (self_overlap - overlap), from 0 to 1.

    s is the mean similarity of each concept's path with its path at the previous evaluation.

    Args:
        now: bool (K, units).
        before: bool (K, units), at the previous evaluation.
        overlap: Similarity of different concepts' paths; s would be as low if each path became another concept's path.
        self_overlap: Similarity of one concept's paths from two halves of its samples; s would be as high if only the
            samples had changed.

    Returns:
        A number from 0 to 1; NaN if `self_overlap` is not above `overlap`, or no concept has a path both times.
    """
    kept = float(path_similarity(now, before).diagonal().nanmean())
    if not self_overlap > overlap or math.isnan(kept):
        return math.nan
    return min(1.0, max(0.0, (kept - overlap) / (self_overlap - overlap)))


def reuse(paths: Tensor) -> dict[str, float]:
    """Fractions of the units that are in no path, in exactly one, and in at least half of them.

    Args:
        paths: bool (K, units), K at least 2.

    Returns:
        `unused_share`, `exclusive_share` and `common_share`.
    """
    users = paths.sum(0)
    many = max(2.0, len(paths) / 2)
    shares = {"unused_share": users == 0, "exclusive_share": users == 1, "common_share": users >= many}
    return {name: float(which.double().mean()) for name, which in shares.items()}


def cosine(features: Tensor) -> Tensor:
    """Cosine between the class means of a layer's activations, (K, units) -> (K, K), NaN if one is zero."""
    length = features.double().norm(dim=1, keepdim=True)
    direction = torch.where(length > 0, features.double() / length, float("nan"))
    return torch.mm(direction, direction.T)


def confusion_top3(confusion: Tensor, similarity: Tensor) -> float:
    """The fraction of wrong predictions whose class is among the three classes most similar to the true one.

    By chance alone it is 3 / (K - 1). If classes are equally similar, the remaining places are divided among them.

    Args:
        confusion: (K, K), how often a sample of the row's class was predicted as the column's.
        similarity: (K, K), of the classes; those with NaN are left out.

    Returns:
        A number from 0 to 1; NaN with fewer than 5 classes (it would be 1 by construction), or without a wrong
        prediction.

    Example:
        >>> closeness = -(torch.arange(6.0)[:, None] - torch.arange(6.0)).abs()
        >>> confusion_top3(torch.eye(6).roll(1, 1), closeness)
        0.8333333333333334
    """
    known = similarity.diagonal().isfinite()
    confusion, similarity = confusion[known][:, known].double(), similarity[known][:, known].double()
    if len(similarity) - 1 <= TOP:
        return math.nan
    wrong = confusion.clone().fill_diagonal_(0)
    others = similarity.nan_to_num(nan=-2.0).clone().fill_diagonal_(float("-inf"))
    third = others.topk(TOP, dim=1).values[:, -1:]
    # Paths of few units are often equally similar, and the order of the classes must not break the tie.
    nearer, level = (others > third).double(), (others == third).double()
    places = nearer + level * (TOP - nearer.sum(1, keepdim=True)) / level.sum(1, keepdim=True)
    total = wrong.sum()
    return float((wrong * places).sum() / total) if total > 0 else math.nan
