"""Measures against scikit-learn, closed forms and simulation."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lightning_neuro.observers.measures import balanced_accuracy_bounds, information_bits, matthews_lower
from lightning_neuro.stats import auroc, balanced_accuracy, confusion, matthews


def test_a_constant_answer_is_chance_at_any_rate():
    y = torch.zeros(1000, 1, dtype=torch.float64)
    y[:10] = 1
    for constant in (-1.0, 1.0):
        scores = torch.full_like(y, constant)
        cells = confusion(scores, y)
        assert balanced_accuracy(*cells).item() == 0.5
        assert matthews(*cells).item() == 0.0
        assert auroc(scores, y).item() == 0.5
        assert abs(information_bits(scores, y, torch.arange(1000) % 5, 5).item()) < 2e-4


def test_one_class_is_undefined_not_perfect():
    scores, y = torch.ones(20, 1).double(), torch.ones(20, 1).double()
    cells = confusion(scores, y)
    fold = torch.arange(20) % 5
    for value in (balanced_accuracy(*cells), matthews(*cells), auroc(scores, y), information_bits(scores, y, fold, 5)):
        assert value.isnan().all()


def test_information_of_gaussian_scores_is_the_integral():
    """Scores N(+-1, 1), equal classes: the log-odds are 2s, and the information an integral over s."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(40_000) % 2).double()[:, None]
    scores = 2 * y - 1 + torch.randn(40_000, 1, generator=generator, dtype=torch.float64)
    grid = np.linspace(-8, 8, 4001)
    density = np.exp(-((grid - 1) ** 2) / 2) / math.sqrt(2 * math.pi)
    expected = 1 - np.trapezoid(density * np.log2(1 + np.exp(-2 * grid)), grid)
    found = information_bits(scores, y, torch.arange(40_000) % 5, 5).item()
    assert found == pytest.approx(expected, abs=0.01)
    # Neither scale nor offset of a score matters.
    again = information_bits(1000 * scores + 7, y, torch.arange(40_000) % 5, 5).item()
    assert again == pytest.approx(found, abs=1e-6)


def test_perfect_scores_give_nearly_the_entropy():
    y = (torch.arange(1000) % 10 == 0).double()[:, None]
    found = information_bits(20 * y - 10, y, torch.arange(1000) // 200, 5).item()
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    assert entropy - 0.03 < found < entropy


def test_the_base_rate_of_noise_gives_no_bits():
    generator = torch.Generator().manual_seed(0)
    found = [
        information_bits(
            torch.randn(400, 8, generator=generator, dtype=torch.float64),
            (torch.rand(400, 8, generator=generator) < 0.2).double(),
            torch.arange(400) % 5,
            5,
        )
        for _ in range(10)
    ]
    assert -0.02 < torch.cat(found).mean().item() < 0.0


def test_misleading_scores_give_negative_bits():
    y = (torch.arange(1000) % 2).double()[:, None]
    fold = (torch.arange(1000) // 2) % 5
    scores = torch.where(fold[:, None] == 0, 1 - 2 * y, 2 * y - 1)  # the first fold is the wrong way round
    assert information_bits(scores, y, fold, 5).item() < 0


def test_many_attributes_have_the_bits_that_each_has_alone():
    """More attributes than are worked on at once, some without a class in a fold, some with missing values."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    y = (scores + torch.randn(300, 200, generator=generator) > torch.linspace(-4, 4, 200)).double()
    y[torch.rand(y.shape, generator=generator) < 0.1] = math.nan
    y[:, 7] = 0
    fold = torch.arange(300) % 5
    found = information_bits(scores, y, fold, 5)
    alone = torch.cat([information_bits(scores[:, [a]], y[:, [a]], fold, 5) for a in range(200)])
    assert found[7].isnan() and found.isfinite().sum() > 100
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-9, equal_nan=True)


def test_the_fitted_logistic_function_is_the_one_of_scikit_learn():
    """With two folds, each sample's log-loss is that of the function fitted on the other half, with Platt's targets."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    y = (scores + torch.randn(200, 1, generator=generator) > 1).double()
    fold = torch.arange(200) % 2
    bits = 0.0
    for k in range(2):
        s, t = scores[fold != k, 0].numpy(), y[fold != k, 0].numpy()
        ones = t.sum()
        high, low = (ones + 1) / (ones + 2), 1 / (len(t) - ones + 2)
        weight = np.where(t == 1, high, low)
        model = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000).fit(
            np.concatenate([s, s])[:, None], np.repeat([1, 0], len(s)), np.concatenate([weight, 1 - weight])
        )
        own = y[fold == k, 0].numpy()
        p = model.predict_proba(scores[fold == k].numpy())[:, 1]
        rate = (ones + 1) / (len(t) + 2)
        bits += (np.log2(np.where(own == 1, p, 1 - p)) - np.log2(np.where(own == 1, rate, 1 - rate))).sum()
    assert information_bits(scores, y, fold, 2).item() == pytest.approx(bits / 200, abs=1e-6)


def test_bounds_of_balanced_accuracy_hold():
    rng = np.random.default_rng(0)
    n1, n0, sens, spec = 40, 300, 0.9, 0.8
    tp, tn = (torch.from_numpy(rng.binomial(n, p, 4000)).double() for n, p in ((n1, sens), (n0, spec)))
    low, high = balanced_accuracy_bounds(tp, n0 - tn, n1 - tp, tn)
    assert 0.93 < (low < (sens + spec) / 2).double().mean() < 0.985
    assert 0.92 < (high > (sens + spec) / 2).double().mean() < 0.985


def test_the_lower_bound_of_matthews_correlation_holds():
    rng = np.random.default_rng(0)
    n1, n0, sens, spec = 30, 270, 0.95, 0.99
    tp, tn = (torch.from_numpy(rng.binomial(n, p, 4000)).double() for n, p in ((n1, sens), (n0, spec)))
    truth = matthews(*(torch.tensor(v) for v in (n1 * sens, n0 * (1 - spec), n1 * (1 - sens), n0 * spec)))
    lower = matthews_lower(tp, n0 - tn, n1 - tp, tn)
    assert (lower < truth).double().mean() > 0.95
    assert (lower <= matthews(tp, n0 - tn, n1 - tp, tn)).all()
    # No mistake in few samples is no certainty.
    perfect = [float(matthews_lower(*map(torch.tensor, (n, 0.0, 0.0, 9 * n)))) for n in (5.0, 50.0, 500.0)]
    assert perfect[0] < 0.7 < perfect[1] < 0.97 < perfect[2] < 1
