"""Gains over a reference: the bound covers, and what counts as captured."""

import math

import pytest
import torch
from scipy.stats import norm

from lightning_neuro.observers import read_attributes
from lightning_neuro.observers.gain import captured, gain, references, undefined
from lightning_neuro.observers.measures import balanced_accuracy_bounds
from lightning_neuro.stats import balanced_accuracy


def scored(hits, rejections, positives, negatives):
    """(runs, 3), balanced accuracy and its bounds, from the numbers of correct samples of both kinds."""
    tp, tn = hits.double(), rejections.double()
    cells = (tp, negatives - tn, positives - tp, tn)
    return torch.stack([balanced_accuracy(*cells), *balanced_accuracy_bounds(*cells)], 1)


def draws(rate, count, runs, generator):
    return (torch.rand(runs, count, generator=generator) < rate).sum(1)


@pytest.mark.parametrize(
    ("now", "before"), [((0.9, 0.8), (0.7, 0.6)), ((0.95, 0.97), (0.5, 0.5)), ((0.6, 0.6), (0.6, 0.6))]
)
def test_the_bound_covers_the_true_gain_of_independent_scores(now, before):
    """In simulations with known rates the true gain lies above the bound in about 95 % of the runs."""
    generator = torch.Generator().manual_seed(0)
    positives, negatives, runs = 60, 200, 4000
    found = [
        scored(draws(high, positives, runs, generator), draws(low, negatives, runs, generator), positives, negatives)
        for high, low in (now, before)
    ]
    value, bound = gain(*found)
    truth = (sum(now) - sum(before)) / 2
    assert value.mean().item() == pytest.approx(truth, abs=0.005)
    assert (bound <= truth).double().mean().item() == pytest.approx(0.95, abs=0.02)


def test_the_bound_is_the_normal_one_for_many_samples():
    hits, rejections, n = torch.tensor([9000]), torch.tensor([8000]), 10_000
    now, before = scored(hits, rejections, n, n), scored(hits - 2000, rejections - 1000, n, n)
    rates = [0.9, 0.8, 0.7, 0.7]
    error = math.sqrt(sum(rate * (1 - rate) / n for rate in rates)) / 2
    assert gain(now, before)[1].item() == pytest.approx(0.15 - norm.ppf(0.95) * error, abs=1e-4)


def test_captured_needs_a_high_level_above_the_reference_and_the_controls():
    score = torch.tensor([[0.98, 0.96, 0.99]] * 5 + [[0.96, 0.94, 0.98]])
    reference = torch.tensor([[0.6, 0.5, 0.7]] * 6)
    reference[1] = torch.tensor([0.97, 0.95, 0.98])
    reference[2] = math.nan
    control = torch.tensor([0.6, 0.6, 0.6, 0.97, math.nan, 0.6])
    assert captured(score, reference, control).tolist() == [True, False, True, False, True, False]
    assert captured(score, reference).tolist() == [True, False, True, True, True, False]


def test_references_follow_the_names():
    found = references(["b", "a"], {"a": [0.5, 0.4, 0.6]})
    assert found[1].tolist() == [0.5, 0.4, 0.6] and found[0].isnan().all()
    assert references([], {}).shape == undefined(0).shape == (0, 3)


# Classes that the observer has not seen --------------------------------------------------------------------------


def planted(one_code: bool):
    """300 samples of 6 classes with an attribute in each; its direction is that of all classes, or of each its own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 6
    attribute = torch.rand(600, generator=generator) < 0.5
    directions = torch.eye(20)[labels * (not one_code)]
    centres = 3 * torch.cat([torch.zeros(6, 10), torch.randn(6, 10, generator=generator)], 1)
    noise = torch.randn(600, 20, generator=generator)
    return (
        centres[labels] + 2 * (2.0 * attribute[:, None] - 1) * directions + noise,
        attribute.double()[:, None],
        labels,
    )


def test_an_attribute_with_one_code_is_found_in_unseen_classes_and_others_are_not():
    shared, separate = (read_attributes(*planted(one_code)) for one_code in (True, False))
    assert shared.unseen_classes.item() > 0.95
    assert abs(separate.unseen_classes.item() - 0.5) < 0.2 < separate.balanced_accuracy.item() - 0.5


def test_unseen_classes_by_hand():
    """By scikit-learn's splitter and the class means of each training part."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

    x, attribute, labels = planted(one_code=True)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1e-6)
    y = attribute[:, 0].numpy()
    found = cross_val_predict(model, x.numpy(), y, groups=(labels % 5).numpy(), cv=LeaveOneGroupOut())
    assert read_attributes(x, attribute, labels).unseen_classes.item() == pytest.approx(
        balanced_accuracy_score(y, found), abs=0.03
    )


def test_classes_themselves_have_no_unseen_classes():
    x, attribute, labels = planted(one_code=True)
    assert read_attributes(x, labels).unseen_classes.isnan().all()
    assert read_attributes(x, attribute, labels % 2).unseen_classes.isnan().all()
    assert read_attributes(x, attribute).unseen_classes.isnan().all()
    single = read_attributes(x, (labels == 2).double()[:, None], labels)
    assert single.unseen_classes.isnan().all() and single.balanced_accuracy.item() > 0.9


# What the class alone allows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 6])
def test_a_correlate_of_the_class_is_no_gain_over_the_class(num_classes):
    """It agrees with the class in 90 %, and the activations hold nothing but the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % num_classes
    agrees = torch.rand(600, generator=generator) < 0.9
    attribute = torch.where(agrees, labels == 0, labels != 0).double()[:, None]
    x = torch.nn.functional.one_hot(labels, num_classes) + 0.1 * torch.randn(600, num_classes, generator=generator)
    found = read_attributes(x, attribute, labels)
    by_class = ((attribute[:, 0] == 1) == (labels == 0)).double()
    positive = attribute[:, 0] == 1
    expected = (by_class[positive].mean() + by_class[~positive].mean()) / 2
    assert found.from_class[0, 0].item() == pytest.approx(expected.item(), abs=0.01)
    assert found.balanced_accuracy.item() > 0.7 and found.gain_over_class_low.item() < 0


def test_what_is_beside_the_class_is_a_gain_over_it():
    found = read_attributes(*planted(one_code=True))
    assert found.gain_over_class_low.item() > 0.3
    assert read_attributes(planted(True)[0], planted(True)[2]).gain_over_class.isnan().all()  # the classes themselves
