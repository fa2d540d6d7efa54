"""Tests of the units' rules on samples that did not find them, in their own order and shuffled.

A shuffle reorders the samples' attributes. What is counted is in how many positive samples a unit is active; all
shuffles, units and attributes are one product of matrices of 0 and 1, exact in float32 up to 2^24 samples. The
correlation is linear in this count, because a shuffle changes neither how many samples are positive nor, if all values
are known, in how many a unit is active.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neuro.observers.measures import matthews_lower
from lightning_neuro.stats import matthews

_CELLS = 2**20


@dataclass(frozen=True, eq=False)
class Tested:
    """Rules tested on samples in their own order and in shuffled ones.

    Attributes:
        mcc: float64 (units, A), the Matthews correlation of each rule with its attribute.
        lower: float64 (units, A), its lower 95 % bound.
        proportion: float64 (units, A), the fraction of samples with the attribute.
        null_max: float64 (samples of the null,), the best correlation of all rules after each shuffle; -1 if undefined.
    """

    mcc: Tensor
    lower: Tensor
    proportion: Tensor
    null_max: Tensor

    def with_columns(self, columns: Tensor, tested: "Tested") -> "Tested":
        """These tests, with those of some attributes, bool (A,), replaced."""
        mcc, lower, proportion = self.mcc.clone(), self.lower.clone(), self.proportion.clone()
        mcc[:, columns], lower[:, columns], proportion[:, columns] = tested.mcc, tested.lower, tested.proportion
        return Tested(mcc, lower, proportion, torch.maximum(self.null_max, tested.null_max))

    def followed_by(self, other: "Tested") -> "Tested":
        """These tests and others, of the same units after the same shuffles."""
        return Tested(
            torch.cat([self.mcc, other.mcc], 1),
            torch.cat([self.lower, other.lower], 1),
            torch.cat([self.proportion, other.proportion], 1),
            torch.maximum(self.null_max, other.null_max),
        )


def untested(num_units: int, y: Tensor, num_null_samples: int) -> Tested:
    """No tests, of attributes, float64 (n, A), that have too few samples."""
    proportion = (y.nansum(0) / y.isfinite().sum(0)).expand(num_units, -1)
    undefined = torch.full_like(proportion, torch.nan)
    return Tested(undefined, undefined, proportion, y.new_full((num_null_samples,), -1.0))


def shuffled_orders(count: int, num_null_samples: int, seed: int) -> Tensor:
    """int64 (1 + samples of the null, count): the samples in their own order, then shuffled."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(count, generator=generator) for _ in range(num_null_samples)]
    return torch.stack([torch.arange(count), *shuffled])


def assess_thresholds(x: Tensor, threshold: Tensor, sign: Tensor, y: Tensor, orders: Tensor) -> Tested:
    """Test each unit's own threshold for each attribute; some attributes at a time, which bounds the memory.

    Args:
        x: (n, units), finite.
        threshold: float64 (units, A).
        sign: float64 (units, A), -1 if samples with the attribute lie below.
        y: (n, A) of 0, 1 and NaN, at least one attribute, with both classes each.
        orders: See `shuffled_orders`.
    """
    some = max(1, _CELLS // max(1, x.numel(), orders.numel()))
    values = (y.nan_to_num(nan=0.0).T.float(), y.isfinite().T.float(), threshold.T.contiguous(), sign.T.contiguous())
    pieces = zip(*(torch.split(value, some) for value in values), strict=True)
    parts = [_test_some(x, *piece, orders=orders) for piece in pieces]
    mcc, lower, proportion = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("mcc", "lower", "proportion")
    )
    return Tested(mcc, lower, proportion, torch.stack([part.null_max for part in parts]).amax(0))


def _test_some(x: Tensor, truth: Tensor, known: Tensor, threshold: Tensor, sign: Tensor, *, orders: Tensor) -> Tested:
    """Test the thresholds, (A, units), of attributes, (A, n)."""
    above = torch.empty(len(threshold), *x.shape, dtype=torch.float32, device=x.device)
    torch.gt(x, threshold[:, None], out=above)  # directly as numbers, which takes a third of the time

    def counts(of: Tensor) -> Tensor:
        """(A, orders, units), in how many of these samples each unit is above its threshold."""
        return (of.index_select(1, orders.flatten()).view(len(of), *orders.shape) @ above).double()

    complete = bool(known.all())
    asked, positive = (values.sum(1).double()[:, None, None] for values in (known, truth))
    hits, yes = counts(truth), above.sum(1, keepdim=True).double() if complete else counts(known)
    tp, fp, fn, tn = _cells(hits[:, 0], yes[:, 0], positive[:, 0], asked[:, 0])
    # A rule "below the threshold" is the complement of one above, with the opposite correlation.
    swapped = ((tp, fn), (fp, tn), (fn, tp), (tn, fp))
    own = [torch.where(sign < 0, below, high) for high, below in swapped]
    if complete:
        spread = (positive * (asked - positive) * yes * (asked - yes)).clamp(min=1.0).sqrt()
        slope = sign[:, None] / spread
        null = hits[:, 1:].mul_(asked * slope).sub_(positive * yes * slope)
    else:
        null = matthews(*_cells(hits[:, 1:], yes[:, 1:], positive, asked)) * sign[:, None]
    proportion = (positive / asked)[:, 0].expand_as(sign)
    return Tested(matthews(*own).T, matthews_lower(*own).T, proportion.T, null.amax((0, 2)))


def _cells(hits: Tensor, yes: Tensor, positive: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """True and false positives, false and true negatives."""
    return hits, yes - hits, positive - hits, asked - yes - positive + hits


def assess_sets(above: Tensor, members: Tensor, labels: Tensor, orders: Tensor) -> Tested:
    """Test each unit, bool (n, units), against its own set of classes, bool (units, K); A is 1."""
    known = labels >= 0
    # A class that did not occur when the sets were found is in none of them.
    seen = known & (labels < members.shape[1])
    inside = (members.T[labels.where(seen, 0)] & seen[:, None]).float().contiguous()
    fires = above.float().contiguous()
    some = max(1, _CELLS // 4 // max(1, fires.numel()))

    def counts(of: Tensor, orders: Tensor) -> Tensor:
        # A few orders at a time, because a product over all classes would grow with their number.
        shuffled = (of.index_select(0, part.flatten()).view(*part.shape, -1) for part in torch.split(orders, some))
        return torch.cat([part.mul(fires).sum(1) for part in shuffled]).double()

    # If all samples have a class, a shuffle does not change for how many of them a unit is active.
    yes = counts(known[:, None].float(), orders[:1] if known.all() else orders)
    positive, asked = inside.sum(0).double(), known.sum().double()
    cells = _cells(counts(inside, orders), yes, positive, asked)
    mcc = matthews(*cells)
    null_max = mcc[1:].nan_to_num(nan=-1.0).amax(1)
    lower = matthews_lower(*(cell[0] for cell in cells))
    return Tested(mcc[0, :, None], lower[:, None], (positive / asked)[:, None], null_max)
