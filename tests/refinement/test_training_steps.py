"""From backward passes to steps: which layers, which optimizer, what rate; errors stay outside training."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.gradient_hooks import GradientHooks
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.sources import Sources
from lightning_neuro.refinement.traced_layers import find_layers
from lightning_neuro.refinement.training_steps import TrainBatch, TrainingSteps


class Diary:
    def __init__(self):
        self.pages = []

    def see(self, layer, module, inputs, gradients, batch):
        self.pages.append(("see", layer, batch.ids.tolist()))

    def commit(self, layer, rate):
        self.pages.append(("commit", layer, round(float(rate), 6)))

    def drop(self, layer):
        self.pages.append(("drop", layer))


class Broken(Diary):
    def see(self, *args):
        raise RuntimeError("see")

    def commit(self, *args):
        raise RuntimeError("commit")


def followed(net, listeners=(), ledgers=("0",), optimizers=None, **options):
    layers = find_layers(net, "*")
    errors = []
    books = {name: RefinementLedger(layers[name][0], num_sources=2) for name in ledgers}
    optimizers = optimizers or [SGD(net.parameters(), lr=0.25)]
    report = lambda layer, error: errors.append((layer, str(error)))  # noqa: E731
    steps = TrainingSteps(GradientHooks(layers), books, listeners, optimizers, report, **options)
    return steps, optimizers, errors


def backward(steps, net, num=4):
    steps.begin(TrainBatch(torch.arange(num)), Sources(torch.arange(num) % 2, 3))
    net(torch.ones(num, 2)).sum().backward()
    steps.end()


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


def test_pages_of_two_accumulated_passes_a_zeroed_one_and_a_step():
    net, diary = two(), Diary()
    steps, (optimizer,), errors = followed(net, [diary])
    backward(steps, net)
    optimizer.zero_grad()
    diary.pages.clear()
    backward(steps, net)
    backward(steps, net)
    optimizer.step()
    ids = [0, 1, 2, 3]
    first = [("drop", "1"), ("see", "1", ids), ("drop", "0"), ("see", "0", ids)]
    assert diary.pages == [
        *first,
        ("see", "1", ids),
        ("see", "0", ids),
        ("commit", "0", 0.25),
        ("commit", "1", 0.25),
    ]
    assert errors == []
    steps.remove()


def test_rate_holds_the_clipping_that_a_ledger_found():
    net, diary = two(), Diary()
    steps, (optimizer,), _ = followed(net, [diary])
    backward(steps, net)
    norm = float(nn.utils.clip_grad_norm_(net.parameters(), 0.5))
    diary.pages.clear()
    optimizer.step()
    for page in diary.pages:
        assert page[2] == pytest.approx(0.25 * 0.5 / norm, rel=1e-4)
    assert len(diary.pages) == 2
    steps.remove()


def test_rate_is_of_a_sample_among_those_of_all_ranks():
    net, diary = two(), Diary()
    steps, (optimizer,), _ = followed(net, [diary], world_size=2)
    backward(steps, net)
    diary.pages.clear()
    optimizer.step()
    assert diary.pages == [("commit", "0", 0.125), ("commit", "1", 0.125)]
    steps.remove()


def test_each_optimizer_commits_its_own_layers_at_its_rate():
    net, diary = two(), Diary()
    optimizers = [SGD(net[0].parameters(), lr=0.5), Adam(net[1].parameters(), lr=0.125)]
    steps, _, _ = followed(net, [diary], optimizers=optimizers)
    for optimizer, page in zip(optimizers, [("commit", "0", 0.5), ("commit", "1", 0.125)], strict=True):
        backward(steps, net)
        diary.pages.clear()
        optimizer.step()
        assert diary.pages == [page]
    steps.remove()


def test_passes_outside_a_training_batch_are_not_seen():
    net, diary = two(), Diary()
    steps, _, _ = followed(net, [diary])
    net(torch.ones(4, 2)).sum().backward()
    assert diary.pages == []
    steps.begin(TrainBatch(torch.arange(4)), Sources(torch.zeros(4).long(), 3))
    loss = net(torch.ones(4, 2)).sum()
    steps.end()
    loss.backward()  # whose samples these are is not known any more
    assert not any(page[0] == "see" for page in diary.pages)
    steps.remove()


def test_errors_are_reported_and_never_reach_training():
    net, diary = two(), Diary()
    steps, (optimizer,), errors = followed(net, [Broken(), diary])
    steps.ledgers["0"].step = None  # not callable
    backward(steps, net)
    before = net[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(net[0].weight, before)
    layers = [layer for layer, _ in errors]
    assert layers == ["1", "0", "0", "0", "1"]
    assert [error for _, error in errors][:2] == ["see", "see"]
    assert [error for _, error in errors][3:] == ["commit", "commit"]
    assert list(steps.broken) == ["0"]  # it missed a step
    # The one that works is told all the same.
    assert ("commit", "1", 0.25) in diary.pages
    steps.remove()


def test_a_broken_ledger_takes_part_in_the_sum_over_ranks_with_nothing():
    net = two()
    sums = []
    steps, (optimizer,), errors = followed(net, mean_over_ranks=lambda tensor: sums.append(tensor.clone()) or tensor)
    backward(steps, net)
    optimizer.step()
    steps.broken["0"] = RuntimeError("on this rank")
    parts = steps.ledgers["0"].weights()["weight"].clone()
    optimizer.zero_grad()
    backward(steps, net)
    optimizer.step()
    assert len(sums) == 2
    assert sums[0].any()
    assert not sums[1].any()
    assert sums[0].shape == sums[1].shape
    assert torch.equal(steps.ledgers["0"].weights()["weight"], parts)
    assert errors == []
    steps.remove()


def test_ranks_meet_as_often_whether_or_not_a_ledger_is_broken_on_one_of_them():
    """With two optimizers, each moves one of the layers."""

    def sizes(*broken):
        """For each step, the number of elements of each tensor that is averaged over the ranks."""
        net, met = two(), []
        optimizers = [SGD(net[0].parameters(), lr=0.5), Adam(net[1].parameters(), lr=0.125)]
        options = {"optimizers": optimizers, "mean_over_ranks": lambda tensor: met[-1].append(len(tensor)) or tensor}
        steps, _, errors = followed(net, ledgers=("0", "1"), **options)
        steps.broken |= dict.fromkeys(broken, RuntimeError("on this rank"))
        for optimizer in optimizers:
            backward(steps, net)
            met.append([])
            optimizer.step()
        net.zero_grad()
        met.append([])
        optimizers[0].step()  # moves nothing
        steps.remove()
        assert errors == []
        return met

    healthy = sizes()
    assert [len(step) for step in healthy] == [1, 1, 0]
    assert healthy[0] != healthy[1]
    for broken in (["0"], ["1"], ["0", "1"]):
        assert sizes(*broken) == healthy


def test_where_a_gradient_is_zero_it_tells_no_rate_for_the_others():
    net, diary = two(), Diary()
    nn.init.zeros_(net[1].weight)  # so the first layer's gradient is 0
    steps, (optimizer,), errors = followed(net, [diary])
    backward(steps, net)
    diary.pages.clear()
    optimizer.step()
    assert diary.pages == [("commit", "0", 0.25), ("commit", "1", 0.25)]
    assert errors == []
    steps.remove()


def test_a_layer_without_a_gradient_does_not_hide_the_clipping_that_another_tells():
    """The first layer returns 0, so the weight of the second one has no gradient; the factor is that of the first."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    nn.init.zeros_(net[0].weight)
    diary = Diary()
    steps, (optimizer,), errors = followed(net, [diary], ledgers=("0", "1"))
    backward(steps, net)
    factor = 0.5 / float(nn.utils.clip_grad_norm_(net.parameters(), 0.5))
    diary.pages.clear()
    optimizer.step()
    assert factor < 0.9
    assert [page[:2] for page in diary.pages] == [("commit", "0"), ("commit", "1")]
    assert [page[2] for page in diary.pages] == pytest.approx([0.25 * factor] * 2, rel=1e-4)
    assert errors == []
    steps.remove()


def test_a_step_that_a_fused_optimizer_skips_is_dropped_for_its_own_layers():
    net, diary = two(), Diary()
    optimizers = [SGD(net[0].parameters(), lr=0.5, fused=True), Adam(net[1].parameters(), lr=0.125, fused=True)]
    steps, _, errors = followed(net, [diary], ledgers=("0", "1"), optimizers=optimizers)
    backward(steps, net)
    diary.pages.clear()
    before = [steps.ledgers[layer].weights()["weight"].clone() for layer in "01"]
    optimizers[0].found_inf = torch.tensor(1.0)
    optimizers[0].step()
    assert diary.pages == [("drop", "0")]
    optimizers[1].found_inf = torch.tensor(0.0)
    optimizers[1].step()
    assert diary.pages == [("drop", "0"), ("commit", "1", 0.125)]
    assert torch.equal(steps.ledgers["0"].weights()["weight"], before[0])
    ledger = steps.ledgers["1"]
    torch.testing.assert_close(ledger.weights()["weight"].sum(0), net[1].weight.detach().double())
    assert ledger.untraced_share < 1e-5
    assert errors == []
    steps.remove()


def test_two_optimizers_on_one_layer_are_refused():
    for first, second in [("0", ""), ("0.weight", "0.bias")]:
        net = two()
        named = dict(net.named_parameters())
        optimizers = [
            SGD([value for name, value in named.items() if name.startswith(part)], lr=0.1) for part in (first, second)
        ]
        with pytest.raises(ArgumentError, match=r"`layers`.*two optimizers.*'0'"):
            followed(net, optimizers=optimizers)
        assert not any(optimizer._optimizer_step_post_hooks for optimizer in optimizers)


def test_a_layout_without_samples_is_reported_with_its_layer():
    net = two()
    steps, _, errors = followed(net)
    steps.begin(None, Sources(torch.zeros(3).long(), 3))
    net(torch.ones(4, 2)).sum().backward()
    assert [layer for layer, _ in errors] == ["1", "0"]
    assert "3 samples" in errors[0][1]
    steps.remove()


def test_all_hooks_go():
    net = two()
    steps, (optimizer,), _ = followed(net)
    assert optimizer._optimizer_step_post_hooks
    steps.remove()
    assert not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_hooks for module in net.modules())
    backward(steps, net)
    assert not steps.ledgers["0"]._pending


# Which layers


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.twin = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)
        self.other.weight, self.other.bias = self.twin.weight, self.twin.bias


def test_the_default_is_the_head():
    assert list(find_layers(Named(), None)) == ["head"]
    assert list(find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv1d(2, 2, 1), nn.ReLU()), None)) == ["2"]
    with pytest.raises(ArgumentError, match=r"no trained linear or convolution layer.*RepresentationRefinement\("):
        find_layers(nn.Sequential(nn.ReLU()), None)


def test_the_default_is_a_layer_that_learns():
    net = Named()
    net.head.requires_grad_(False)
    assert list(find_layers(net, None)) == ["other"]
    net.other.weight.requires_grad_(False)
    assert list(find_layers(net, None)) == ["other"]  # by its bias
    attention = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    assert list(find_layers(attention, None)) == ["0"]
    with pytest.raises(ArgumentError, match="no trained linear or convolution layer"):
        find_layers(nn.Sequential(nn.Linear(2, 2)).requires_grad_(False), None)


def test_tied_layers_that_differ_are_refused():
    net = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3, padding=1), nn.Linear(2, 2), nn.Linear(2, 2))
    for module, owner in ((net[1], net[0]), (net[3], net[2])):
        module.weight = owner.weight
    net[1].bias = net[0].bias
    for layer in "01":
        with pytest.raises(ArgumentError, match=rf"`layers`.*'{layer}'.*stride, padding"):
            find_layers(net, layer)
    for layer in "23":
        with pytest.raises(ArgumentError, match=rf"`layers`.*'{layer}'.*a bias of its own"):
            find_layers(net, layer)


def test_all_owners_of_a_weight():
    net = Named()
    assert find_layers(net, "twin") == {"twin": [net.twin, net.other]}


def test_layers_that_cannot_be_traced():
    with pytest.raises(ArgumentError, match=r"`layers`.*'norm'.*BatchNorm1d.*Linear, Conv1d"):
        find_layers(Named(), "norm")
    with pytest.raises(ArgumentError, match=r"`track_samples`.*'norm'"):
        find_layers(Named(), "norm", "track_samples")
    tied = Named()
    tied.head.weight = tied.embedding.weight
    with pytest.raises(
        ArgumentError,
        match=r"'head'.* shares its weight with a module of type Embedding",
    ):
        find_layers(tied, "head")
