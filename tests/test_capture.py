"""Activations and output gradients through hooks."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neuro.capture import MAX_CALLS, Capture, uncompiled
from tests.contract.callbacks import hooks_of
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
    with Capture({"act": net.act, "first": net.first}, gradients=True).recording() as seen:
        net(x).pow(2).sum().backward()

    a = net.first(x)
    b = net.act(a)
    c = net.act(net.second(b))
    expected = torch.autograd.grad(net.third(c).pow(2).sum(), [a, b, c])
    assert seen.calls == {"first": 1, "act": 2}
    # In the order of the forward pass, gradients too, although they arrive from the end.
    assert list(seen.activations) == list(seen.gradients) == ["first", "act.call1", "act.call2"]
    for name, value, gradient in zip(seen.activations, (a, b, c), expected, strict=True):
        assert torch.equal(seen.activations[name], value)
        torch.testing.assert_close(seen.gradients[name], gradient)
        assert not seen.activations[name].requires_grad


def test_gradients_of_a_call_that_the_loss_does_not_need_are_left_out(x: Tensor) -> None:
    net = Shared()
    with Capture({"act": net.act}, gradients=True).recording() as seen:
        unused = net.act(x)
        net.act(net.first(x)).sum().backward()
    assert unused.shape == x.shape
    assert list(seen.activations) == ["act.call1", "act.call2"]
    assert list(seen.gradients) == ["act.call2"]


@pytest.mark.parametrize("view", [False, True])
def test_an_in_place_relu_after_the_layer_changes_neither_values_nor_gradients(x: Tensor, view: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    transform = (lambda name, tensor: tensor.flatten(1)) if view else None
    with Capture({"0": net[0], "1": net[1]}, transform=transform, gradients=True).recording() as seen:
        net(x).pow(2).sum().backward()

    before = net[0](x)
    after = before.relu()
    gradients = torch.autograd.grad(net[2](after).pow(2).sum(), [before, after])
    assert (before < 0).any() and torch.equal(seen.activations["0"], before)
    assert torch.equal(seen.activations["1"], after)
    torch.testing.assert_close(seen.gradients["0"], gradients[0])
    torch.testing.assert_close(seen.gradients["1"], gradients[1])
    assert not torch.equal(gradients[0], gradients[1])


def test_gradients_are_not_accumulated_or_changed_later(x: Tensor) -> None:
    net = Shared()
    capture = Capture({"act": net.act}, gradients=True)
    found = []
    for _ in range(2):
        with capture.recording() as seen:
            net(x).sum().backward()
        found.append(seen.gradients["act.call2"])
    assert torch.equal(*found) and found[0].data_ptr() != found[1].data_ptr()


def test_without_gradients_none_are_recorded(x: Tensor) -> None:
    net = Shared()
    with Capture({"act": net.act}).recording() as seen:
        net(x).sum().backward()
    assert seen.gradients == {}
    with torch.no_grad(), Capture({"act": net.act}, gradients=True).recording() as seen:
        net(x)
    assert len(seen.activations) == 2 and seen.gradients == {}


class Structured(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x * 2)


@pytest.mark.parametrize("wrap", [lambda x: (x, x + 1), lambda x: {"a": None, "b": x}, lambda x: [(x,)]])
def test_the_first_tensor_of_a_structured_output(x: Tensor, wrap: Any) -> None:
    layer = Structured(wrap)
    with Capture({"layer": layer}).recording() as seen:
        layer(x)
    assert torch.equal(seen.activations["layer"], 2 * x)


def test_an_lstm_gives_its_output_and_its_gradient() -> None:
    torch.manual_seed(0)
    lstm, sequence = nn.LSTM(2, 3, batch_first=True), torch.randn(4, 5, 2)
    with Capture({"lstm": lstm}, gradients=True).recording() as seen:
        output, _ = lstm(sequence)
        output.pow(2).sum().backward()
    assert torch.equal(seen.activations["lstm"], output)
    torch.testing.assert_close(seen.gradients["lstm"], 2 * output)


def test_outputs_that_cannot_be_used_are_listed(x: Tensor) -> None:
    def refuse(name: str, tensor: Tensor) -> Tensor:
        if name == "refused":
            raise ValueError("too wide")
        return tensor

    text, refused = Structured(lambda x: "text"), nn.Identity()
    with Capture({"text": text, "refused": refused, "kept": nn.Identity()}, transform=refuse).recording() as seen:
        text(x), refused(x)
    assert seen.activations == {}
    assert seen.failures == {"text": "The output has no tensor in it: it is a str.", "refused": "too wide"}


def test_other_errors_of_a_transform_are_not_hidden(x: Tensor) -> None:
    def fail(name: str, tensor: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    layer = nn.Identity()
    with pytest.raises(RuntimeError, match="out of memory"), Capture({"layer": layer}, transform=fail).recording():
        layer(x)
    assert hooks_of(layer) == []


def test_calls_after_the_eighth_are_left_out_and_said(x: Tensor) -> None:
    layer = nn.Identity()
    with Capture({"layer": layer}).recording() as seen:
        for i in range(MAX_CALLS + 2):
            layer(x + i)
    assert seen.calls["layer"] == MAX_CALLS + 2
    assert list(seen.activations) == [f"layer.call{i + 1}" for i in range(MAX_CALLS)]
    assert all(torch.equal(value, x + i) for i, value in enumerate(seen.activations.values()))
    assert "more than 8 times" in seen.failures["layer"]


def test_layers_that_never_ran_are_named(x: Tensor) -> None:
    net = Shared()
    capture = Capture({"first": net.first, "act": net.act, "elsewhere": nn.Linear(1, 1)})
    with capture.recording() as seen:
        net.act(x)
    assert capture.silent(seen) == ["first", "elsewhere"]


def test_the_transform_knows_the_layer_and_sees_a_detached_tensor(x: Tensor) -> None:
    net, names = Shared(), []

    def mean(name: str, tensor: Tensor) -> Tensor:
        names.append(name)
        assert not tensor.requires_grad
        return tensor.mean(1)

    with Capture({"first": net.first, "act": net.act}, transform=mean).recording() as seen:
        net(x)
    assert names == ["first", "act", "act"]
    assert torch.equal(seen.activations["first"], net.first(x).mean(1))


def test_an_exception_takes_the_hooks_off(x: Tensor) -> None:
    net = Shared()
    capture = Capture({"act": net.act})
    with pytest.raises(KeyError), capture.recording():
        net(x)
        assert hooks_of(net) == ["act: _forward_hooks"]
        raise KeyError
    assert hooks_of(net) == [] and not capture.attached and capture.current is None


def test_attached_hooks_stay_after_a_recording_and_record_nothing_outside_it(x: Tensor) -> None:
    net = Shared()
    capture = Capture({"act": net.act})
    capture.attach()
    capture.attach()
    assert len(net.act._forward_hooks) == 1
    with capture.recording() as seen:
        net(x)
    net(x)
    assert capture.attached and seen.calls == {"act": 2}
    capture.remove()
    assert hooks_of(net) == []


def test_nothing_is_kept_alive_after_the_block(x: Tensor) -> None:
    net = Shared()
    whole: list[weakref.ref[Tensor]] = []
    net.first.register_forward_hook(lambda module, inputs, output: whole.append(weakref.ref(output)))
    capture = Capture({"first": net.first}, transform=lambda name, tensor: tensor[:, :1], gradients=True)
    capture.attach()
    with capture.recording() as seen:
        net(x).sum().backward()
    gc.collect()
    assert whole[0]() is None
    # What is kept is the transformed part alone, not a view of the whole output.
    assert seen.activations["first"].untyped_storage().nbytes() == 5 * 4
    kept = weakref.ref(seen.activations["first"])
    del seen
    gc.collect()
    assert kept() is None


def test_copies_and_pickles_of_a_hooked_model_record_nothing(x: Tensor) -> None:
    net = mlp().net
    capture = Capture({"1": net[1]})
    with capture.recording() as seen:
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(torch.ones(2, 1, 8, 8)), net.eval()(torch.ones(2, 1, 8, 8)))
            assert [hook.capture for hook in twin[1]._forward_hooks.values()] == [None]
    assert seen.calls == {"1": 2}
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
    with uncompiled(), capture.recording() as seen:
        assert torch.equal(compiled(x), expected)
    assert seen.calls == {"act": 2}
    assert torch.equal(seen.activations["act.call1"], net.act(net.first(x)))
    assert torch.equal(compiled(x), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_hooks_attached_before_compiling_fire_in_the_compiled_graph(x: Tensor) -> None:
    net = Shared()
    capture = Capture({"act": net.act, "first": net.first}, gradients=True)
    capture.attach()
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    for _ in range(2):
        with capture.recording() as seen:
            compiled(x).pow(2).sum().backward()
        a = net.first(x)
        b = net.act(a)
        c = net.act(net.second(b))
        expected = torch.autograd.grad(net.third(c).pow(2).sum(), [a, b, c])
        assert capture.silent(seen) == []
        assert seen.calls == {"first": 1, "act": 2}
        for name, value, gradient in zip(("first", "act.call1", "act.call2"), (a, b, c), expected, strict=True):
            torch.testing.assert_close(seen.activations[name], value)
            torch.testing.assert_close(seen.gradients[name], gradient)
    capture.remove()
