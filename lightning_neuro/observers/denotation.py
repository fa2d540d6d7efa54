"""Which single units stand for an attribute: rules found on some samples, tested on others, against chance.

A unit's rule for an attribute is "above (or below) a threshold"; its rule for a set of classes is "above a threshold
means one of these classes". Both are found on one part of the samples and tested on the rest, by Matthews correlation:
with accuracy, units of pure noise would denote whatever is rare.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neuro.observers.measures import matthews, matthews_lower

DENOTES = 0.9
DENOTES_WEAKLY = 0.8
SIGNIFICANCE = 0.05
DRAWS = 99
TRAIN_SHARE = 0.4
MIN_POSITIVES = 2
_CUTS = 15


@dataclass(frozen=True, eq=False)
class Denotation:
    """What each unit alone tells, on samples that its rule was not found on.

    The last column stands for the unit's own best set of classes, where there are class labels.

    Attributes:
        mcc: (units, A or A + 1) Matthews correlation of the rule with the attribute; NaN where it cannot be tested.
        lower: The same shape, its lower 95 % bound.
        p: The same shape, family-wise: how often the best of all units and attributes did as well after the samples'
            attributes had been shuffled.
        proportion: The same shape, share of the samples with the attribute.
        sets: (units, K) bool, the classes of a unit's own best set; (units, 0) without class labels.
        firing: int64 (units,), how many of the samples that the rules were found on lie above that set's threshold.
        class_sizes: int64 (K,), their classes.
        null_max: (draws,), the best of all after each shuffle.
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
        """Units and attributes, as `mcc`, that belong together more than chance allows."""
        return self.p < SIGNIFICANCE

    def denoting(self, level: float = DENOTES) -> Tensor:
        """Units that stand for an attribute, bool (units,): the correlation's lower bound is at least `level`.

        Args:
            level: .9, or .8 for weak denotation.
        """
        return (self.significant & (self.lower >= level)).any(1)

    def label_proportion(self) -> float:
        """Mean over the denoting units of the share of samples with what they denote best, or without, if smaller.

        NaN where no unit denotes anything.
        """
        units = torch.nonzero(self.denoting()).flatten()
        if not len(units):
            return float("nan")
        best = torch.where(self.significant, self.mcc.nan_to_num(nan=-1.0), -1.0)[units].argmax(1)
        share = self.proportion[units, best]
        return float(torch.minimum(share, 1 - share).mean())


def denotation(
    x: Tensor,
    attributes: Tensor,
    labels: Tensor,
    fold: Tensor,
    folds: int,
    *,
    groups: Tensor | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Denotation:
    """Search every unit for what it denotes.

    Args:
        x: (N, units) activations, finite, in canonical order (shuffles are drawn by position).
        attributes: (N, A) of 0, 1 and NaN.
        labels: int64 (N,), negative where there is none.
        fold: (N,).
        folds: Number of folds; the first 40 % find the rules, the others test them.
        groups: int64 (N,); of the samples of one group, which a shuffle would tear apart, one alone is tested on.
        draws: Shuffles for the family-wise error.
        seed: Of the shuffles.
    """
    train = fold < max(1, round(TRAIN_SHARE * folds))
    x, y = x.to(torch.float64), attributes.to(torch.float64)
    threshold, sign = best_thresholds(x[train], y[train])
    sets = best_class_sets(x[train], labels[train])
    generator = torch.Generator().manual_seed(seed)
    tested = ~train if groups is None else ~train & _one_of_each(groups)
    count = int(tested.sum())
    # The first order is the samples' own.
    orders = torch.stack([torch.arange(count), *(torch.randperm(count, generator=generator) for _ in range(draws))])
    test = _Test(x[tested], orders.to(x.device))

    columns = [
        test.rule((test.x > threshold[:, a]) == (sign[:, a] > 0), y[tested, a], usable=_enough(y[train, a]))
        for a in range(y.shape[1])
    ]
    if sets.members.shape[1]:
        columns.append(test.sets(sets, labels[tested]))
    mcc, lower, proportion = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
    beaten = (test.null_max >= mcc.nan_to_num(nan=-1.0)[..., None] - 1e-9).sum(-1)
    p = torch.where(mcc.isfinite(), (1 + beaten) / (1 + draws), 1.0)
    return Denotation(mcc, lower, p, proportion, sets.members, sets.firing, sets.class_sizes, test.null_max)


def _one_of_each(groups: Tensor) -> Tensor:
    """Which samples stand for their group, bool (N,): one of each, drawn from all of it."""
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    turn = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).to(groups.device)
    first = turn.new_full((len(counts),), len(groups)).scatter_reduce(0, inverse, turn, "amin")
    return first[inverse] == turn


def _enough(y: Tensor) -> bool:
    return bool((y == 1).sum() >= MIN_POSITIVES) and bool((y == 0).sum() >= MIN_POSITIVES)


class _Test:
    """Rules tested on samples in their own order and in shuffled ones; keeps the best of all after each shuffle."""

    def __init__(self, x: Tensor, orders: Tensor) -> None:
        self.x, self.orders = x, orders
        self.null_max = x.new_full((len(orders) - 1,), -1.0)

    def rule(self, fires: Tensor, y: Tensor, *, usable: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One attribute, (n,), against each unit's own rule for it, (n, units)."""
        known = y.isfinite().float()
        truth, on = y.nan_to_num(nan=0.0).float(), fires.float()
        told, asked = truth[self.orders], known[self.orders]
        hits, yes = told @ on, asked @ on
        found = self._kept(hits, yes, told.sum(1)[:, None], asked.sum(1)[:, None], usable and _enough(y))
        return *found, (truth.sum() / known.sum()).double().expand(fires.shape[1])

    def sets(self, sets: "ClassSets", labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each unit against its own set of classes."""
        fires = self.x > sets.threshold
        known = labels >= 0
        # A class that was not there when the sets were found is in none of them.
        seen = known & (labels < sets.members.shape[1])
        inside = sets.members[:, labels.where(seen, 0)].T & seen[:, None]
        # Row by row: a product over all classes would grow with their number.
        hits = torch.stack([(fires & inside[order]).sum(0) for order in self.orders])
        # Where all samples have a class, a shuffle does not change how many of them a unit fires for.
        orders = self.orders[:1] if known.all() else self.orders
        yes = torch.stack([(fires & known[order, None]).sum(0) for order in orders])
        found = self._kept(hits, yes, inside.sum(0), known.sum(), True)
        return *found, inside.sum(0) / known.sum()

    def _kept(self, hits: Tensor, yes: Tensor, positive: Tensor, asked: Tensor, usable: bool) -> tuple[Tensor, Tensor]:
        hits, yes, positive, asked = (part.double() for part in (hits, yes, positive, asked))
        cells = hits, yes - hits, positive - hits, asked - yes - positive + hits
        mcc = matthews(*cells)
        if not usable:
            return torch.full_like(mcc[0], torch.nan), torch.full_like(mcc[0], torch.nan)
        null = mcc[1:].nan_to_num(nan=-1.0).amax(1) if len(mcc) > 1 else self.null_max
        self.null_max = torch.maximum(self.null_max, null)
        return mcc[0], matthews_lower(*(cell[0] for cell in cells))


def best_thresholds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold and direction with which each unit tells each attribute best, by Matthews correlation.

    Every cut between two different values is tried.

    Args:
        x: (n, units), finite.
        y: (n, A) of 0, 1 and NaN.

    Returns:
        Thresholds, (units, A), infinite where no cut is possible; and +1 where the attribute lies above, else -1.

    Example:
        >>> import torch
        >>> threshold, sign = best_thresholds(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [1.0], [0.0]]))
        >>> threshold.item(), sign.item()
        (3.0, -1.0)
    """
    values, order = x.sort(dim=0)
    thresholds, signs = [], []
    for a in range(y.shape[1]):
        best, threshold = _best_cut(values, y[:, a][order])
        thresholds.append(threshold)
        signs.append(torch.where(best < 0, -1.0, 1.0))
    if not thresholds:
        return x.new_zeros(x.shape[1], 0), x.new_zeros(x.shape[1], 0)
    return torch.stack(thresholds, 1), torch.stack(signs, 1)


def _best_cut(values: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each unit's largest correlation and its threshold, from sorted values and what is known of each, (n, units)."""
    if len(values) < 2:
        return values.new_zeros(values.shape[1]), values.new_full((values.shape[1],), torch.inf)
    ones, zeros = (y == 1).to(values.dtype).cumsum(0), (y == 0).to(values.dtype).cumsum(0)
    p, n, below_p, below_n = ones[-1], zeros[-1], ones[:-1], zeros[:-1]
    below = below_p + below_n
    spread = (p * n * below * (p + n - below)).clamp(min=0.0).sqrt()
    possible = (values[1:] > values[:-1]) & (spread > 0)
    mcc = torch.where(possible, (p * below_n - n * below_p) / spread.clamp(min=1e-9), 0.0)
    place = mcc.abs().argmax(0, keepdim=True)
    best = mcc.gather(0, place)[0]
    middle = values.gather(0, place)[0].lerp(values.gather(0, place + 1)[0], 0.5)
    return best, torch.where(best != 0, middle, torch.inf)


@dataclass(frozen=True, eq=False)
class ClassSets:
    """Each unit's best set of classes.

    Attributes:
        threshold: (units,), infinite where the unit does not vary.
        members: (units, K) bool.
        firing: int64 (units,), samples above the threshold.
        class_sizes: int64 (K,).
    """

    threshold: Tensor
    members: Tensor
    firing: Tensor
    class_sizes: Tensor


def best_class_sets(x: Tensor, labels: Tensor) -> ClassSets:
    """The threshold and the set of classes that belong together best, for each unit, by Matthews correlation.

    For one threshold the best set is exactly one of the K - 1 that hold the classes in which the unit fires most often,
    so no search over 2^K sets is needed. The sets are found at 0 and at fifteen quantiles; the best one's threshold is
    then the best of all.

    Args:
        x: (n, units), finite.
        labels: int64 (n,), negative where there is none.
    """
    labelled = labels >= 0
    x, labels = x[labelled], labels[labelled]
    units = x.shape[1]
    num_classes = int(labels.max()) + 1 if len(labels) else 0
    if num_classes < 2:
        none = torch.zeros(units, 0, dtype=torch.bool, device=x.device)
        empty = torch.zeros(units, dtype=torch.int64, device=x.device)
        return ClassSets(x.new_full((units,), torch.inf), none, empty, empty[:0])
    one_hot = torch.nn.functional.one_hot(labels, num_classes).to(x.dtype)
    sizes = one_hot.sum(0)
    quantiles = torch.quantile(x, torch.linspace(0, 1, _CUTS + 2, dtype=x.dtype, device=x.device)[1:-1], dim=0)
    cuts = torch.cat([x.new_zeros(1, units), quantiles])
    best, threshold = x.new_full((units,), 0.0), x.new_full((units,), torch.inf)
    members = torch.zeros(units, num_classes, dtype=torch.bool, device=x.device)
    for cut in cuts:
        fires = (x > cut).to(x.dtype)
        mcc, chosen = best_top_set(fires.T @ one_hot, sizes)
        better = mcc > best + 1e-12
        best, threshold = torch.where(better, mcc, best), torch.where(better, cut, threshold)
        members = torch.where(better[:, None], chosen, members)
    values, order = x.sort(dim=0)
    exact, cut = _best_cut(values, members.T[labels].to(x.dtype).gather(0, order))
    threshold = torch.where(exact > best, cut, threshold)
    return ClassSets(threshold, members, (x > threshold).sum(0), sizes.long())


def best_top_set(counts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The set of classes that goes best with each unit's being on, and its Matthews correlation.

    Args:
        counts: (..., K) in how many samples of each class a unit is on.
        sizes: (K,) samples of each class.

    Returns:
        The correlation, (...), and the set, bool (..., K).
    """
    rates = counts / sizes.clamp(min=1)
    order = torch.where(sizes > 0, rates, -1.0).argsort(dim=-1, descending=True, stable=True)
    hits = counts.gather(-1, order).cumsum(-1)[..., :-1]
    size = sizes.expand_as(counts).gather(-1, order).cumsum(-1)[..., :-1]
    on, total = counts.sum(-1, keepdim=True), sizes.sum()
    mcc = matthews(hits, on - hits, size - hits, total - on - size + hits).nan_to_num(nan=-1.0)
    best = mcc.max(dim=-1)
    rank = order.argsort(dim=-1)
    return best.values, rank <= best.indices[..., None]
