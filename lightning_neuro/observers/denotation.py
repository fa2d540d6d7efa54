"""Which single units denote an attribute: rules found on some samples, tested on others, and compared with chance.

A unit's rule for an attribute is "above (or below) a threshold"; its rule for a set of classes is "above a threshold
means one of these classes". Both are found on one part of the samples and tested on the rest by their Matthews
correlation: with accuracy, units of pure noise would denote any rare attribute.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neuro.observers.measures import matthews_lower
from lightning_neuro.stats import matthews

DENOTES = 0.9
SIGNIFICANCE = 0.05
NUM_NULL_SAMPLES = 99
TRAIN_FRACTION = 0.4
MIN_POSITIVES = 2
_CUTS = 15


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


@dataclass(frozen=True, eq=False)
class _Tested:
    """A rule of each unit, tested on samples in their own order and in shuffled ones.

    Attributes:
        mcc: (units,), see `Denotation`.
        lower: (units,), its lower bound.
        proportion: (units,), the fraction of samples with the attribute.
        null_max: (samples of the null,), the best correlation of all units after each shuffle; -1 if it is undefined.
    """

    mcc: Tensor
    lower: Tensor
    proportion: Tensor
    null_max: Tensor


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
    x, y = x.to(torch.float64), attributes.to(torch.float64)
    threshold, sign = best_thresholds(x[train], y[train])
    sets = best_class_sets(x[train], labels[train])
    tested = ~train if groups is None else ~train & _one_of_each(groups)
    orders = _orders(int(tested.sum()), num_null_samples, seed).to(x.device)
    above = x[tested]
    rules = [
        _test_rule((above > threshold[:, a]) == (sign[:, a] > 0), y[tested, a], orders, usable=_enough(y[train, a]))
        for a in range(y.shape[1])
    ]
    if sets.members.shape[1]:
        rules.append(_test_sets(above > sets.threshold, sets.members, labels[tested], orders))
    mcc = torch.stack([rule.mcc for rule in rules], 1)
    null_max = torch.stack([rule.null_max for rule in rules]).amax(0)
    beaten = (null_max >= mcc.nan_to_num(nan=-1.0)[..., None] - 1e-9).sum(-1)
    return Denotation(
        mcc=mcc,
        lower=torch.stack([rule.lower for rule in rules], 1),
        p=torch.where(mcc.isfinite(), (1 + beaten) / (1 + num_null_samples), 1.0),
        proportion=torch.stack([rule.proportion for rule in rules], 1),
        sets=sets.members,
        firing=sets.firing,
        class_sizes=sets.class_sizes,
        null_max=null_max,
    )


def _one_of_each(groups: Tensor) -> Tensor:
    """Bool (N,): one random sample of each group."""
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    turn = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).to(groups.device)
    first = turn.new_full((len(counts),), len(groups)).scatter_reduce(0, inverse, turn, "amin")
    return first[inverse] == turn


def _orders(count: int, num_null_samples: int, seed: int) -> Tensor:
    """(1 + samples of the null, count): the samples in their own order, then shuffled."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(count, generator=generator) for _ in range(num_null_samples)]
    return torch.stack([torch.arange(count), *shuffled])


def _enough(y: Tensor) -> bool:
    return bool((y == 1).sum() >= MIN_POSITIVES) and bool((y == 0).sum() >= MIN_POSITIVES)


def _test_rule(fires: Tensor, y: Tensor, orders: Tensor, *, usable: bool) -> _Tested:
    """Test one attribute, (n,), against each unit's own rule for it, (n, units)."""
    known = y.isfinite().float()
    truth, on = y.nan_to_num(nan=0.0).float(), fires.float()
    positive, asked = truth[orders], known[orders]
    proportion = (truth.sum() / known.sum()).double().expand(fires.shape[1])
    counts = positive @ on, asked @ on, positive.sum(1)[:, None], asked.sum(1)[:, None]
    return _tested(*counts, proportion, usable=usable and _enough(y))


def _test_sets(fires: Tensor, members: Tensor, labels: Tensor, orders: Tensor) -> _Tested:
    """Test each unit, (n, units), against its own set of classes."""
    known = labels >= 0
    # A class that did not occur when the sets were found is in none of them.
    seen = known & (labels < members.shape[1])
    inside = members[:, labels.where(seen, 0)].T & seen[:, None]
    # Row by row, because a product over all classes would grow with their number.
    hits = torch.stack([(fires & inside[order]).sum(0) for order in orders])
    # If all samples have a class, a shuffle does not change for how many of them a unit is active.
    different = orders[:1] if known.all() else orders
    yes = torch.stack([(fires & known[order, None]).sum(0) for order in different])
    return _tested(hits, yes, inside.sum(0), known.sum(), inside.sum(0) / known.sum(), usable=True)


def _tested(hits: Tensor, yes: Tensor, positive: Tensor, asked: Tensor, proportion: Tensor, *, usable: bool) -> _Tested:
    """The tests, from counts of true positives, predicted positives, positives and all, (1 + null samples, units)."""
    hits, yes, positive, asked = (part.double() for part in (hits, yes, positive, asked))
    cells = hits, yes - hits, positive - hits, asked - yes - positive + hits
    mcc = matthews(*cells)
    if not usable:
        undefined = torch.full_like(mcc[0], torch.nan)
        return _Tested(undefined, undefined, proportion, mcc.new_full((len(mcc) - 1,), -1.0))
    null_max = mcc[1:].nan_to_num(nan=-1.0).amax(1)
    return _Tested(mcc[0], matthews_lower(*(cell[0] for cell in cells)), proportion, null_max)


def best_thresholds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold and direction with which each unit best predicts each attribute, by Matthews correlation.

    Every threshold between two different values is tried.

    Args:
        x: (n, units), finite.
        y: (n, A) of 0, 1 and NaN.

    Returns:
        Thresholds, (units, A), infinite if no threshold is possible; and signs, (units, A), +1 if samples with the
        attribute lie above, else -1.

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
    """Each unit's largest correlation and its threshold, from sorted values and their y, (n, units)."""
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
        threshold: (units,), infinite if the unit does not vary.
        members: (units, K) bool.
        firing: int64 (units,), number of samples above the threshold.
        class_sizes: int64 (K,), number of samples in each class.
    """

    threshold: Tensor
    members: Tensor
    firing: Tensor
    class_sizes: Tensor


def best_class_sets(x: Tensor, labels: Tensor) -> ClassSets:
    """The threshold and the set of classes with the largest Matthews correlation, for each unit.

    For a given threshold the best set is one of the K - 1 sets of the classes in which the unit is active most often,
    so no search over 2^K sets is needed. The sets are found at 0 and at fifteen quantiles; the threshold of the best
    set is then optimized over all values.

    Args:
        x: (n, units), finite.
        labels: int64 (n,), negative if unlabelled.

    Returns:
        The sets and thresholds of all units.
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
    """The set of classes that best predicts whether a unit is active, and its Matthews correlation.

    Args:
        counts: (..., K), number of samples of each class in which a unit is active.
        sizes: (K,), number of samples of each class.

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
