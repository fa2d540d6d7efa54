"""Hooks on layers: what they deliver in training and record in evaluation, and that they change nothing."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_neuro.refinement.gradient_hooks import MAX_EVALUATED_CALLS, GradientHooks


class Diary:
    """Writes down what it is told."""

    def __init__(self):
        self.seen, self.dropped = [], []

    def see(self, layer, module, inputs, gradients):
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        self.seen.append((layer, module, inputs, gradients))

    def drop(self, layer):
        self.dropped.append(layer)
        self.seen = [page for page in self.seen if page[0] != layer]


def hooked(net, names=("0",)):
    diary = Diary()
    hooks = GradientHooks({name: [net.get_submodule(name)] for name in names})
    hooks.deliver_to(diary)
    hooks.tracing = True
    return hooks, diary


def test_delivers_inputs_and_the_gradient_at_the_output_even_before_an_in_place_activation():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 1, bias=False))
    hooks, diary = hooked(net, ["0", "2"])
    inputs = torch.randn(5, 2)
    net(inputs).sum().backward()
    by_layer = {layer: (x, g) for layer, _, x, g in diary.seen}
    assert torch.equal(by_layer["0"][0], inputs)
    hidden = net[0](inputs)
    torch.testing.assert_close(by_layer["0"][1], (hidden > 0) * net[2].weight)
    torch.testing.assert_close(by_layer["2"][0], hidden.relu())
    assert torch.equal(by_layer["2"][1], torch.ones(5, 1))
    assert not any(x.requires_grad or g.requires_grad for x, g in by_layer.values())
    torch.testing.assert_close(net[0].weight.grad, by_layer["0"][1].T @ inputs)
    hooks.remove()


def test_first_gradient_after_zeroing_drops_and_accumulation_does_not():
    net = nn.Sequential(nn.Linear(2, 1))
    hooks, diary = hooked(net)
    for _ in range(2):
        net(torch.ones(3, 2)).sum().backward()
    assert len(diary.seen) == 2
    assert diary.dropped == ["0"]
    net.zero_grad()
    net(torch.ones(3, 2)).sum().backward()
    assert len(diary.seen) == 1
    assert diary.dropped == ["0", "0"]
    hooks.remove()


def test_gradient_zeroed_in_place_is_dropped():
    net = nn.Sequential(nn.Linear(2, 1))
    hooks, diary = hooked(net)
    net(torch.ones(3, 2)).sum().backward()
    net.zero_grad(set_to_none=False)
    net(torch.ones(3, 2)).sum().backward()
    assert diary.dropped == ["0", "0"]
    net[0].weight.grad.zero_()  # the bias still has one
    net(torch.ones(3, 2)).sum().backward()
    assert diary.dropped == ["0", "0"]
    hooks.remove()


def test_module_called_twice_is_one_pass():
    net = nn.Sequential(nn.Linear(2, 2))
    hooks, diary = hooked(net)
    net(net(torch.ones(3, 2))).sum().backward()
    assert len(diary.seen) == 2
    assert diary.dropped == ["0"]  # once, before both
    hooks.remove()


@pytest.mark.parametrize("how", ["off", "frozen", "no grad", "removed"])
def test_silence(how):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    hooks, diary = hooked(net)
    hooks.tracing = how != "off"
    net[0].requires_grad_(how != "frozen")
    if how == "removed":
        hooks.remove()
        hooks.tracing = True
    with torch.set_grad_enabled(how != "no grad"):
        loss = net(torch.ones(3, 2, requires_grad=True)).sum()
    if how != "no grad":
        loss.backward()
    assert diary.seen == []
    hooks.remove()
    assert not net[0]._forward_hooks


def test_bias_alone_is_enough():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight.requires_grad_(False)
    hooks, diary = hooked(net)
    net(torch.ones(3, 2)).sum().backward()
    assert len(diary.seen) == 1
    hooks.remove()


def test_recording_keeps_the_latest_pass_and_copies():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    hooks, diary = hooked(net)
    number = [0]
    hooks.record(lambda: number[0])
    assert hooks.recording
    first, second = torch.randn(3, 2), torch.randn(4, 2)
    net(first)
    number[0] = 1
    net(second)
    net(second)
    (inputs, outputs), _ = hooks.recorded["0"]
    assert len(hooks.recorded["0"]) == 2
    assert torch.equal(inputs, second)
    assert torch.equal(outputs, net[0](second))  # not what ReLU made of it
    assert not diary.seen
    for _ in range(MAX_EVALUATED_CALLS):
        net(first)
    assert len(hooks.recorded["0"]) == MAX_EVALUATED_CALLS
    number[0] = None
    assert not hooks.recording
    net(first).sum().backward()
    assert len(diary.seen) == 1  # back to training
    hooks.remove()
    assert hooks.recorded == {}


def test_model_can_be_copied_and_pickled_and_the_copy_is_not_watched():
    net = nn.Sequential(nn.Linear(2, 1))
    hooks, diary = hooked(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other(torch.ones(3, 2)).sum().backward()
        assert torch.equal(other[0].weight, net[0].weight)
    assert diary.seen == []
    hooks.remove()


def test_input_by_keyword():
    layer = nn.Linear(2, 1)
    net = nn.Sequential(layer)
    hooks, diary = hooked(net)
    layer(input=torch.ones(3, 2)).sum().backward()
    assert torch.equal(diary.seen[0][2], torch.ones(3, 2))
    hooks.remove()
