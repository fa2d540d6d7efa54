"""Only backward passes that add to `.grad` count: what is delivered sums to the gradient of the weight."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.refinement.gradient_hooks import GradientHooks
from tests.models import Module, fit
from tests.refinement.following import by_id


class Sum:
    """Sums the weight gradients of the calls that are delivered."""

    def __init__(self):
        self.calls, self.total = 0, 0.0

    def see(self, layer, module, inputs, gradients):
        self.calls += 1
        self.total = self.total + gradients.flatten(0, -2).T @ inputs.flatten(0, -2)

    def drop(self, layer):
        self.calls, self.total = 0, 0.0


def traced(net, name="layer"):
    receiver = Sum()
    hooks = GradientHooks({name: [net.get_submodule(name)]})
    hooks.deliver_to(receiver)
    hooks.tracing = True
    return hooks, receiver


class Net(nn.Module):
    """A layer that is called twice, with a smooth activation, so that its second derivative is not 0."""

    def __init__(self, between=lambda layer, x: layer(x)):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.between = between

    def forward(self, x):
        return self.layer(self.between(self.layer, x).tanh()).square().sum()


def inputs():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)


def plain(net):
    net(inputs()).backward()


def grad_before(net):
    x = inputs()
    torch.autograd.grad(net(x), x)
    plain(net)


def grad_of_the_same_graph(net):
    x = inputs()
    loss = net(x)
    torch.autograd.grad(loss, x, retain_graph=True)
    torch.autograd.grad(loss, net.layer.weight, retain_graph=True)
    loss.backward()


def penalty_of_weight_zero(net):
    x = inputs()
    loss = net(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + 0.0 * gradient.square().sum()).backward()


def two_passes_over_one_graph(net):
    loss = net(inputs())
    loss.backward(retain_graph=True)
    loss.backward()


def accumulated_with_grad_between(net):
    plain(net)
    grad_before(net)


def reset_with_grad_between(net):
    plain(net)
    net.zero_grad()
    grad_before(net)


def reset_in_place_with_grad_between(net):
    plain(net)
    net.zero_grad(set_to_none=False)
    grad_before(net)


def kept_for_a_higher_derivative(net):
    net(inputs()).backward(create_graph=True)


def only_to_the_input(net):
    x = inputs()
    net(x).backward(inputs=[x])
    plain(net)


def reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=True)


def recomputed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def direct(layer, x):
    return layer(x)


PLAIN = (plain, two_passes_over_one_graph)
PASSES = (
    *PLAIN,
    grad_before,
    grad_of_the_same_graph,
    penalty_of_weight_zero,
    accumulated_with_grad_between,
    reset_with_grad_between,
    reset_in_place_with_grad_between,
    kept_for_a_higher_derivative,
    only_to_the_input,
)
# Reentrant checkpointing does not allow `torch.autograd.grad` nor `inputs=`.
CASES = [(how, passes) for how in (direct, recomputed) for passes in PASSES] + [(reentrant, passes) for passes in PLAIN]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(("between", "passes"), CASES)
def test_what_is_delivered_sums_to_the_gradient(between, passes):
    net = Net(between)
    hooks, receiver = traced(net)
    passes(net)
    torch.testing.assert_close(receiver.total, net.layer.weight.grad.detach())
    assert not hooks._passes._held
    hooks.remove()
    assert not net.layer.weight._post_accumulate_grad_hooks


def test_grad_alone_delivers_nothing_and_holds_nothing():
    net = Net()
    hooks, receiver = traced(net)
    x = inputs()
    for _ in range(3):
        torch.autograd.grad(net(x), [x, net.layer.weight], create_graph=True)
    assert receiver.calls == 0
    assert not hooks._passes._held
    hooks.remove()


def test_trained_bias_of_a_frozen_weight_counts():
    net = Net()
    net.layer.weight.requires_grad_(False)
    hooks, receiver = traced(net)
    grad_before(net)
    assert receiver.calls == 2
    net.layer.requires_grad_(True)  # unfrozen while it is traced, and the bias frozen
    net.layer.bias.requires_grad_(False)
    net.zero_grad()
    grad_before(net)
    torch.testing.assert_close(receiver.total, net.layer.weight.grad)
    hooks.remove()


def test_backward_pass_that_fails_leaves_nothing_behind():
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of memory")

    net = Net(lambda layer, x: Fail.apply(layer(x)))
    hooks, _ = traced(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        plain(net)
    assert hooks._passes._held
    hooks.stop_tracing()
    assert not hooks._passes._held
    hooks.remove()


# In fits


class Penalised(Module):
    """A gradient penalty of weight 0 in `training_step`: the gradients are those of the plain loss, bit for bit."""

    def __init__(self, penalty):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)))
        self.penalty = penalty

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        if self.penalty == "none":
            return loss
        x = batch[0].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self(x).logsumexp(1).sum(), x, create_graph=self.penalty == "zero")
        return loss + 0.0 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class Energy(Module):
    """A network whose output holds a derivative of its own."""

    def __init__(self, scale):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)))
        self.scale = scale

    def forward(self, x):
        if self.scale is None:
            return super().forward(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.net(x)
            (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy + self.scale * gradient.flatten(1)[:, :4]


def refinement_of(module):
    torch.manual_seed(0)
    callback = RepresentationRefinement(Probe(num_samples=32), layers=["net.1", "net.3"], on_error="raise")
    fit(module, callback)
    return callback


@pytest.mark.parametrize(
    ("make", "without", "with_grad"),
    [(Penalised, "none", "zero"), (Penalised, "none", "detached"), (Energy, None, 0.0)],
)
def test_values_are_those_of_the_run_without_the_penalty(make, without, with_grad):
    torch.manual_seed(5)
    plain_module = make(without)
    torch.manual_seed(5)
    module = make(with_grad)
    expected, found = refinement_of(plain_module), refinement_of(module)
    torch.testing.assert_close(module.state_dict(), plain_module.state_dict(), rtol=0, atol=1e-6)
    assert found.scalars == pytest.approx(expected.scalars, rel=1e-4, abs=1e-5)
    for name, values in by_id(expected.samples).items():
        assert by_id(found.samples)[name] == pytest.approx(values, rel=1e-4)
