"""Measures of held-out scores that `stats.py` does not have, for all attributes at once."""

import math

import torch
from torch import Tensor

from lightning_neuro.stats import balanced_accuracy, wilson

NEWTON_STEPS = 25


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
    known = scores.isfinite() & y.isfinite()
    truth, filled = y.nan_to_num(nan=0.0), scores.nan_to_num(nan=0.0)
    saved = torch.zeros_like(filled)
    for k in range(num_folds):
        train, test = known & (fold != k)[:, None], known & (fold == k)[:, None]
        slope, offset = _logistic(filled, truth, train)
        count, positive = train.sum(0), (truth * train).sum(0)
        rate = (positive + 1) / (count + 2)
        by_rate = _log_loss(torch.logit(rate).expand_as(filled), truth)
        by_score = _log_loss(slope * filled + offset, truth)
        usable = (positive > 0) & (positive < count)
        saved += torch.where(test & usable, by_rate - by_score, 0.0)
        known = known & ~(test & ~usable)
    counted = known.sum(0)
    both = ((truth * known).sum(0) > 0) & (((1 - truth) * known).sum(0) > 0)
    return torch.where(both, saved.sum(0) / counted.clamp(min=1) / math.log(2), torch.nan)


def _log_loss(logits: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")


def _logistic(scores: Tensor, y: Tensor, use: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset, (C,) each, of a logistic function of the scores, by Newton's method.

    The targets are Platt's, slightly inside of 0 and 1, so that separable samples do not lead to an infinite slope.
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
