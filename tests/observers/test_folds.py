"""Folds that depend on content alone, and control attributes."""

import math

import pytest
import torch

from lightning_neuro.identity import content_hash
from lightning_neuro.observers import read_attributes
from lightning_neuro.observers.controls import control_attributes
from lightning_neuro.observers.folds import attribute_order, fold_groups, stratified_folds
from tests.observers.planted import classes


def test_the_canonical_order_is_one_for_all_orders():
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(60, 3, generator=generator) < 0.5).double()
    y[::9, 0] = math.nan
    key = torch.randint(-99, 99, (60,), generator=generator)
    other = torch.arange(60)
    first = attribute_order(y, key, other)
    shuffle = torch.randperm(60, generator=generator)
    again = attribute_order(y[shuffle], key[shuffle], other[shuffle])
    assert torch.equal(other[first], other[shuffle][again])
    ordered = [(*row.nan_to_num(nan=2.0).tolist(), k) for row, k in zip(y[first], key[first].tolist(), strict=True)]
    assert ordered == sorted(ordered)


def test_folds_hold_each_kind_of_sample_evenly_and_no_group_twice():
    y = torch.zeros(103, 1)
    y[:11] = 1
    order = attribute_order(y, torch.arange(103))
    fold = stratified_folds(torch.arange(103), 5)
    positives = torch.bincount(fold[y[order, 0] == 1], minlength=5)
    assert positives.max() - positives.min() <= 1
    assert torch.bincount(fold).max() - torch.bincount(fold).min() <= 1
    groups = torch.randint(0, 20, (103,), generator=torch.Generator().manual_seed(0))
    dealt = stratified_folds(groups, 5)
    for group in groups.unique():
        assert len(dealt[groups == group].unique()) == 1
    assert len(dealt.unique()) == 5


LABELS = torch.arange(200) % 10


def of_class(*chosen):
    return torch.isin(LABELS, torch.tensor(chosen)).double()


def test_controls_are_distinct_sets_of_the_same_size():
    y = torch.stack([of_class(0, 3, 5), of_class(1, 2, 3, 4, 5, 6, 8), of_class(4)], 1)
    found = control_attributes(y, LABELS, 20)
    assert found.of.sum(1).tolist() == [20, 20, 9]
    for a, size in enumerate((3, 3, 1)):
        chosen = found.values[:, found.of[a]]
        assert ((chosen.mean(0) * 10).round() == size).all()
        assert len(torch.unique(chosen, dim=1).T) == chosen.shape[1]
        # Neither itself nor its complement.
        assert not any(torch.equal(column, same) for column in chosen.T for same in (y[:, a], 1 - y[:, a]))
    assert torch.equal(found.values, control_attributes(y, LABELS, 20).values)


def test_controls_of_attributes_that_are_no_sets_have_about_their_share():
    y = (torch.rand(200, 1, generator=torch.Generator().manual_seed(0)) < 0.31).double()
    found = control_attributes(y, LABELS, 5)
    assert found.of.sum().item() == 5
    share = round(10 * y.mean().item()) / 10
    assert found.values[:, found.of[0]].mean(0).tolist() == pytest.approx([share] * 5)


def test_a_set_of_classes_has_controls_of_as_many_classes_however_common_it_is():
    labels = torch.cat([torch.zeros(100).long(), 1 + torch.arange(90) % 9])
    y = torch.stack([(labels == 0).double(), (labels != 0).double()], 1)
    found = control_attributes(y, labels, 20)
    for a in range(2):
        sets = [torch.unique(labels[column == 1]).tolist() for column in found.values[:, found.of[a]].T]
        assert sorted(sets) == [[k] for k in range(1, 10)]


def test_halves_and_their_complements_count_once():
    y = of_class(0, 1, 2, 3, 4)[:, None]
    found = control_attributes(y, LABELS, 500)
    assert found.of.sum().item() == 125  # 252 sets of five are 126 questions, of which one is the attribute's
    assert (found.values[0] == found.values[0, 0]).all()  # each of them holds class 0


def test_no_controls_without_three_classes():
    y = (torch.arange(60) % 2).double()[:, None]
    for labels in (torch.arange(60) % 2, torch.full((60,), -1)):
        assert control_attributes(y, labels, 20).of.shape == (1, 0)
    result = read_attributes(torch.randn(60, 3), y, torch.arange(60) % 2)
    assert result.selectivity.isnan().all()
    assert "selectivity" not in result.scalars()


def test_unlabelled_samples_are_missing_in_the_controls():
    labels = LABELS.clone()
    labels[:50] = -1
    found = control_attributes(of_class(1, 2)[:, None], labels, 20)
    assert found.values[:50].isnan().all() and found.values[50:].isfinite().all()


def test_random_sets_of_classes_have_no_selectivity_and_a_planted_attribute_has():
    x, labels = classes(600, 8, 10, noise=2.0)
    generator = torch.Generator().manual_seed(0)
    sets = torch.stack([torch.isin(labels, torch.randperm(10, generator=generator)[:5]).double() for _ in range(30)], 1)
    planted = (torch.rand(600, generator=generator) < 0.5).double()
    x[:, 0] += 6 * planted
    result = read_attributes(x, torch.cat([sets, planted[:, None]], 1), labels, denotation=False)
    assert result.balanced_accuracy[:30].mean() > 0.6
    assert abs(result.selectivity[:30].mean().item()) < 0.02
    assert result.selectivity[30].item() > 0.1


def test_groups_are_the_users_or_the_content_or_the_position():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    x[4] = x[1]
    mask = torch.ones(6, 3)
    given = fold_groups(torch.tensor([5, 5, 7, 7, 9, 9]), x, 6, num_before=0)
    assert torch.equal(given[::2], given[1::2]) and len(given.unique()) == 3
    alone = fold_groups(None, x, 6, num_before=0)
    assert alone[4] == alone[1] and len(alone.unique()) == 5
    # Neither the mask nor where the time is changes which samples are alike.
    both = fold_groups(None, {"mask": mask, "x": x}, 6, num_before=0)
    assert both[4] == both[1] and len(both.unique()) == 5
    assert torch.equal(fold_groups(None, x[None].repeat(3, 1, 1), 6, num_before=0), content_hash(x.repeat(1, 3)))
    assert fold_groups(None, ["a"] * 6, 6, num_before=12).tolist() == list(range(12, 18))
