"""Thresholds of many units for many attributes, and their tests, against brute force."""

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from lightning_neuro.observers.denotation import find_denotation
from lightning_neuro.observers.measures import matthews_lower
from lightning_neuro.observers.rule_tests import assess_sets, assess_thresholds, shuffled_orders
from lightning_neuro.observers.thresholds import best_thresholds
from lightning_neuro.stats import confusion


def correlations(values, truth):
    """Of every cut of one unit with every attribute, (n, A), over the samples where it is known: (cuts, A)."""
    known = np.isfinite(truth)
    above = (values[None, :] > np.unique(values)[:-1, None]).astype(float)
    n, y = known.sum(0), np.nan_to_num(truth)
    both, yes, ones = above @ y, above @ known, y.sum(0)
    spread = np.sqrt(np.maximum(yes * (n - yes) * ones * (n - ones), 0))
    return np.divide(n * both - yes * ones, spread, out=np.zeros_like(both), where=spread > 0)


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("samples", [2, 9, 40])
def test_the_thresholds_of_many_units_and_attributes_are_those_of_brute_force(samples, missing):
    """More units and attributes than are worked on at once, a number of cuts that does not divide evenly, and ties."""
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 150, generator=generator).mul(4).round().relu()
    y = (torch.rand(samples, 140, generator=generator) < torch.linspace(0, 1, 140)).double()
    y[torch.rand(y.shape, generator=generator) < missing] = torch.nan
    thresholds, signs = best_thresholds(x, y)
    truth = y.numpy()
    for u in range(0, 150, 7):
        every = correlations(x[:, u].numpy(), truth) if x[:, u].unique().numel() > 1 else np.zeros((1, 140))
        best = np.abs(every).max(0)
        for a in np.flatnonzero(best > 0)[::5]:
            known = np.isfinite(truth[:, a])
            predicted = (x[known, u].numpy() > thresholds[u, a].item()) == (signs[u, a].item() > 0)
            assert matthews_corrcoef(truth[known, a], predicted) == pytest.approx(best[a])
        assert thresholds[u, best == 0].isinf().all()


def test_equal_thresholds_are_the_lowest_one():
    """Both cuts of 0, 1, 2 have a correlation of 1/2 with the middle sample's attribute."""
    thresholds, signs = best_thresholds(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [0.0]]))
    assert (thresholds.item(), signs.item()) == (0.5, 1.0)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_rules_are_tested_as_by_scikit_learn_in_every_order(missing):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y = (torch.rand(40, 4, generator=generator) < 0.4).double()
    y[torch.rand(y.shape, generator=generator) < missing] = torch.nan
    threshold = torch.randn(5, 4, generator=generator, dtype=torch.float64) / 2
    sign = torch.where(torch.rand(5, 4, generator=generator) < 0.5, -1.0, 1.0).double()
    orders = shuffled_orders(40, 6, seed=0)
    found = assess_thresholds(x, threshold, sign, y, orders)
    by_hand = np.zeros((7, 5, 4))
    for s, u, a in np.ndindex(7, 5, 4):
        truth = y[orders[s], a]
        known = truth.isfinite()
        predicted = (x[known, u] > threshold[u, a]) == (sign[u, a] > 0)
        by_hand[s, u, a] = matthews_corrcoef(truth[known], predicted)
        if s == 0:
            cells = confusion(predicted.double()[:, None] - 0.5, truth[known, None])
            assert found.lower[u, a].item() == pytest.approx(matthews_lower(*cells).item())
    np.testing.assert_allclose(found.mcc, by_hand[0], atol=1e-12)
    np.testing.assert_allclose(found.null_max, by_hand[1:].max((1, 2)), atol=1e-12)
    np.testing.assert_allclose(found.proportion[0], np.nanmean(y.numpy(), 0))


def test_sets_are_tested_as_by_scikit_learn_in_every_order():
    generator = torch.Generator().manual_seed(0)
    above = torch.rand(60, 4, generator=generator) < 0.4
    members = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1]]).bool()
    labels = torch.arange(60) % 5 - 1  # the class 3 is in no set, and some samples have none
    orders = shuffled_orders(60, 5, seed=0)
    found = assess_sets(above, members, labels, orders)
    by_hand = np.zeros((6, 4))
    for s, u in np.ndindex(6, 4):
        own = labels[orders[s]]
        inside = torch.isin(own, members[u].nonzero().flatten())
        by_hand[s, u] = matthews_corrcoef(inside[own >= 0], above[own >= 0, u])
    np.testing.assert_allclose(found.mcc[:, 0], by_hand[0], atol=1e-12)
    np.testing.assert_allclose(found.null_max, by_hand[1:].max(1), atol=1e-12)


def test_many_units_are_as_few_at_a_time():
    """More activations than are worked on at once: each unit is as it is alone, and the family is all of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(512) % 4
    y = (labels[:, None] < torch.tensor([1, 2])).double()
    x = torch.randn(512, 8300, generator=generator) + (labels == 0).float()[:, None] * torch.linspace(0, 3, 8300)
    fold = torch.arange(512) % 5
    whole = find_denotation(x, y, labels, fold, 5)
    ends = [find_denotation(x[:, part], y, labels, fold, 5) for part in (slice(0, 100), slice(8200, 8300))]
    for name in ("mcc", "lower", "proportion", "sets", "firing"):
        both = torch.cat([getattr(part, name) for part in ends])
        assert torch.equal(torch.cat([getattr(whole, name)[:100], getattr(whole, name)[8200:]]), both)
    assert (whole.null_max >= torch.stack([part.null_max for part in ends]).amax(0)).all()
    expected = (1 + (whole.null_max >= whole.mcc[8299, 0] - 1e-9).sum().item()) / 100
    assert whole.p[8299, 0].item() == pytest.approx(expected)
