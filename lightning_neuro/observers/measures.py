"""Measures of held-out scores that `stats.py` does not have, for all attributes at once."""

import math

import torch
from torch import Tensor

from lightning_neuro.stats import balanced_accuracy, wilson

NEWTON_STEPS = 25
CONVERGED = 1e-9  # the error after this step is its square
_CELLS = 2**17  # numbers held of each kind, which stay in a processor's cache


def information_bits(scores: Tensor, y: Tensor, fold: Tensor, num_folds: int) -> Tensor:
    """Usable information in bits: how much the scores reduce the log-loss of held-out samples.

    H(A) - H(A | state) in the sense of Xu et al. (2020): both terms are mean log-losses of held-out samples, the first
    with the base rate, the second with a logistic function of the score, each fitted on the other folds. Negative if
    the scores mislead.

    Args:
        scores: (N, C) held-out scores, NaN where a sample is not scored.
        y: (N, C) of 0 and 1, NaN where unknown.
        fold: (N,) fold of each sample.
        num_folds: Number of folds.

    Returns:
        (C,), in bits; NaN if a class is missing.
    """
    some = max(1, _CELLS // max(1, num_folds * len(scores)))
    parts = zip(torch.split(scores, some, dim=1), torch.split(y, some, dim=1), strict=True)
    return torch.cat([_bits(*part, fold, num_folds) for part in parts]) if scores.shape[1] else scores.sum(0)


def _bits(scores: Tensor, y: Tensor, fold: Tensor, num_folds: int) -> Tensor:
    known = scores.isfinite() & y.isfinite()
    truth, filled = y.nan_to_num(nan=0.0), scores.nan_to_num(nan=0.0)
    others = fold != torch.arange(num_folds, device=fold.device)[:, None]
    train = (others[:, :, None] & known).to(scores.dtype)  # (folds, N, C): on which the functions are fitted
    count, positive = train.sum(1), (truth * train).sum(1)
    slope, offset = _logistic(filled, truth, train)
    rate = torch.logit((positive + 1) / (count + 2))
    saved = _log_loss(rate[fold], truth) - _log_loss(torch.addcmul(offset[fold], slope[fold], filled), truth)
    usable = ((positive > 0) & (positive < count))[fold]
    counted = (known & usable).to(scores.dtype)
    total, ones = counted.sum(0), (truth * counted).sum(0)
    both = (ones > 0) & (ones < total)
    return torch.where(both, (saved * counted).sum(0) / total.clamp(min=1) / math.log(2), torch.nan)


def _log_loss(logits: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")


def _logistic(scores: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset, (folds, C) each, of logistic functions of the scores, by Newton's method until it converges.

    The targets are Platt's, slightly inside of 0 and 1, so that separable samples do not lead to an infinite slope.

    Args:
        scores: (N, C), finite.
        y: (N, C) of 0 and 1.
        weight: (folds, N, C), 1 for the samples used, else 0.
    """
    count = weight.sum(1, keepdim=True).clamp(min=1.0)
    mean = (scores * weight).sum(1, keepdim=True) / count
    x = scores - mean
    spread = ((x.square() * weight).sum(1, keepdim=True) / count).sqrt()
    x /= torch.where(spread > 0, spread, 1.0)
    positive = (y * weight).sum(1, keepdim=True)
    low, high = 1 / (count - positive + 2), (positive + 1) / (positive + 2)
    target = torch.addcmul(low, y, high - low)
    slope, offset = torch.zeros_like(mean), torch.logit((positive + 1) / (count + 2))
    for _ in range(NEWTON_STEPS):
        p = torch.addcmul(offset, slope, x).sigmoid_()
        error = (p - target).mul_(weight)
        curve = (p - p.square()).mul_(weight)
        g, h, c = ((error * x).sum(1, keepdim=True), error.sum(1, keepdim=True), curve.sum(1, keepdim=True) + 1e-9)
        b = curve.mul_(x).sum(1, keepdim=True)
        a = curve.mul_(x).sum(1, keepdim=True) + 1e-9
        det = a * c - b * b
        # Far from the optimum a full step can overshoot.
        step = ((c * g - b * h) / det).clamp(-2, 2)
        shift = ((a * h - b * g) / det).clamp(-2, 2)
        slope, offset = slope - step, offset - shift
        if max(float(step.abs().max()), float(shift.abs().max())) < CONVERGED:
            break
    slope = slope / torch.where(spread > 0, spread, torch.inf)
    return slope[:, 0], (offset - slope * mean)[:, 0]


def balanced_accuracy_bounds(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> tuple[Tensor, Tensor]:
    """One-sided 95 % bounds of balanced accuracy (lower, upper) from those of its two rates (Zou and Donner, 2008)."""
    value = balanced_accuracy(tp, fp, fn, tn)
    rates = [(tp, tp + fn), (tn, tn + fp)]

    def distance(upper: bool) -> Tensor:
        return sum(((hits / n - wilson(hits, n, upper=upper)) ** 2 for hits, n in rates), torch.zeros_like(tp)).sqrt()

    return value - distance(False) / 2, value + distance(True) / 2


def matthews_lower(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    """A lower 95 % bound of Matthews correlation: its value at the lower bounds of both rates and the same base rate.

    Unlike a bootstrap bound, it stays below 1 for a rule that made no mistake on a few samples.
    """
    hit, reject = wilson(tp, tp + fn), wilson(tn, tn + fp)
    rate = (tp + fn) / (tp + fp + fn + tn).clamp(min=1e-9)
    predicted = rate * hit + (1 - rate) * (1 - reject)
    spread = (predicted * (1 - predicted)).clamp(min=1e-12)
    return (hit + reject - 1) * (rate * (1 - rate) / spread).sqrt()
