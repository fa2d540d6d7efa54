"""How well held-out scores tell an attribute, for all attributes at once."""

import math

import torch
from torch import Tensor

NEWTON_STEPS = 25
ONE_SIDED_95 = 1.6448536269514722


def confusion(scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """True positives, false positives, false negatives, true negatives, (C,) each, of "a score above 0 means yes".

    Args:
        scores: (N, C), NaN where not scored.
        y: (N, C) of 0 and 1.
    """
    known = scores.isfinite() & y.isfinite()
    yes, has = scores > 0, y == 1
    cells = (yes & has, yes & ~has, ~yes & has, ~yes & ~has)
    tp, fp, fn, tn = ((cell & known).sum(0).to(torch.float64) for cell in cells)
    return tp, fp, fn, tn


def balanced_accuracy(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    """The mean of the shares of positives and of negatives told right; .5 by chance; NaN where a class is missing.

    Example:
        >>> import torch
        >>> balanced_accuracy(*torch.tensor([1.0, 5.0, 1.0, 15.0])).item()
        0.625
    """
    return (tp / (tp + fn) + tn / (tn + fp)) / 2


def matthews(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    """Matthews correlation, the correlation of prediction and truth; 0 where only one class is ever predicted.

    NaN where a class is missing.

    Example:
        >>> import torch
        >>> round(matthews(*torch.tensor([6.0, 1.0, 2.0, 3.0])).item(), 4)
        0.4781
    """
    truth = (tp + fn) * (fp + tn)
    predicted = (tp + fp) * (fn + tn)
    correlation = (tp * tn - fp * fn) / (truth * predicted).clamp(min=1.0).sqrt()
    return torch.where(truth > 0, correlation, torch.nan)


def auroc(scores: Tensor, y: Tensor) -> Tensor:
    """How often a positive sample scores higher than a negative one, a tie counting half; (C,).

    Args:
        scores: (N, C), NaN where not scored.
        y: (N, C) of 0 and 1.
    """
    known = scores.isfinite() & y.isfinite()
    positive, negative = known & (y == 1), known & (y == 0)
    below = torch.where(negative, scores, torch.inf).T.contiguous().sort(dim=1).values
    # A score that is not finite is no positive, so where it would be found does not matter.
    sought = torch.where(positive, scores, 0.0).T.contiguous()
    less = torch.searchsorted(below, sought).to(scores.dtype)
    not_more = torch.searchsorted(below, sought, right=True).to(scores.dtype)
    wins = (((less + not_more) / 2) * positive.T).sum(1)
    return wins / (positive.sum(0) * negative.sum(0))


def information_bits(scores: Tensor, y: Tensor, fold: Tensor, folds: int) -> Tensor:
    """Bits that an observer gets about the attribute from the state: less surprise at held-out samples, (C,).

    H(A) - H(A | state) in the sense of Xu et al. (2020): both are mean surprises at held-out samples, by the base rate
    and by a logistic function of the score, each set in the other folds. Negative where the observer misleads.

    Args:
        scores: (N, C) held-out scores, NaN where not scored.
        y: (N, C) of 0 and 1.
        fold: (N,).
        folds: Number of folds.
    """
    known = scores.isfinite() & y.isfinite()
    truth, filled = y.nan_to_num(nan=0.0), scores.nan_to_num(nan=0.0)
    saved = torch.zeros_like(filled)
    for k in range(folds):
        train, test = known & (fold != k)[:, None], known & (fold == k)[:, None]
        slope, offset = _logistic(filled, truth, train)
        count, positive = train.sum(0), (truth * train).sum(0)
        rate = (positive + 1) / (count + 2)
        by_rate = _surprise(torch.logit(rate).expand_as(filled), truth)
        by_score = _surprise(slope * filled + offset, truth)
        usable = (positive > 0) & (positive < count)
        saved += torch.where(test & usable, by_rate - by_score, 0.0)
        known = known & ~(test & ~usable)
    counted = known.sum(0)
    both = ((truth * known).sum(0) > 0) & (((1 - truth) * known).sum(0) > 0)
    return torch.where(both, saved.sum(0) / counted.clamp(min=1) / math.log(2), torch.nan)


def _surprise(logits: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")


def _logistic(scores: Tensor, y: Tensor, use: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset, (C,) each, of the logistic function of the scores, by Newton's method.

    The targets are Platt's, a little inside of 0 and 1: perfectly told samples must not ask for an infinite slope.
    """
    weight = use.to(scores.dtype)
    count = weight.sum(0).clamp(min=1.0)
    mean = (scores * weight).sum(0) / count
    spread = (((scores - mean) ** 2 * weight).sum(0) / count).sqrt()
    x = (scores - mean) / torch.where(spread > 0, spread, 1.0)
    positive = (y * weight).sum(0)
    target = torch.where(y > 0.5, (positive + 1) / (positive + 2), 1 / (count - positive + 2))
    slope, offset = torch.zeros_like(mean), torch.logit((positive + 1) / (count + 2))
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(slope * x + offset)
        error, curve = (p - target) * weight, p * (1 - p) * weight
        a, b, c = (curve * x * x).sum(0) + 1e-9, (curve * x).sum(0), curve.sum(0) + 1e-9
        g, h = (error * x).sum(0), error.sum(0)
        det = a * c - b * b
        step, shift = (c * g - b * h) / det, (a * h - b * g) / det
        # Far from the optimum a full step can overshoot.
        slope, offset = slope - step.clamp(-2, 2), offset - shift.clamp(-2, 2)
    slope = slope / torch.where(spread > 0, spread, torch.inf)
    return slope, offset - slope * mean


def wilson(hits: Tensor, count: Tensor, *, upper: bool = False) -> Tensor:
    """One-sided 95 % bound of a share (Wilson, 1927); 0 or 1 where nothing was counted.

    Example:
        >>> import torch
        >>> round(wilson(torch.tensor(50.0), torch.tensor(50.0)).item(), 3)
        0.949
    """
    z2 = ONE_SIDED_95**2
    n = count.clamp(min=1e-9)
    share = hits / n
    half = ONE_SIDED_95 * (share * (1 - share) / n + z2 / (4 * n**2)).clamp(min=0).sqrt()
    bound = (share + z2 / (2 * n) + (half if upper else -half)) / (1 + z2 / n)
    return torch.where(count > 0, bound.clamp(0, 1), 1.0 if upper else 0.0)


def balanced_accuracy_bounds(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> tuple[Tensor, Tensor]:
    """One-sided 95 % bounds of balanced accuracy, from those of its two shares (Zou and Donner, 2008)."""
    value = balanced_accuracy(tp, fp, fn, tn)
    shares = [(tp, tp + fn), (tn, tn + fp)]

    def distance(upper: bool) -> Tensor:
        return sum(((hits / n - wilson(hits, n, upper=upper)) ** 2 for hits, n in shares), torch.zeros_like(tp)).sqrt()

    return value - distance(False) / 2, value + distance(True) / 2


def matthews_lower(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    """A lower 95 % bound of Matthews correlation: that of the lower bounds of both shares, at the same base rate.

    Unlike a bootstrap's it stays below 1 for a rule that made no mistake in a few samples.
    """
    hit, reject = wilson(tp, tp + fn), wilson(tn, tn + fp)
    rate = (tp + fn) / (tp + fp + fn + tn).clamp(min=1e-9)
    predicted = rate * hit + (1 - rate) * (1 - reject)
    spread = (predicted * (1 - predicted)).clamp(min=1e-12)
    return (hit + reject - 1) * (rate * (1 - rate) / spread).sqrt()
