"""Activations through hooks."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neuro.capture import MAX_CALLS_AS_LAYERS, Capture, uncompiled
from tests.helpers import hooks_of
from tests.models import mlp


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    """One activation module at two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.third = nn.Linear(4, 3), nn.Linear(3, 6), nn.Linear(6, 2)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.act(self.second(self.act(self.first(x)))))


def test_each_call_of_a_shared_module_is_a_layer_of_its_own(x: Tensor) -> None:
    net = Shared()
    with Capture({"act": net.act, "first": net.first}).recording() as recording:
        net(x)
    a = net.first(x)
    b = net.act(a)
    expected = {"first": a, "act.call1": b, "act.call2": net.act(net.second(b))}
    assert recording.calls == {"first": 1, "act": 2}
    assert list(recording.activations) == list(expected)  # in the order of the forward pass
    for name, value in expected.items():
        assert torch.equal(recording.activations[name], value)
        assert not recording.activations[name].requires_grad


@pytest.mark.parametrize("view", [False, True])
def test_an_in_place_relu_after_the_layer_does_not_change_what_was_recorded(x: Tensor, view: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    transform = (lambda name, tensor: tensor.flatten(1)) if view else None
    with Capture({"0": net[0], "1": net[1]}, transform=transform).recording() as recording:
        net(x).pow(2).sum().backward()
    before = net[0](x)
    assert (before < 0).any() and torch.equal(recording.activations["0"], before)
    assert torch.equal(recording.activations["1"], before.relu())


class Structured(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x * 2)


@pytest.mark.parametrize("wrap", [lambda x: (x, x + 1), lambda x: {"a": None, "b": x}, lambda x: [(x,)]])
def test_the_first_tensor_of_a_structured_output(x: Tensor, wrap: Any) -> None:
    layer = Structured(wrap)
    with Capture({"layer": layer}).recording() as recording:
        layer(x)
    assert torch.equal(recording.activations["layer"], 2 * x)


def test_outputs_that_cannot_be_used_are_listed(x: Tensor) -> None:
    def refuse(name: str, tensor: Tensor) -> Tensor:
        if name == "refused":
            raise ValueError("too wide")
        return tensor

    text, refused = Structured(lambda x: "text"), nn.Identity()
    with Capture({"text": text, "refused": refused, "kept": nn.Identity()}, transform=refuse).recording() as recording:
        text(x), refused(x)
    assert recording.activations == {}
    assert recording.failures == {"text": "the output holds no tensor: it is 'text'", "refused": "too wide"}


def test_other_errors_of_a_transform_are_not_hidden(x: Tensor) -> None:
    def fail(name: str, tensor: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    layer = nn.Identity()
    with pytest.raises(RuntimeError, match="out of memory"), Capture({"layer": layer}, transform=fail).recording():
        layer(x)
    assert hooks_of(layer) == []


def test_calls_after_the_eighth_are_left_out_and_said(x: Tensor) -> None:
    layer = nn.Identity()
    with Capture({"layer": layer}).recording() as recording:
        for i in range(MAX_CALLS_AS_LAYERS + 2):
            layer(x + i)
    assert recording.calls["layer"] == MAX_CALLS_AS_LAYERS + 2
    assert list(recording.activations) == [f"layer.call{i + 1}" for i in range(MAX_CALLS_AS_LAYERS)]
    assert all(torch.equal(value, x + i) for i, value in enumerate(recording.activations.values()))
    assert "more than 8 times" in recording.failures["layer"]


def test_layers_that_never_ran_are_named(x: Tensor) -> None:
    net = Shared()
    capture = Capture({"first": net.first, "act": net.act, "elsewhere": nn.Linear(1, 1)})
    with capture.recording() as recording:
        net.act(x)
    assert capture.not_called(recording) == ["first", "elsewhere"]


def test_the_transform_knows_the_layer_and_sees_a_detached_tensor(x: Tensor) -> None:
    net, names = Shared(), []

    def mean(name: str, tensor: Tensor) -> Tensor:
        names.append(name)
        assert not tensor.requires_grad
        return tensor.mean(1)

    with Capture({"first": net.first, "act": net.act}, transform=mean).recording() as recording:
        net(x)
    assert names == ["first", "act", "act"]
    assert torch.equal(recording.activations["first"], net.first(x).mean(1))


def test_an_exception_takes_the_hooks_off(x: Tensor) -> None:
    net = Shared()
    capture = Capture({"act": net.act})
    with pytest.raises(KeyError), capture.recording():
        net(x)
        assert hooks_of(net) == ["act: _forward_hooks"]
        raise KeyError
    assert hooks_of(net) == []


def test_nothing_is_kept_alive_after_the_block(x: Tensor) -> None:
    net = Shared()
    whole: list[weakref.ref[Tensor]] = []
    net.first.register_forward_hook(lambda module, inputs, output: whole.append(weakref.ref(output)))
    capture = Capture({"first": net.first}, transform=lambda name, tensor: tensor[:, :1])
    with capture.recording() as recording:
        net(x).sum().backward()
    gc.collect()
    assert whole[0]() is None
    # What is kept is the transformed part alone, not a view of the whole output.
    assert recording.activations["first"].untyped_storage().nbytes() == 5 * 4
    kept = weakref.ref(recording.activations["first"])
    del recording
    gc.collect()
    assert kept() is None


def test_copies_and_pickles_of_a_hooked_model_record_nothing(x: Tensor) -> None:
    net = mlp().net
    capture = Capture({"1": net[1]})
    with capture.recording() as recording:
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(torch.ones(2, 1, 8, 8)), net.eval()(torch.ones(2, 1, 8, 8)))
            assert [hook.call for hook in twin[1]._forward_hooks.values()] == [None]
    assert recording.calls == {"1": 2}
    assert hooks_of(net) == []


@pytest.fixture
def compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_model_is_seen_eagerly(x: Tensor) -> None:
    net = Shared()
    compiled = torch.compile(net, backend="eager")
    expected = compiled(x)
    capture = Capture({"act": net.act})
    with uncompiled(), capture.recording() as recording:
        assert torch.equal(compiled(x), expected)
    assert recording.calls == {"act": 2}
    assert torch.equal(recording.activations["act.call1"], net.act(net.first(x)))
    assert torch.equal(compiled(x), expected)
