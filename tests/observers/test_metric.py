"""LinearObserver: batches, shards, ranks, order, what is missing and what is wrong."""

import io
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from sklearn.linear_model import Ridge

from lightning_neuro import ArgumentError, MetricCallback
from lightning_neuro.observers import LinearObserver, read_attributes
from lightning_neuro.observers.folds import attribute_order, stratified_folds
from lightning_neuro.observers.ridge import ridge_penalty
from tests.models import fit, mlp
from tests.observers.planted import classes, halfspaces

PER_ATTRIBUTE = ("balanced_accuracy", "mcc", "auroc", "information_bits", "control", "label_proportion", "weights")


def batch(samples=240, seed=0):
    x, labels = classes(samples, 10, 5, noise=3.0, seed=seed)
    y = torch.stack([(labels < 2).double(), (x[:, 0] > x[:, 1]).double()], 1)
    y[::7, 1] = math.nan
    return x, y, labels


def assert_same(result, expected, tolerance=1e-10):
    assert result.names == expected.names
    assert (result.num_samples, result.num_nonfinite) == (expected.num_samples, expected.num_nonfinite)
    for name in PER_ATTRIBUTE:
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=0, atol=tolerance, equal_nan=True
        )
    for name in ("mcc", "p", "null_max"):
        ours, theirs = getattr(result.denotation, name), getattr(expected.denotation, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def test_batches_shards_and_any_order_give_the_whole():
    x, y, labels = batch()
    whole = read_attributes(x, y, labels)
    shards = []
    order = torch.randperm(240, generator=torch.Generator().manual_seed(1))
    for part in order.split(100):
        shard = LinearObserver()
        for piece in part.split(33):
            shard.update(x[piece], y[piece], labels[piece])
        shards.append(shard)
    merged = LinearObserver()
    for shard in shards:
        merged.merge_state(shard)
    merged._update_count = 1
    assert_same(merged.compute(), whole)


def test_class_labels_are_an_attribute_per_class():
    x, _, labels = batch()
    metric = LinearObserver()
    for piece in torch.arange(240).split(7):  # no batch has all classes
        metric.update(x[piece], labels[piece])
    result = metric.compute()
    assert result.names == tuple(f"class_{k}" for k in range(5))
    expected = read_attributes(x, torch.nn.functional.one_hot(labels, 5).double(), labels, names=result.names)
    assert_same(result, expected)
    assert MetricCallback(LinearObserver(denotation=False), name="plain").name == "plain"


def test_in_the_plain_callback_it_makes_curves():
    callback = MetricCallback(LinearObserver(denotation=False), name="known", on_error="raise")
    fit(mlp(), callback)
    assert 0.5 < callback.scalars["known/balanced_accuracy/net.2"] <= 1


def test_groups_are_held_out_together():
    """Samples that come in pairs of opposite noise labels: an observer that saw the twin could look the answer up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 100, generator=generator).repeat_interleave(2, 0)
    x = x + 1e-3 * torch.randn(120, 100, generator=generator)
    y = (torch.rand(60, 12, generator=generator) < 0.5).double().repeat_interleave(2, 0)
    groups = torch.arange(60).repeat_interleave(2)
    apart = read_attributes(x, y, denotation=False).balanced_accuracy.mean().item()
    together = read_attributes(x, y, groups=groups, denotation=False).balanced_accuracy.mean().item()
    assert apart > 0.8
    assert abs(together - 0.5) < 0.06


def test_samples_with_the_same_state_are_held_out_from_each_other_unless_told():
    """A unit that is on or off has two states, which are not two samples."""
    labels = torch.arange(300) % 3
    unit = (labels == 1).float()[:, None]
    metric = LinearObserver()
    for part in torch.arange(300).split(70):
        metric.update(unit[part], labels[part])
    for result in (read_attributes(unit, labels), metric.compute()):
        assert result.balanced_accuracy[1].item() == 1.0
        assert result.denotation.denoting().tolist() == [True]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    y = (torch.arange(300) % 2 == 0).double()[:, None]
    assert_same(read_attributes(unit[order], y[order], labels[order]), read_attributes(unit, y, labels))


def test_missing_values_are_as_if_their_samples_were_not_asked():
    x, y = halfspaces(400, 8, 1)
    hidden = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.4
    wrong = y.clone()
    wrong[hidden] = math.nan
    result = read_attributes(x, wrong)
    assert result.num_known.item() == int((~hidden).sum())
    assert result.balanced_accuracy.item() > 0.93
    assert result.label_proportion.item() == pytest.approx(y[~hidden].mean().item())


def test_undefined_attributes_are_named_and_never_perfect():
    x, _ = halfspaces(100, 5, 1)
    y = torch.zeros(100, 4)
    y[:, 1], y[:, 2], y[3, 3] = 1, math.nan, 1
    result = read_attributes(x, y, names=["never", "always", "missing", "once"])
    for measure in ("balanced_accuracy", "mcc", "auroc", "information_bits", "selectivity", "balanced_accuracy_low"):
        assert getattr(result, measure).isnan().all(), measure
    assert result.scalars() == {}
    reasons = result.undefined()
    assert "absent" in reasons["never"] and "present" in reasons["always"] and "missing" in reasons["missing"]
    assert "1 of 100" in reasons["once"]
    assert all(f"'{name}'" in result.notes()["undefined"] for name in reasons) and len(reasons) == 4
    assert result.histogram().numel() == 0


def test_attributes_without_a_score_do_not_change_the_others():
    """Between constant, missing and too rare ones, each attribute is as it is without them."""
    x, y, labels = batch()
    useless = torch.zeros(240, 4, dtype=torch.float64)
    useless[:, 1], useless[:, 2], useless[17, 3] = 1, math.nan, 1
    mixed = torch.stack([useless[:, 0], y[:, 0], *useless[:, 1:3].T, y[:, 1], useless[:, 3]], 1)
    # The rare one is kept, because folds are stratified by it.
    found, alone = (read_attributes(x, values, labels) for values in (mixed, mixed[:, [1, 4, 5]]))
    for name in ("balanced_accuracy", "mcc", "auroc", "information_bits", "selectivity", "weights"):
        assert getattr(found, name)[[0, 2, 3, 5]].isnan().all(), name
    for name in ("pattern", "effect", "stable"):
        assert (getattr(found, name)[[0, 2, 3, 5]] == 0).all(), name
    for name in ("balanced_accuracy", "mcc", "auroc", "information_bits", "control", "weights", "pattern", "effect"):
        torch.testing.assert_close(getattr(found, name)[[1, 4]], getattr(alone, name)[:2], rtol=0, atol=1e-10)
    for name in ("mcc", "p"):
        ours, theirs = getattr(found.denotation, name)[:, [1, 4, 6]], getattr(alone.denotation, name)[:, [0, 1, 3]]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_thousand_classes_with_a_sample_each_are_one_note():
    result = read_attributes(torch.randn(512, 16, generator=torch.Generator().manual_seed(0)), 2 * torch.arange(512))
    assert result.scalars().keys() <= {"num_denoting_units"} and len(result.names) == 1023
    assert list(result.notes()) == ["undefined"] and len(result.notes()["undefined"]) < 600


def test_samples_that_are_not_finite_are_counted_and_left_out():
    x, y = halfspaces(200, 6, 2)
    spoiled = x.clone()
    spoiled[5, 2], spoiled[17, 0] = math.inf, math.nan
    spoiled[40] = math.nan
    kept = torch.ones(200, dtype=torch.bool)
    kept[[5, 17, 40]] = False
    result = read_attributes(spoiled, y)
    assert (result.num_samples, result.num_nonfinite, result.num_constant) == (197, 3, 0)
    assert "3 of 200 samples" in result.notes()["nonfinite"]
    assert_same(replace(result, num_nonfinite=0), read_attributes(x[kept], y[kept]))


def test_constant_units_are_counted_and_have_no_weight():
    x, y = halfspaces(200, 6, 2)
    result = read_attributes(torch.cat([x, torch.full((200, 1), 3.0)], 1), y, denotation=False)
    assert result.num_constant == 1 and (result.weights[:, 6] == 0).all() and (result.pattern[:, 6] == 0).all()
    torch.testing.assert_close(result.weights[:, :6].sign(), read_attributes(x, y).weights.sign())


def test_bounds_enclose_the_balanced_accuracy():
    x, y, labels = batch()
    result = read_attributes(x, y, labels, denotation=False)
    assert (result.balanced_accuracy_low < result.balanced_accuracy).all()
    assert (result.balanced_accuracy < result.balanced_accuracy_high).all()
    # Of four times as many samples they are about half as far apart.
    many = read_attributes(*batch(960), denotation=False)
    width = result.balanced_accuracy_high - result.balanced_accuracy_low
    assert ((many.balanced_accuracy_high - many.balanced_accuracy_low) / width - 0.5).abs().max() < 0.2


def test_options_are_those_of_the_function():
    x, y, labels = batch()
    metric = LinearObserver(num_folds=3, num_controls=2, denotation=False)
    metric.update(x, y, labels)
    result = metric.compute()
    expected = read_attributes(x, y, labels, num_folds=3, num_controls=2, denotation=False)
    assert result.denotation is None and expected.denotation is None
    for name in ("balanced_accuracy", "information_bits", "control"):
        assert torch.equal(getattr(result, name), getattr(expected, name))
    for other in ({"num_folds": 4, "num_controls": 2}, {"num_folds": 3, "num_controls": 3}):
        changed = read_attributes(x, y, labels, denotation=False, **other)
        assert not torch.equal(changed.selectivity, result.selectivity)


def test_numpy_and_integers_are_taken():
    x, y, labels = batch()
    x = (10 * x).round()
    expected = read_attributes(x, y, labels)
    assert_same(read_attributes(x.long().numpy(), y.numpy(), labels.int().numpy()), expected)
    metric = LinearObserver()
    metric.update(x.numpy(), y.numpy(), labels.numpy())
    assert_same(metric.compute(), expected)


def test_a_layer_that_is_dead_says_nothing():
    y = (torch.arange(100) % 4 == 0).double()[:, None]
    result = read_attributes(torch.zeros(100, 5), y)
    assert result.balanced_accuracy.item() == 0.5
    assert (result.mcc.item(), result.auroc.item()) == (0.0, 0.5)
    assert not result.denotation.significant.any()
    nothing = read_attributes(torch.full((20, 3), math.nan), torch.zeros(20, 1))
    assert nothing.scalars() == {}
    assert nothing.num_nonfinite == 20


@pytest.mark.filterwarnings("ignore:.*was called before the")
def test_nothing_seen_gives_nothing():
    assert LinearObserver().compute().scalars() == {}
    assert LinearObserver(names=["a"]).compute().balanced_accuracy.isnan().all()


def test_scores_do_not_change_when_units_are_scaled_or_shifted():
    x, y, labels = batch()
    plain = read_attributes(x.double(), y, labels, groups=torch.arange(240))
    scaled = read_attributes(x.double() * torch.linspace(0.01, 50, 10) + 3, y, labels, groups=torch.arange(240))
    for name in ("balanced_accuracy", "mcc", "auroc", "information_bits", "control", "pattern", "effect"):
        torch.testing.assert_close(getattr(plain, name), getattr(scaled, name), rtol=0, atol=1e-6)


def test_the_parts_of_an_explanation_sum_to_the_score():
    x, y, labels = batch()
    result = read_attributes(x, y, labels)
    assert len(result.examples) == 2
    for a, state in enumerate(result.examples):
        expected = (state - result.mean) @ result.weights[a]
        assert result.explain(state, a).sum().item() == pytest.approx(expected.item(), rel=1e-9)
        assert result.example_attributes[a, a] == 1
    # The two classes' mean scores lie one apart.
    scores = (x.double() - result.mean) @ result.weights[0]
    assert (scores[y[:, 0] == 1].mean() - scores[y[:, 0] == 0].mean()).item() == pytest.approx(1.0)
    # Holding a unit at its mean takes its share of that distance away.
    held = x.double().clone()
    held[:, 3] = result.mean[3]
    again = (held - result.mean) @ result.weights[0]
    lost = 1 - (again[y[:, 0] == 1].mean() - again[y[:, 0] == 0].mean()).item()
    assert result.effect[0, 3].item() == pytest.approx(lost, abs=1e-9)
    assert result.effect[0].sum().item() == pytest.approx(1.0)


def test_means_spreads_and_stable_signs_are_those_of_the_samples():
    x, y, labels = batch()
    y = y[:, :1]
    result = read_attributes(x, y, labels, groups=torch.arange(240))
    np.testing.assert_allclose(result.mean, x.double().numpy().mean(0))
    np.testing.assert_allclose(result.std, x.double().numpy().std(0))
    # Each fold's observer by scikit-learn, on the folds that the samples are dealt to.
    order = attribute_order(y, torch.arange(240), torch.arange(240))
    fold = stratified_folds(order, 5).numpy()
    standard = ((x.double() - result.mean) / result.std)[order].numpy()
    truth = y[order, 0].numpy()

    def signs(rows):
        penalty = ridge_penalty(10, rows.sum()) * rows.sum() * standard[rows].var(0).mean()
        return np.sign(Ridge(alpha=penalty).fit(standard[rows], truth[rows]).coef_)

    every = np.stack([signs(fold != k) for k in range(5)])
    expected = (every == signs(fold >= 0)).all(0)
    assert result.stable[0].tolist() == expected.tolist()
    assert 0 < expected.sum() < 10


def test_patterns_are_correlations():
    x, y, labels = batch()
    result = read_attributes(x, y, labels)
    known = y[:, 1].isfinite()
    for unit in range(10):
        pair = torch.stack([x[known, unit].double(), y[known, 1]])
        assert result.pattern[1, unit].item() == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-9)


def test_inference_mode_leaves_a_usable_metric_and_its_own_copy():
    x, y, labels = batch()
    metric = LinearObserver()
    with torch.inference_mode():
        metric.update(x * 1, y, labels)
    kept = x.clone()
    metric.update(kept, y, labels)
    expected = metric.compute().weights
    metric.reset()
    metric.update(x, y, labels)
    metric.update(kept, y, labels)
    kept.zero_()
    torch.testing.assert_close(metric.compute().weights, expected)
    assert not any(part.is_inference() for part in metric.activations)


def test_pickle_reset_and_state_dict():
    x, y, labels = batch()
    metric = LinearObserver(names=["a", "b"], num_folds=4, num_controls=3)
    metric.update(x, y, labels)
    again = pickle.loads(pickle.dumps(metric))
    assert_same(again.compute(), metric.compute())
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)
    metric.reset()
    assert metric.activations == []
    metric.update(x, y, labels)
    assert_same(metric.compute(), again.compute())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"classifier": "svm"}, "classifier"),
        ({"num_folds": 1}, "num_folds"),
        ({"classifier": "logistic", "num_folds": 2}, "num_folds"),
        ({"num_controls": -1}, "num_controls"),
        ({"denotation": 1}, "denotation"),
        ({"names": "mark"}, "names"),
    ],
)
def test_wrong_options_fail_in_the_constructor(options, name):
    with pytest.raises(ArgumentError, match=f"^`{name}` must"):
        LinearObserver(**options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.rand(5, 3), torch.zeros(4, 2)), r"`attributes` must .*\(5, A\)"),
        ((torch.rand(5, 3), torch.full((5, 1), 0.5)), "`attributes` must .*got '0.5'"),
        ((torch.rand(5, 3), torch.full((5, 1), math.inf)), "`attributes` must .*got 'inf'"),
        ((torch.rand(5, 3), torch.full((5, 1), 2)), "`attributes` must .*got '2'"),
        ((torch.rand(5, 3), torch.rand(5)), "`attributes` must be integers"),
        ((torch.rand(5, 3, 2), torch.zeros(5, 1)), "`activations` must"),
        ((torch.rand(5, 3), torch.zeros(5, 1), torch.zeros(4).long()), "`labels` must"),
        ((torch.rand(5, 3), torch.zeros(5, 1), None, torch.rand(5)), "`groups` must"),
    ],
)
def test_wrong_batches_are_named(arguments, said):
    with pytest.raises(ArgumentError, match=f"^{said}"):
        LinearObserver().update(*arguments)


def test_sizes_are_those_of_the_first_update():
    metric = LinearObserver()
    metric.update(torch.rand(5, 3), torch.zeros(5, 2))
    with pytest.raises(ArgumentError, match=r"^`activations` must have 3 units"):
        metric.update(torch.rand(5, 4), torch.zeros(5, 2))
    with pytest.raises(ArgumentError, match=r"^`attributes` must have 2 columns"):
        metric.update(torch.rand(5, 3), torch.zeros(5, 1))
    with pytest.raises(ArgumentError, match=r"^`attributes` must have a column for each of 2 names"):
        LinearObserver(names=["a", "b"]).update(torch.rand(5, 3), torch.zeros(5, 3))
    with pytest.raises(ArgumentError, match=r"^`names` must"):
        read_attributes(torch.rand(5, 3), torch.zeros(5, 2), names=["a"])


def rank_main(rank, file):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, y, labels = batch()
    own = slice(0, 90) if rank else slice(90, 240)
    metric = LinearObserver()
    metric.update(x[own], y[own], labels[own])
    assert_same(metric.compute(), read_attributes(x, y, labels))
    assert metric.activations[0].shape == x[own].shape  # after the sync each rank has its own again
    one_sided = LinearObserver()
    if rank:
        one_sided.update(x, y, labels)
    assert_same(one_sided.compute(), read_attributes(x, y, labels))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*was called before the")
def test_two_ranks_give_the_whole(tmp_path):
    torch.multiprocessing.spawn(rank_main, (str(tmp_path / "store"),), nprocs=2)
