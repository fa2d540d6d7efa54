"""Single units: rules against brute force, planted units, and noise at every firing rate."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from lightning_neuro.observers import depth_curve, read_attributes
from lightning_neuro.observers.class_sets import best_class_sets, best_top_set
from lightning_neuro.observers.denotation import find_denotation
from lightning_neuro.observers.thresholds import best_thresholds
from tests.observers.planted import classes


def test_the_best_threshold_is_the_one_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(25, 4, generator=generator, dtype=torch.float64).mul(3).round()  # with ties
    y = (torch.rand(25, 3, generator=generator) < 0.4).double()
    y[::5, 2] = torch.nan
    thresholds, signs = best_thresholds(x, y)
    for u, a in itertools.product(range(4), range(3)):
        known = y[:, a].isfinite().numpy()
        truth, values = y[known, a].numpy(), x[known, u].numpy()
        every = [abs(matthews_corrcoef(truth, values > cut)) for cut in np.unique(x[:, u])[:-1]]
        predicted = (values > thresholds[u, a].item()) == (signs[u, a].item() > 0)
        assert matthews_corrcoef(truth, predicted) == pytest.approx(max(every))


def test_a_constant_unit_has_no_threshold():
    thresholds, _ = best_thresholds(torch.ones(10, 1).double(), (torch.arange(10) % 2).double()[:, None])
    assert thresholds.isinf().all()


def test_the_best_set_of_classes_is_the_one_of_all_sets():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 80)
    for _ in range(8):
        on = rng.random(80) < rng.random(6)[labels]
        counts = torch.tensor([float(on[labels == c].sum()) for c in range(6)])
        sizes = torch.tensor([float((labels == c).sum()) for c in range(6)])
        found, members = best_top_set(counts, sizes)
        sets = [s for size in range(1, 6) for s in itertools.combinations(range(6), size)]
        best = max(matthews_corrcoef(np.isin(labels, s), on) for s in sets)
        assert found.item() == pytest.approx(best)
        own = np.isin(labels, torch.nonzero(members).flatten().numpy())
        assert matthews_corrcoef(own, on) == pytest.approx(best)


def test_class_sets_of_planted_units():
    labels = torch.arange(400) % 8
    sets = [{0}, {1, 5}, {2, 3, 4}, {0, 1, 2, 3}]
    x = torch.stack([torch.tensor([float(int(c) in s) for c in labels]) for s in sets], 1).double()
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = best_class_sets(x, labels)
    assert [set(torch.nonzero(row).flatten().tolist()) for row in found.members] == sets
    assert found.firing.tolist() == [50, 100, 150, 200]
    assert found.class_sizes.tolist() == [50] * 8
    unlabelled = best_class_sets(x, torch.full((400,), -1))
    assert unlabelled.members.shape == (4, 0)


def folds(samples):
    return torch.arange(samples) // 10 % 5


def test_planted_units_denote_and_others_do_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 10
    mark = (torch.rand(1000, generator=generator) < 0.3).double()
    x = torch.randn(1000, 6, generator=generator, dtype=torch.float64)
    x[:, 0] = mark + 0.05 * x[:, 0]
    x[:, 1] = -((labels == 3).double()) + 0.05 * x[:, 1]  # falls silent for class 3
    x[:, 2] = (labels < 4).double() + 0.05 * x[:, 2]
    found = find_denotation(x, torch.stack([mark, (labels == 3).double()], 1), labels, folds(1000), 5)
    assert found.denoting().tolist() == [True, True, True, False, False, False]
    assert found.significant.tolist()[:3] == [[True, False, False], [False, True, True], [False, True, True]]
    assert not found.significant[3:].any()
    assert found.mcc[0, 0].item() == pytest.approx(1.0)
    assert found.mcc[2, 2].item() == pytest.approx(1.0)
    assert found.mcc[2, 1].item() < 0.5
    torch.testing.assert_close(found.proportion[2, 2].item(), 0.4)
    # What each denotes: the mark (.3), class 3 (.1) or its complement, four classes (.4).
    assert found.label_proportion() == pytest.approx((mark.mean().item() + 0.1 + 0.4) / 3, abs=0.02)
    assert found.lower[0, 0].item() < 1


def test_noise_denotes_in_at_most_five_percent_of_families():
    """ReLU noise active at a rate, 20 units x (10 classes + a set each): any find in a family is a false one."""
    wrong, families = 0, 0
    for rate, seed in itertools.product((0.02, 0.1, 0.3, 0.5, 0.9), range(20)):
        generator = torch.Generator().manual_seed(seed)
        threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - rate))
        x = (torch.randn(200, 20, generator=generator) - threshold).relu()
        labels = torch.randint(0, 10, (200,), generator=generator)
        y = torch.nn.functional.one_hot(labels, 10).double()
        found = find_denotation(x, y, labels, folds(200), 5, seed=seed)
        wrong += bool(found.significant.any())
        families += 1
        assert not found.denoting(0.8).any()
    # With a true rate of 5 % more than 11 of 100 happen once in a hundred times.
    assert families == 100 and wrong <= 11


def test_p_is_uniform_enough_to_find_something_and_counts_draws():
    x, labels = classes(300, 8, 5)
    found = find_denotation(
        x, torch.nn.functional.one_hot(labels, 5).double(), labels, folds(300), 5, num_null_samples=19
    )
    assert found.p.min().item() == pytest.approx(1 / 20)
    assert len(found.null_max) == 19
    assert ((found.p * 20 - (found.p * 20).round()).abs() < 1e-9).all()
    expected = (1 + (found.null_max >= found.mcc[2, 1] - 1e-9).sum()) / 20
    assert found.p[2, 1].item() == pytest.approx(expected.item())


def test_missing_values_are_masked_in_the_test():
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(300, 1, generator=generator) < 0.5).double()
    x = y + 0.01 * torch.randn(300, 1, generator=generator)
    wrong = torch.rand(300, generator=generator) < 0.3
    x[wrong] = 1 - x[wrong]
    y[wrong] = torch.nan
    none = torch.full((300,), -1)
    found = find_denotation(x, y, none, folds(300), 5)
    assert found.mcc.item() == pytest.approx(1.0)
    assert found.mcc.shape == (1, 1)


def test_too_few_positives_are_not_tested():
    y = torch.zeros(100, 1).double()
    y[:3] = 1
    found = find_denotation(torch.rand(100, 4), y, torch.full((100,), -1), folds(100), 5)
    assert found.mcc.isnan().all()
    assert (found.p == 1).all()
    assert not found.denoting().any()
    assert np.isnan(found.label_proportion())


def layer(size, seed, labels, units=12, noise=0.15):
    """Units each standing for a set of `size` of 10 classes."""
    generator = torch.Generator().manual_seed(seed)
    member = torch.zeros(units, 10)
    for unit in range(units):
        member[unit, torch.randperm(10, generator=generator)[:size]] = 1
    return member[:, labels].T + noise * torch.randn(len(labels), units, generator=generator)


def test_planted_depth_is_found_and_beyond_chance():
    labels = torch.arange(600) % 10
    found = [read_attributes(layer(size, seed, labels), labels).denotation for seed, size in enumerate((5, 4, 3, 2, 1))]
    curve = depth_curve(found)
    assert curve.num_significant.tolist() == [12] * 5
    torch.testing.assert_close(curve.proportion, torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1]).double(), atol=0.01, rtol=0)
    assert curve.rho == pytest.approx(-1.0)
    assert curve.scalars()["proportion_depth_rho_p"] == pytest.approx(1 / 200)


def test_depth_without_change_is_within_chance():
    labels = torch.arange(600) % 10
    sizes = (1, 3, 5)
    clouds = [torch.cat([layer(size, 10 * seed + size, labels, units=5) for size in sizes], 1) for seed in range(4)]
    curve = depth_curve([read_attributes(x, labels).denotation for x in clouds])
    assert curve.num_significant.tolist() == [15] * 4
    torch.testing.assert_close(curve.proportion, torch.full((4,), 0.3).double(), atol=0.01, rtol=0)
    scalars = curve.scalars()
    assert abs(scalars["proportion_depth_rho"]) < 0.1 and scalars["proportion_depth_rho_p"] > 0.05


def test_the_null_of_depth_is_that_of_shuffled_labels():
    """Dealt firings against labels that are really shuffled."""
    labels = torch.arange(300) % 6
    x = layer(3, 0, labels.clamp(max=9), noise=0.5)
    found = read_attributes(x, labels).denotation
    curve = depth_curve([found, found], num_null_samples=400)
    units = torch.nonzero(found.significant[:, -1]).flatten()
    rng = np.random.default_rng(1)
    by_hand = []
    for _ in range(60):
        shares = []
        for unit in units:
            on = np.zeros(int(found.class_sizes.sum()), bool)
            on[: int(found.firing[unit])] = True
            shuffled = np.repeat(np.arange(6), found.class_sizes.numpy())[rng.permutation(len(on))]
            counts = torch.tensor([float(on[shuffled == c].sum()) for c in range(6)])
            members = best_top_set(counts, found.class_sizes.double())[1]
            share = float((members * found.class_sizes).sum() / found.class_sizes.sum())
            shares.append(min(share, 1 - share))
        by_hand.append(np.mean(shares))
    assert curve.null[:, 0].mean().item() == pytest.approx(np.mean(by_hand), abs=0.02)
    assert curve.null[:, 0].std().item() == pytest.approx(np.std(by_hand), rel=0.5)


def test_depth_is_undefined_without_classes_or_units():
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    y = (torch.arange(100) % 2).double()[:, None]
    found = [read_attributes(x, y).denotation] * 2
    curve = depth_curve(found)
    assert curve.scalars() == {}
    assert curve.proportion.isnan().all()
    with pytest.raises(ValueError, match="layers"):
        depth_curve([])


def test_the_family_is_all_units_and_all_attributes():
    """After each shuffle the best of all is the best of what each attribute has alone."""
    x, labels = classes(300, 6, 4, noise=4.0)
    y = torch.nn.functional.one_hot(labels, 4).double()
    none = torch.full((300,), -1)
    whole = find_denotation(x, y, none, folds(300), 5).null_max
    alone = [find_denotation(x[:, [u]], y[:, [a]], none, folds(300), 5).null_max for u in range(6) for a in range(4)]
    assert torch.equal(whole, torch.stack(alone).amax(0))


def test_one_positive_to_test_with_is_too_few():
    y = torch.zeros(100, 1).double()
    y[[0, 1, 50, 20]] = 1  # three where rules are found, one where they are tested
    x = y + 0.01 * torch.rand(100, 1, generator=torch.Generator().manual_seed(0))
    found = find_denotation(x, y, torch.full((100,), -1), folds(100), 5)
    assert found.mcc.isnan().all() and (found.p == 1).all()
    y[[30, 40]] = 1
    assert find_denotation(y, y, torch.full((100,), -1), folds(100), 5).mcc.item() == pytest.approx(1.0)


def test_noise_in_groups_denotes_no_more_often_than_noise():
    """Groups of ten like samples: shuffled one by one, nearly every family would hold a find."""
    wrong, families = 0, 40
    for seed in range(families):
        generator = torch.Generator().manual_seed(seed)
        groups = torch.arange(60).repeat_interleave(10)
        x = torch.randn(60, 10, generator=generator)[groups] + 0.1 * torch.randn(600, 10, generator=generator)
        y = (torch.rand(60, 1, generator=generator) < 0.5).double()[groups]
        wrong += bool(read_attributes(x, y, groups=groups).denotation.significant.any())
    # With a true rate of 5 % more than 6 of 40 happen once in a hundred times.
    assert wrong <= 6


def test_a_planted_unit_denotes_in_groups_too():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(200).repeat_interleave(4)
    mark = (torch.rand(200, 1, generator=generator) < 0.5).double()[groups]
    x = torch.cat([mark, torch.randn(800, 1, generator=generator)], 1)
    result = read_attributes(x, mark, groups=groups)
    assert result.denotation.denoting().tolist() == [True, False]


def test_a_class_that_came_only_when_rules_were_tested_is_in_no_set():
    labels = torch.arange(300) % 3
    fold = folds(300)
    labels[(labels == 2) & (fold < 2)] = 0
    x = (labels == 1).double()[:, None]
    found = find_denotation(x, torch.zeros(300, 0), labels, fold, 5)
    assert found.sets.tolist() == [[False, True]]
    tested = labels[fold >= 2]
    assert found.proportion[0, 0].item() == pytest.approx((tested == 1).double().mean().item())
    assert found.mcc[0, 0].item() == pytest.approx(1.0)


def test_many_samples_are_tested_by_a_part_with_the_same_shares(monkeypatch):
    x, labels = classes(6000, 12, 5, seed=1)
    x = x + 1.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    whole = read_attributes(x, labels).denotation
    monkeypatch.setattr("lightning_neuro.observers.denotation.MAX_TESTED", 1000)
    part = read_attributes(x, labels).denotation
    known = whole.mcc.isfinite() & part.mcc.isfinite()
    assert not torch.equal(whole.mcc, part.mcc)
    assert (whole.mcc - part.mcc)[known].abs().max() < 0.12  # 3.5 standard errors
    assert (part.lower <= whole.lower + 0.05)[known].all()  # fewer samples, lower bounds
    torch.testing.assert_close(part.proportion, whole.proportion, atol=0.01, rtol=0)
