"""Which single units denote an attribute: rules found on some samples, tested on others, and compared with chance.

A unit's rule for an attribute is "above (or below) a threshold"; its rule for a set of classes is "above a threshold
means one of these classes". Both are found on one part of the samples and tested on the rest by their Matthews
correlation: with accuracy, units of pure noise would denote any rare attribute.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neuro.observers.class_sets import ClassSets, best_class_sets
from lightning_neuro.observers.rule_tests import (
    Tested,
    assess_sets,
    assess_thresholds,
    shuffled_orders,
    untested,
)
from lightning_neuro.observers.thresholds import sort_units, thresholds_of

DENOTES = 0.9
SIGNIFICANCE = 0.05
NUM_NULL_SAMPLES = 99
TRAIN_FRACTION = 0.4
MIN_POSITIVES = 2
MAX_TESTED = 8192  # samples; a correlation is then known to .01, and the product of all shuffles takes seconds
_CELLS = 2**22


@dataclass(frozen=True, eq=False)
class Denotation:
    """What each single unit denotes, on samples that were not used to find its rule.

    With class labels, the last column is for the unit's own best set of classes.

    Attributes:
        mcc: (units, A or A + 1) Matthews correlation of the rule with the attribute; NaN if it cannot be tested.
        lower: The lower 95 % bound of `mcc`, same shape.
        p: Family-wise p-values, same shape: the fraction of shuffles of the samples' attributes after which the best of
            all units and attributes is at least as good.
        proportion: The fraction of the samples with the attribute, same shape.
        sets: (units, K) bool, the classes of a unit's own best set; (units, 0) without class labels.
        firing: int64 (units,), number of samples above that set's threshold, among those used to find the rules.
        class_sizes: int64 (K,), number of these samples in each class.
        null_max: (samples of the null,), the largest of all correlations after each shuffle.
    """

    mcc: Tensor
    lower: Tensor
    p: Tensor
    proportion: Tensor
    sets: Tensor
    firing: Tensor
    class_sizes: Tensor
    null_max: Tensor

    @property
    def significant(self) -> Tensor:
        """Bool, of the shape of `mcc`: which rules are significant."""
        return self.p < SIGNIFICANCE

    def denoting(self, level: float = DENOTES) -> Tensor:
        """Which units denote an attribute or a set of classes: significant, with a lower bound of at least `level`.

        Args:
            level: Minimum of the lower bound: .9, or .8 for weak denotation.

        Returns:
            Bool (units,).
        """
        return (self.significant & (self.lower >= level)).any(1)

    def label_proportion(self) -> float:
        """The mean folded label proportion of the denoting units.

        Returns:
            Mean of min(p, 1 - p) over the denoting units, p being the fraction of samples with the attribute that the
            unit denotes best; NaN if there are no denoting units.
        """
        units = torch.nonzero(self.denoting()).flatten()
        if not len(units):
            return float("nan")
        best = torch.where(self.significant, self.mcc.nan_to_num(nan=-1.0), -1.0)[units].argmax(1)
        share = self.proportion[units, best]
        return float(torch.minimum(share, 1 - share).mean())


def find_denotation(
    x: Tensor,
    attributes: Tensor,
    labels: Tensor,
    fold: Tensor,
    num_folds: int,
    *,
    groups: Tensor | None = None,
    num_null_samples: int = NUM_NULL_SAMPLES,
    seed: int = 0,
) -> Denotation:
    """Find what each single unit denotes.

    It is done for four million activations at a time, so the memory does not grow with the number of units. Rules are
    tested on at most 8,192 samples.

    Args:
        x: (N, units) activations, finite, in the order of `attribute_order` (shuffles are drawn by position).
        attributes: (N, A) of 0, 1 and NaN.
        labels: int64 (N,), negative if unlabelled.
        fold: (N,) fold of each sample.
        num_folds: Number of folds; the first 40 % of them find the rules, the others test them.
        groups: int64 (N,); a shuffle would separate the samples of a group, so only one sample of each group is used
            for the tests.
        num_null_samples: Number of shuffles for the family-wise error.
        seed: Seed of the shuffles.

    Returns:
        The correlations, bounds and p-values of all units.
    """
    train = fold < max(1, round(TRAIN_FRACTION * num_folds))
    tested = _at_most(MAX_TESTED, ~train if groups is None else ~train & _one_of_each(groups))
    orders = shuffled_orders(int(tested.sum()), num_null_samples, seed).to(x.device)
    samples = _Samples(train, tested, orders, attributes.to(torch.float64), labels)
    some = max(1, _CELLS // max(1, len(x)))
    parts = [_denote(units, samples) for units in torch.split(x, some, dim=1)]
    null_max = torch.stack([rules.null_max for rules, _ in parts]).amax(0)
    mcc, lower, proportion = (
        torch.cat([getattr(rules, name) for rules, _ in parts]) for name in ("mcc", "lower", "proportion")
    )
    worse = torch.searchsorted(null_max.sort().values, mcc.nan_to_num(nan=-1.0) - 1e-9)
    p = (1 + len(null_max) - worse).to(mcc.dtype) / (1 + num_null_samples)
    return Denotation(
        mcc=mcc,
        lower=lower,
        p=torch.where(mcc.isfinite(), p, 1.0),
        proportion=proportion,
        sets=torch.cat([sets.members for _, sets in parts]),
        firing=torch.cat([sets.firing for _, sets in parts]),
        class_sizes=parts[0][1].class_sizes,
        null_max=null_max,
    )


@dataclass(frozen=True, eq=False)
class _Samples:
    """The samples, and which of them find and test the rules.

    Attributes:
        train: Bool (N,).
        tested: Bool (N,).
        orders: See `shuffled_orders`, of the tested ones.
        attributes: float64 (N, A).
        labels: int64 (N,).
    """

    train: Tensor
    tested: Tensor
    orders: Tensor
    attributes: Tensor
    labels: Tensor


def _denote(x: Tensor, samples: _Samples) -> tuple[Tested, ClassSets]:
    """What some units, (N, units), denote; attributes with too few samples of one kind are not looked for."""
    train, tested, orders = samples.train, samples.tested, samples.orders
    units = sort_units(x[train])
    sets = best_class_sets(x[train], samples.labels[train], units)
    x, y = x[tested].to(torch.float64), samples.attributes
    usable = _two_of_each(y[train]) & _two_of_each(y[tested])
    rules = untested(x.shape[1], y[tested], len(orders) - 1)
    if usable.any():
        threshold, sign = thresholds_of(units, y[train][:, usable])
        rules = rules.with_columns(usable, assess_thresholds(x, threshold, sign, y[tested][:, usable], orders))
    if sets.members.shape[1]:
        rules = rules.followed_by(assess_sets(x > sets.threshold, sets.members, samples.labels[tested], orders))
    return rules, sets


def _two_of_each(y: Tensor) -> Tensor:
    """Bool (A,): whether at least two samples have the attribute and two do not."""
    return ((y == 1).sum(0) >= MIN_POSITIVES) & ((y == 0).sum(0) >= MIN_POSITIVES)


def _at_most(number: int, chosen: Tensor) -> Tensor:
    """Bool (N,): of the chosen samples, every second, third, ..., which keeps the shares of all attributes."""
    rows = chosen.nonzero().flatten()
    kept = torch.zeros_like(chosen)
    kept[rows[:: max(1, -(-len(rows) // number))]] = True
    return kept


def _one_of_each(groups: Tensor) -> Tensor:
    """Bool (N,): one random sample of each group."""
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    turn = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).to(groups.device)
    first = turn.new_full((len(counts),), len(groups)).scatter_reduce(0, inverse, turn, "amin")
    return first[inverse] == turn
