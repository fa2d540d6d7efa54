"""The fit against scikit-learn, brute force and itself in another form."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from lightning_neuro.observers.logistic import logistic_cross_fit
from lightning_neuro.observers.ridge import cross_fit, moments, ridge_penalty
from lightning_neuro.stats import balanced_accuracy, confusion
from tests.observers.planted import halfspaces


def standard(x):
    return (x - x.mean(0)) / x.std(0, correction=0)


def by_sklearn(x, y, rows):
    """Weights of one attribute, scaled to a distance of 1 between the class means in the rows."""
    x, y = x[rows].numpy(), y[rows].numpy()
    penalty = ridge_penalty(x.shape[1], len(x)) * len(x) * np.trace(np.cov(x.T, bias=True)) / x.shape[1]
    weights = Ridge(alpha=penalty, solver="svd").fit(x, y).coef_
    scores = x @ weights
    return weights / (scores[y == 1].mean() - scores[y == 0].mean())


# More samples than units, about as many, fewer: two ways to solve.
@pytest.mark.parametrize(("samples", "units"), [(200, 10), (60, 60), (70, 60), (40, 90)])
def test_weights_are_those_of_scikit_learn(samples, units):
    x, y = halfspaces(samples, units)
    x = standard(x * torch.linspace(1, 3, units))
    fold = torch.arange(samples) % 5
    fit = cross_fit(x, y, fold, 5)
    for a in range(3):
        np.testing.assert_allclose(fit.weights[a], by_sklearn(x, y[:, a], slice(None)), rtol=1e-6, atol=1e-8)
        for k in range(5):
            np.testing.assert_allclose(fit.fold_weights[k, a], by_sklearn(x, y[:, a], fold != k), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("units", [8, 60])
def test_a_missing_value_is_as_if_its_products_had_not_been_there(units):
    x, y = halfspaces(50, units, 2, seed=1)
    x = standard(x)
    y[::3, 1] = torch.nan
    fold = torch.arange(50) % 5
    fit = cross_fit(x, y, fold, 5)
    alone = cross_fit(x, y[:, :1], fold, 5)
    torch.testing.assert_close(fit.weights[0], alone.weights[0])
    assert torch.equal(fit.scores[:, 1].isnan(), y[:, 1].isnan())
    # Brute force: the covariance of all samples, the covariances with the attribute of those where it is known.
    known = y[:, 1].isfinite()
    xk, yk = x[known], y[known, 1]
    towards = (xk.T @ yk) / len(yk) - xk.mean(0) * yk.mean()
    covariance = x.T @ x / 50
    penalty = ridge_penalty(units, 50) * covariance.trace() / units
    w = torch.linalg.solve(covariance + penalty * torch.eye(units), towards)
    scores = xk @ w
    w = w / (scores[yk == 1].mean() - scores[yk == 0].mean())
    torch.testing.assert_close(fit.weights[1], w.double(), rtol=1e-6, atol=1e-8)


def test_moments_add_up_to_those_of_the_union():
    x, y = halfspaces(90, 7)
    y[4:20, 1] = torch.nan
    whole, parts = moments(x, y), [moments(x[part], y[part]) for part in torch.arange(90).split(25)]
    summed = parts[0] + parts[1] + parts[2] + parts[3]
    for name in vars(whole):
        torch.testing.assert_close(getattr(summed, name), getattr(whole, name), rtol=1e-13, atol=1e-12)
        left = getattr(whole - parts[0], name)
        torch.testing.assert_close(left, getattr(moments(x[25:], y[25:]), name), rtol=1e-12, atol=1e-12)


def test_a_held_out_sample_has_no_say_in_its_own_score():
    x, y = halfspaces(60, 5, 1)
    fold = torch.arange(60) % 3
    scores = cross_fit(x, y, fold, 3).scores
    flipped = y.clone()
    flipped[0] = 1 - flipped[0]
    again = cross_fit(x, flipped, fold, 3).scores
    own = fold == 0
    shift = again[own] - scores[own]
    # Its fold's observer did not see it. The fold's threshold comes from scores of the other folds, whose observers
    # did: one number, the same for all samples of the fold.
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-12)
    others = again[~own] - scores[~own]
    assert others.std() > 1e-3


def test_attributes_that_are_noise_are_told_by_chance_with_few_samples_and_many_units():
    generator = torch.Generator().manual_seed(0)
    for units, rate in ((5, 0.5), (60, 0.5), (60, 0.1), (300, 0.2)):
        x = standard(torch.randn(100, units, generator=generator, dtype=torch.float64))
        y = (torch.rand(100, 400, generator=generator) < rate).double()
        found = balanced_accuracy(*confusion(cross_fit(x, y, torch.arange(100) % 5, 5).scores, y))
        # Four standard errors of the mean of 400 attributes on the same samples, which are not independent.
        assert abs(found.nanmean().item() - 0.5) < 0.015


def test_the_threshold_is_the_middle_of_the_classes_scores_in_the_other_folds():
    x, y = halfspaces(90, 5, 1, seed=2)
    fold = torch.arange(90) % 3
    fit = cross_fit(x, y, fold, 3)
    raw = torch.stack([x[i] @ fit.fold_weights[fold[i], 0] for i in range(90)])
    middles = []
    for k in range(3):  # of the fit itself
        rows = fold != k
        s = x[rows] @ fit.fold_weights[k, 0]
        middles.append((s[y[rows, 0] == 1].mean() + s[y[rows, 0] == 0].mean()) / 2)
    raw = raw - torch.stack(middles)[fold]
    for k in range(3):
        rows = fold != k
        middle = (raw[rows & (y[:, 0] == 1)].mean() + raw[rows & (y[:, 0] == 0)].mean()) / 2
        torch.testing.assert_close(fit.scores[fold == k, 0], raw[fold == k] - middle)


def test_planted_attributes_are_read_and_noise_is_not():
    x, y = halfspaces(600, 20, 4)
    noise = torch.randint(0, 2, (600, 4), generator=torch.Generator().manual_seed(3)).double()
    fold = torch.arange(600) % 5
    scores = cross_fit(x, torch.cat([y, noise], 1), fold, 5).scores
    found = balanced_accuracy(*confusion(scores, torch.cat([y, noise], 1)))
    assert (found[:4] > 0.95).all()
    assert ((found[4:] - 0.5).abs() < 0.06).all()


def test_a_rare_attribute_is_found_where_a_cut_at_one_half_finds_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 20, generator=generator, dtype=torch.float64)
    y = (x[:, :3].sum(1) > torch.quantile(x[:, :3].sum(1), 0.971)).double()[:, None]  # 2.9 % positives
    fold = torch.arange(4000) % 5
    scores = cross_fit(standard(x), y, fold, 5).scores
    assert balanced_accuracy(*confusion(scores, y)).item() > 0.93
    naive = Ridge(alpha=1.0).fit(x[fold != 0], y[fold != 0, 0]).predict(x[fold == 0])
    told = torch.as_tensor(naive - 0.5)[:, None]
    assert balanced_accuracy(*confusion(told, y[fold == 0])).item() < 0.52


def test_units_far_outnumbering_samples_do_not_shift_the_threshold_to_the_common_class():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, generator=generator, dtype=torch.float64)
    y = (z > torch.quantile(z, 0.9)).double()[:, None]
    x = standard(z[:, None] * torch.rand(800, generator=generator) + torch.randn(500, 800, generator=generator))
    order = y[:, 0].argsort()
    fold = torch.empty(500, dtype=torch.int64)
    fold[order] = torch.arange(500) % 5
    tp, fp, fn, tn = confusion(cross_fit(x, y, fold, 5).scores, y)
    assert (tp / (tp + fn)).item() > 0.8
    assert (tn / (tn + fp)).item() > 0.8


def test_one_class_in_the_training_folds_gives_no_score():
    x, y = halfspaces(30, 4, 1)
    y[:] = 0
    y[7] = 1  # the other folds of this sample's own hold none
    fold = torch.arange(30) % 5
    fit = cross_fit(x, y, fold, 5)
    assert fit.scores[fold == fold[7]].isnan().all()
    assert torch.isnan(balanced_accuracy(*confusion(fit.scores, y))).all()
    # No positive sample is scored, so the threshold of the other folds stays that of the fit.
    for k in (0, 1, 3, 4):
        train = x[fold != k] @ fit.fold_weights[k, 0]
        positive = y[fold != k, 0] == 1
        middle = (train[positive].mean() + train[~positive].mean()) / 2
        torch.testing.assert_close(fit.scores[fold == k, 0], x[fold == k] @ fit.fold_weights[k, 0] - middle)


def test_constant_scores_are_chance():
    y = torch.zeros(1000, 1)
    y[:10] = 1  # 1 %
    cells = confusion(torch.zeros(1000, 1), y)
    assert balanced_accuracy(*cells).item() == 0.5


@pytest.mark.parametrize("samples", [400, 1000])
def test_ridge_and_logistic_observers_agree(samples):
    x, y = halfspaces(samples, 15, 4, seed=5)
    flips = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.15
    y = torch.where(flips, 1 - y, y)
    fold = torch.arange(samples) % 5
    found = [
        balanced_accuracy(*confusion(fit(standard(x), y, fold, 5).scores, y)) for fit in (cross_fit, logistic_cross_fit)
    ]
    assert (found[0] - found[1]).abs().max() < 0.03
    assert (found[0].mean() - found[1].mean()).abs() < 0.01


def test_logistic_observers_leave_out_what_is_missing():
    x, y = halfspaces(60, 4, 3)
    y[::2, 0] = torch.nan
    y[:, 1] = 1
    fit = logistic_cross_fit(x, y, torch.arange(60) % 3, 3)
    assert torch.equal(fit.scores[:, 0].isnan(), y[:, 0].isnan())
    assert fit.scores[:, 1].isnan().all()
    assert fit.scores[:, 2].isfinite().all()


def test_the_penalty_grows_with_units_per_sample():
    values = [ridge_penalty(10, 1000), ridge_penalty(100, 1000), ridge_penalty(1000, 1000), ridge_penalty(5000, 1000)]
    assert values == pytest.approx([1e-4, 1e-2, 1.0, 5.0])
