"""NeuronEntropy: batches, shards, ranks, checkpoints and frozen bins."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from lightning_neuro.checks import ArgumentError
from lightning_neuro.entropy import NeuronEntropy, activation_range, merge_calibrations, neuron_entropy

PER_UNIT = ("total", "on_off", "amplitude", "class_information")


def batch(samples=400, units=7, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (samples,), generator=generator)
    centres = torch.randn(classes, units, generator=generator)
    return (centres[targets] + torch.randn(samples, units, generator=generator)).relu(), targets


def assert_same(result, expected, tolerance=1e-10):
    assert (result.num_samples, result.num_nonfinite) == (expected.num_samples, expected.num_nonfinite)
    assert torch.equal(result.live, expected.live)
    assert torch.equal(result.counts, expected.counts)
    for name in PER_UNIT:
        ours, theirs = getattr(result, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["states", "mostafa2021"])
def test_batches_and_shards_equal_the_whole(mode):
    activations, targets = batch()
    activations[5, 2] = math.nan
    upper = activation_range(activations) if mode == "states" else None
    whole = neuron_entropy(activations, targets, upper=upper, mode=mode)
    shards = []
    for part, labels in zip(activations.split(100), targets.split(100), strict=True):
        shard = NeuronEntropy(upper=upper, mode=mode)
        for piece, piece_labels in zip(part.split(33), labels.split(33), strict=True):
            shard.update(piece, piece_labels)
        shards.append(shard)
    merged = NeuronEntropy(mode=mode)
    for shard in shards:
        merged.merge_state(shard)
        merged.compute()  # must not be remembered at the next merge
    if mode == "states":
        assert torch.equal(merged.upper, upper)
    assert_same(merged.compute(), whole)


def test_shards_of_different_classes():
    activations, targets = batch(classes=6)
    order = targets.argsort()
    activations, targets = activations[order], targets[order]
    upper = activation_range(activations)
    whole = neuron_entropy(activations, targets, upper=upper)
    for num_classes in (None, 6, 9):
        merged = NeuronEntropy(upper=upper, num_classes=num_classes)
        for part, labels in zip(activations.split(130), targets.split(130), strict=True):
            shard = NeuronEntropy(upper=upper, num_classes=num_classes)
            shard.update(part, labels)
            merged.merge_state(shard)
        assert_same(merged.compute(), whole)


def test_merging_needs_one_range_one_mode_and_one_layer():
    one, two, other = NeuronEntropy(), NeuronEntropy(), NeuronEntropy(upper=torch.ones(3))
    one.update(batch(seed=0)[0])
    two.update(batch(seed=1)[0])
    with pytest.raises(ArgumentError, match="`upper`"):
        one.merge_state(two)
    with pytest.raises(ArgumentError, match="10 bins"):
        one.merge_state(NeuronEntropy(num_bins=5))
    with pytest.raises(ArgumentError, match="number of units"):
        one.merge_state(other.metric_state | {"counts": torch.zeros(1, 3, 11, dtype=torch.int64)})


@pytest.mark.parametrize("mode", ["states", "mostafa2021"])
def test_forward_gives_the_batch_and_adds_it(mode):
    activations, targets = batch()
    upper = activation_range(activations) if mode == "states" else None
    metric = NeuronEntropy(upper=upper, mode=mode)
    for part, labels in zip(activations.split(100), targets.split(100), strict=True):
        assert_same(metric(part, labels), neuron_entropy(part, labels, upper=upper, mode=mode))
        metric.to("cpu")
    assert_same(metric.compute(), neuron_entropy(activations, targets, upper=upper, mode=mode))


def test_the_range_comes_from_all_calibration_batches_and_then_is_frozen():
    activations, targets = batch(3000)
    metric = NeuronEntropy()
    assert not metric.calibrated
    for part in activations.split(64):
        metric.calibrate(part)
    top, count = metric.calibration
    assert (top.shape, top.dtype, int(count), count.dtype) == ((64, 7), torch.float64, 3000, torch.int64)
    metric.update(activations[:10], targets[:10])
    assert metric.calibrated
    assert torch.allclose(metric.upper, activation_range(activations), rtol=1e-9)
    with pytest.raises(ArgumentError, match="range"):
        metric.calibrate(activations)
    with pytest.raises(ArgumentError, match="range"):
        metric.set_calibration(top, count)


def test_without_calibration_the_first_batch_with_samples_freezes_the_range():
    activations, _ = batch()
    metric = NeuronEntropy()
    metric.update(torch.full((3, 7), math.nan))
    assert not metric.calibrated
    metric.update(torch.zeros(0, 7))
    assert not metric.calibrated
    metric.update(activations)
    assert torch.allclose(metric.upper, activation_range(activations), rtol=1e-12)
    metric.update(activations * 5)
    assert torch.allclose(metric.upper, activation_range(activations), rtol=1e-12)
    assert metric.compute().num_nonfinite == 3


def reset(metric):
    metric.reset()
    return metric


def through_state_dict(metric):
    with io.BytesIO() as file:
        torch.save(metric.state_dict(), file)
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    fresh = NeuronEntropy()
    fresh.load_state_dict(saved)
    return fresh


def through_pickle(metric):
    return pickle.loads(pickle.dumps(metric))


COPIES = [reset, NeuronEntropy.clone, copy.deepcopy, through_pickle, through_state_dict]


@pytest.mark.parametrize("copied", COPIES)
def test_the_frozen_range_survives(copied):
    activations, _ = batch()
    metric = NeuronEntropy()
    metric.update(activations)
    upper = metric.upper.clone()
    metric.compute()
    again = copied(metric)
    assert torch.equal(again.upper, upper)
    again.reset()
    again.update(torch.cat([upper[None] * 100, upper[None], upper[None] * 0.99, upper[None] * 0.05]))
    assert torch.equal(again.upper, upper)
    states = again.compute().counts
    assert (states[:, 10] == 3).all()
    assert (states[:, 1] == 1).all()


def test_an_unfinished_calibration_survives_a_checkpoint():
    activations, _ = batch()
    metric = NeuronEntropy()
    metric.calibrate(activations[:200])
    again = through_state_dict(metric)
    again.calibrate(activations[200:])
    again.update(activations[:3])
    assert torch.allclose(again.upper, activation_range(activations), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:.*was called before the")
def test_reset_forgets_the_samples():
    activations, targets = batch()
    metric = NeuronEntropy()
    metric.update(activations, targets)
    first = metric.compute()
    metric.reset()
    assert metric.compute().num_samples == 0
    metric.update(activations, targets)
    assert_same(metric.compute(), first)


def test_a_unit_dead_at_calibration_can_come_alive():
    metric = NeuronEntropy(miller_madow=False)
    metric.calibrate(torch.tensor([[0.0, 1.0, 3.0]]).repeat(10, 1))
    metric.update(torch.tensor([[0.05, 1.0, 3.0], [0.95, 1.0, 3.0]]))
    result = metric.compute()
    assert result.total.tolist() == [1.0, 0.0, 0.0]


def test_merged_calibrations_give_all_ranks_one_range():
    activations, _ = batch()
    ranks = [NeuronEntropy(), NeuronEntropy(), NeuronEntropy()]
    ranks[0].calibrate(activations[:10])
    ranks[1].calibrate(activations[10:])
    merged = merge_calibrations([rank.calibration for rank in ranks])
    for rank, part in zip(ranks, activations.split(150), strict=True):
        rank.set_calibration(*merged)
        rank.update(part)
        assert torch.allclose(rank.upper, activation_range(activations), rtol=1e-12)


def test_classes_grow_with_the_labels_seen():
    activations, targets = batch(classes=5)
    order = targets.argsort()
    metric = NeuronEntropy(upper=activation_range(activations))
    for part, labels in zip(activations[order].split(50), targets[order].split(50), strict=True):
        metric.update(part, labels)
    assert metric.counts.shape == (6, 7, 11)
    assert_same(metric.compute(), neuron_entropy(activations, targets))


def test_no_targets_no_class_information():
    metric = NeuronEntropy()
    metric.update(batch()[0])
    assert metric.compute().class_information is None
    assert "class_information" not in metric.compute().scalars()
    assert metric.counts.shape[0] == 1


def test_labels_beyond_num_classes_are_refused():
    metric = NeuronEntropy(num_classes=3)
    with pytest.raises(ArgumentError, match=r"`targets`.*3.*label 3"):
        metric.update(torch.rand(2, 2), torch.tensor([0, 3]))


def test_too_many_classes_cost_no_memory():
    activations, _ = batch(600)
    metric = NeuronEntropy(upper=activation_range(activations))
    metric.update(activations[:300], torch.arange(300) % 10)
    assert metric.compute().class_information is not None
    metric.update(activations[300:], torch.arange(300) * 1_000_000)
    assert metric.counts.shape[0] == 1
    metric.update(activations[:1], torch.tensor([0]))
    result = metric.compute()
    assert result.class_information is None
    assert "label 299000000" in result.notes()["classes"]
    few = NeuronEntropy(upper=metric.upper)
    few.update(activations[:300], torch.arange(300) % 10)
    few.merge_state(metric)
    assert few.compute().class_information is None
    metric.reset()
    metric.update(activations)
    assert_same(metric.compute(), neuron_entropy(activations))
    metric.merge_state(NeuronEntropy(num_classes=1000))
    assert metric.counts.shape[0] == 1


def test_memory_does_not_grow_with_samples():
    metric = NeuronEntropy()
    sizes = set()
    for seed in range(40):
        metric.update(*batch(50, seed=seed % 4))
        sizes.add((tuple(metric.counts.shape), len(pickle.dumps(metric.metric_state))))
    assert len(sizes) == 1


def test_inference_mode_leaves_a_usable_metric():
    activations, targets = batch()
    metric, paper = NeuronEntropy(), NeuronEntropy(mode="mostafa2021")
    with torch.inference_mode():
        metric.update(activations * 1, targets)
        paper.update(activations * 1)
    assert not metric.upper.is_inference()
    assert not any(state.is_inference() for state in [metric.counts, metric.num_nonfinite, *paper.activations])
    for each in (metric, paper):
        each.update(activations, targets)
        result = each.compute()
        assert not result.total.is_inference()
        result.total.add_(1)
        copy.deepcopy(each)


def test_paper_mode_keeps_its_own_copy():
    activations, _ = batch()
    metric = NeuronEntropy(mode="mostafa2021")
    metric.update(activations)
    expected = neuron_entropy(activations, mode="mostafa2021")
    activations.zero_()  # as an in-place layer may do after the hook
    assert_same(metric.compute(), expected)


def test_gradients_are_not_kept():
    activations, targets = batch()
    for mode in ("states", "mostafa2021"):
        result = NeuronEntropy(mode=mode)(activations.requires_grad_(), targets)
        assert not result.total.requires_grad


def test_results_are_frozen():
    metric = NeuronEntropy()
    metric.update(batch()[0])
    with pytest.raises(AttributeError):
        metric.compute().mode = "other"


@pytest.mark.parametrize("mode", ["states", "mostafa2021"])
@pytest.mark.filterwarnings("ignore:.*was called before the")
def test_compute_never_raises_on_poor_data(mode):
    metric = NeuronEntropy(mode=mode)
    assert metric.compute().scalars() == {}
    assert (metric.compute().num_samples, metric.compute().num_units) == (0, 0)
    for activations in (torch.zeros(0, 2), torch.full((5, 2), math.inf), torch.zeros(1, 2)):
        metric.update(activations)
        result = metric.compute()
        assert result.scalars() == {}
        assert "undefined" in result.notes()
    metric.update(torch.zeros(3, 2))
    assert metric.compute().scalars()["dead_share"] == 1.0
    assert "5 of 9 samples" in metric.compute().notes()["nonfinite"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "x"}, "`mode`"),
        ({"num_bins": 0}, "`num_bins`"),
        ({"num_bins": True}, "`num_bins`"),
        ({"miller_madow": None}, "`miller_madow`"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"num_classes": 2.5}, "`num_classes`"),
        ({"upper": torch.ones(2, 2)}, "`upper`"),
        ({"upper": -torch.ones(2)}, "`upper`"),
        ({"uper": torch.ones(2)}, "uper"),
    ],
)
def test_wrong_options_fail_in_the_constructor(options, said):
    with pytest.raises(ValueError, match=said):
        NeuronEntropy(**options)


@pytest.mark.parametrize("mode", ["states", "mostafa2021"])
def test_another_number_of_units_is_refused(mode):
    metric = NeuronEntropy(mode=mode)
    metric.update(torch.rand(5, 4))
    with pytest.raises(ArgumentError, match=r"4 units.*3\)"):
        metric.update(torch.rand(5, 3))


def test_forgetting_the_range_takes_a_new_one_for_activations_that_grew():
    activations, _ = batch(500, 3, 2)
    metric = NeuronEntropy(miller_madow=False)
    metric.update(activations)
    before = metric.compute().total
    metric.reset()
    metric.update(1000 * activations)
    frozen = metric.compute()
    # In the frozen bins every active sample is in the last one.
    torch.testing.assert_close(frozen.total, frozen.on_off)
    metric.forget_range()
    metric.update(1000 * activations)
    torch.testing.assert_close(metric.compute().total, before)


def rank_main(rank, file):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    activations, targets = batch(classes=4)
    order = targets.argsort()  # so that the ranks see different classes
    activations, targets = activations[order], targets[order]
    activations[0, 0] = math.nan
    own = slice(rank * 250, rank * 250 + 250)
    for mode in ("states", "mostafa2021"):
        upper = activation_range(activations) if mode == "states" else None
        whole = neuron_entropy(activations, targets, upper=upper, mode=mode)
        metric = NeuronEntropy(upper=upper, mode=mode)
        metric.update(activations[own], targets[own])
        assert_same(metric.compute(), whole)
        metric.update(activations[own], targets[own])  # after the sync each rank has its own samples again
        assert metric.compute().num_samples == 2 * whole.num_samples
        one_sided = NeuronEntropy(mode=mode)
        if rank == 0:
            one_sided.update(activations)
        assert one_sided.compute().num_samples == 399
    apart = NeuronEntropy()
    apart.update(activations[own])
    with pytest.raises(ArgumentError, match="`upper`"):
        apart.compute()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(rank_main, (str(tmp_path / "store"),), nprocs=2)
