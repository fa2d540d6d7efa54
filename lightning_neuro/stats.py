"""Statistics that several methods need, for many columns or rows at once and with missing values (NaN)."""

import torch
from torch import Tensor

ONE_SIDED_95 = 1.6448536269514722


def row_ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, from 1, ties sharing their mean rank (`scipy.stats.rankdata`), float64."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.detach().cpu().double().numpy(), axis=-1)).to(values.device)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman rank correlation of each row of `a` with the same row of `b`.

    Args:
        a: (m, n) or (1, n), real.
        b: (m, n) or (1, n), real.

    Returns:
        float64 (m,); NaN if a row is constant or holds NaN.

    Example:
        >>> import torch
        >>> spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 6.0, 9.0], [9.0, 6.0, 5.0]])).tolist()
        [1.0, -1.0]
    """
    x, y = row_ranks(a), row_ranks(b)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    spread = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return torch.where(spread > 0, (x * y).sum(-1) / spread, torch.nan)


def auroc(scores: Tensor, y: Tensor) -> Tensor:
    """Area under the ROC curve of each column: P(score of a positive > score of a negative), ties counting half.

    Args:
        scores: (N, C), NaN or infinite where a sample is not scored.
        y: (N, C) of 0 and 1, NaN where unknown.

    Returns:
        (C,); NaN if a class is missing.
    """
    known = scores.isfinite() & y.isfinite()
    positive, negative = known & (y == 1), known & (y == 0)
    below = torch.where(negative, scores, torch.inf).T.contiguous().sort(dim=1).values
    # Samples without a finite score are never counted as positives, so their ranks do not matter.
    sought = torch.where(positive, scores, 0.0).T.contiguous()
    less = torch.searchsorted(below, sought).to(scores.dtype)
    not_more = torch.searchsorted(below, sought, right=True).to(scores.dtype)
    wins = (((less + not_more) / 2) * positive.T).sum(1)
    return wins / (positive.sum(0) * negative.sum(0))


def confusion(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """True positives, false positives, false negatives and true negatives of predictions by `score > 0`.

    Args:
        scores: (N, C), NaN where a sample is not scored.
        y: (N, C) of 0 and 1, NaN where unknown.

    Returns:
        Four float64 (C,) tensors.
    """
    known = scores.isfinite() & y.isfinite()
    yes, has = scores > 0, y == 1
    cells = (yes & has, yes & ~has, ~yes & has, ~yes & ~has)
    tp, fp, fn, tn = ((cell & known).sum(0).to(torch.float64) for cell in cells)
    return tp, fp, fn, tn


def balanced_accuracy(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    """Balanced accuracy: the mean of sensitivity and specificity. Chance is 0.5; NaN if a class is missing.

    Example:
        >>> import torch
        >>> balanced_accuracy(*torch.tensor([1.0, 5.0, 1.0, 15.0])).item()
        0.625
    """
    return (tp / (tp + fn) + tn / (tn + fp)) / 2


def matthews(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    """Matthews correlation of prediction and truth; 0 if only one class is predicted, NaN if one is missing.

    Example:
        >>> import torch
        >>> round(matthews(*torch.tensor([6.0, 1.0, 2.0, 3.0])).item(), 4)
        0.4781
    """
    truth = (tp + fn) * (fp + tn)
    predicted = (tp + fp) * (fn + tn)
    correlation = (tp * tn - fp * fn) / (truth * predicted).clamp(min=1.0).sqrt()
    return torch.where(truth > 0, correlation, torch.nan)


def wilson(hits: Tensor, count: Tensor, *, upper: bool = False) -> Tensor:
    """One-sided 95 % bound of a proportion (Wilson, 1927); 0 or 1 if nothing was counted.

    Example:
        >>> import torch
        >>> round(wilson(torch.tensor(50.0), torch.tensor(50.0)).item(), 3)
        0.949
    """
    z2 = ONE_SIDED_95**2
    n = count.clamp(min=1e-9)
    proportion = hits / n
    half = ONE_SIDED_95 * (proportion * (1 - proportion) / n + z2 / (4 * n**2)).clamp(min=0).sqrt()
    bound = (proportion + z2 / (2 * n) + (half if upper else -half)) / (1 + z2 / n)
    return torch.where(count > 0, bound.clamp(0, 1), 1.0 if upper else 0.0)
