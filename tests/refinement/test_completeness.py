"""Completeness: after 200 steps under any condition, the parts add up to the real output of the layer."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from tests.refinement.following import CLASSES, NETWORKS, Follower

STEPS = 200
BOUND = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass
class Run:
    """One training, for the conditions below to steer: each is called once a step."""

    follower: Follower
    optimizers: list[Any]
    step: int = 0
    kept: Any = None

    @property
    def net(self):
        return self.follower.net

    @property
    def heads(self):
        return [m for m in self.net if hasattr(m, "weight") and not isinstance(m, nn.BatchNorm2d)]

    def backward(self):
        self.follower.loss().backward()

    def end(self, *, zero=True):
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers * zero:
            optimizer.zero_grad()


def plain(run):
    run.backward()
    run.end()


def onecycle(run):
    run.kept = run.kept or OneCycleLR(run.optimizers[0], max_lr=0.1, total_steps=STEPS + 1)
    plain(run)
    run.kept.step()


def cosine(run):
    run.kept = run.kept or CosineAnnealingLR(run.optimizers[0], STEPS)
    plain(run)
    run.kept.step()


def clip_norm(run):
    run.backward()
    torch.nn.utils.clip_grad_norm_(run.net.parameters(), 0.3)
    run.end()


def clip_value(run):
    run.follower.steps.elementwise = True
    run.backward()
    torch.nn.utils.clip_grad_value_(run.net.parameters(), 0.02)
    run.end()


def accumulate(run):
    for _ in range(3):
        (run.follower.loss() / 3).backward()
    run.end()


def bf16(run):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run.follower.loss()
    loss.backward()
    run.end()


def scaler(run):
    run.kept = run.kept or torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=50)
    loss = run.follower.loss()
    run.kept.scale(loss * float("inf") if run.step in (3, 100) else loss).backward()
    run.kept.unscale_(run.optimizers[0])
    torch.nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
    run.kept.step(run.optimizers[0])
    run.kept.update()
    run.optimizers[0].zero_grad()


def zeroed_without_a_step(run):
    (7 * run.follower.loss()).backward()
    run.optimizers[0].zero_grad()
    plain(run)


def zeroed_in_place(run):
    (7 * run.follower.loss()).backward()
    run.optimizers[0].zero_grad(set_to_none=False)
    run.backward()
    run.end(zero=False)
    run.optimizers[0].zero_grad(set_to_none=False)


def fused_scaler(run):
    """A fused optimizer is called for skipped steps, too, and divides by the scale itself."""
    run.kept = run.kept or torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=50)
    loss = run.follower.loss()
    run.kept.scale(loss * float("inf") if run.step in (3, 100) else loss).backward()
    run.kept.step(run.optimizers[0])
    run.kept.update()
    run.optimizers[0].zero_grad()


def frozen_then_not(run):
    for parameter in run.heads[0].parameters():
        parameter.requires_grad_(not 50 <= run.step < 120)
    plain(run)


def sometimes_no_gradient(run):
    run.backward()
    if run.step % 3 == 1:
        for parameter in run.heads[-1].parameters():
            parameter.grad = None
    run.end()


def new_optimizer(run):
    if run.step == STEPS // 2:
        run.optimizers = [SGD(run.net.parameters(), lr=0.01, momentum=0.9)]
        run.follower.attach(run.optimizers)
    plain(run)


def sgd(**options):
    return lambda net: [SGD(net.parameters(), **({"lr": 0.03} | options))]


def adam(cls=Adam, **options):
    return lambda net: [cls(net.parameters(), **({"lr": 0.005} | options))]


def groups(net):
    first, *rest = [list(m.parameters()) for m in net if list(m.parameters())]
    options = {"lr": 0.001, "weight_decay": 0.1, "betas": (0.7, 0.9)}
    return [AdamW([{"params": first} | options, {"params": [p for part in rest for p in part]}], lr=0.01)]


def two(net):
    *rest, last = [list(m.parameters()) for m in net if list(m.parameters())]
    return [Adam([p for part in rest for p in part], lr=0.01), SGD(last, lr=0.05, momentum=0.9, weight_decay=0.01)]


MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}
CONDITIONS = {
    "sgd": (sgd(), plain),
    "sgd decay": (sgd(weight_decay=0.1), plain),
    "sgd momentum": (sgd(**MOMENTUM), plain),
    "sgd dampening": (sgd(dampening=0.3, **MOMENTUM), plain),
    "sgd nesterov": (sgd(nesterov=True, **MOMENTUM), plain),
    "adam": (adam(), plain),
    "adam coupled decay": (adam(weight_decay=0.1), plain),
    "adamw": (adam(AdamW, weight_decay=0.1), plain),
    "amsgrad": (adam(AdamW, amsgrad=True), plain),
    "groups": (groups, plain),
    "two optimizers": (two, plain),
    "one cycle": (sgd(momentum=0.9, nesterov=True), onecycle),
    "one cycle of Adam": (adam(AdamW), onecycle),
    "cosine": (adam(AdamW), cosine),
    "clip by norm": (adam(AdamW), clip_norm),
    "clip by value": (sgd(**MOMENTUM), clip_value),
    "accumulation": (adam(), accumulate),
    "bf16": (adam(AdamW), bf16),
    "scaler": (adam(), scaler),
    "fused and scaler": (adam(AdamW, fused=True), fused_scaler),
    "zeroed": (sgd(**MOMENTUM), zeroed_without_a_step),
    "zeroed in place": (sgd(**MOMENTUM), zeroed_in_place),
    "frozen": (adam(weight_decay=0.01), frozen_then_not),
    "no gradient": (sgd(**MOMENTUM), sometimes_no_gradient),
    "new optimizer": (adam(), new_optimizer),
}


def start(network, dtype, optimizers, warm_up=0):
    torch.manual_seed(0)
    make, width = NETWORKS[network]
    net = make().to(dtype)
    found = optimizers(net)
    for _ in range(warm_up):
        for optimizer in found:
            net(torch.randn(8, width, dtype=dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    follower = Follower(net, width)
    follower.attach(found)
    return Run(follower, found)


def train(run, condition, steps=STEPS):
    for run.step in range(steps):
        condition(run)
    return run.follower


KINDS = [("mlp", torch.float64), ("convnet", torch.float32)]
SLOW = [("mlp", torch.float32), ("convnet", torch.float64)]


@pytest.mark.parametrize(
    ("network", "dtype"), [*KINDS, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SLOW)]
)
@pytest.mark.parametrize("name", CONDITIONS)
def test_parts_add_up(name, network, dtype):
    optimizers, condition = CONDITIONS[name]
    run = start(network, dtype, optimizers)
    before = [m.weight.detach().clone() for m in run.heads]
    follower = train(run, condition)
    assert follower.residual() <= BOUND[dtype]
    # Not for want of training, nor of sources that take part.
    for layer, ledger in follower.ledgers.items():
        assert ledger.weights()["weight"][:-2].flatten(1).norm(dim=1).min() > 0.01, layer
        assert ledger.untraced_share < (0.02 if name == "bf16" else 1e-5 if dtype == torch.float32 else 1e-12)
        assert not ledger.inexact
    assert all((m.weight - b).abs().max() > 0.01 for m, b in zip(run.heads, before, strict=True))


def test_momentum_of_the_time_before_belongs_to_the_initial_weights():
    for optimizers in (sgd(**MOMENTUM), sgd(nesterov=True, momentum=0.9), adam(), adam(AdamW, weight_decay=0.1)):
        run = start("mlp", torch.float64, optimizers, warm_up=5)
        ledger = run.follower.ledgers["0"]
        before = ledger.weights()["weight"].clone()
        # A step without gradients: only what the optimizers remember moves the weights.
        for parameter in run.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.end()
        after = ledger.weights()["weight"]
        assert torch.equal(after[:-1], before[:-1])
        assert (after[-1] - before[-1]).abs().max() > 1e-3
        assert train(run, plain, 30).residual() <= 1e-12


class Twice(nn.Sequential):
    """Calls its middle twice, and another module shares its parameters."""

    def __init__(self):
        super().__init__(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES))
        self[2].weight, self[2].bias = self[1].weight, self[1].bias

    def forward(self, x):
        x = self[0](x).tanh()
        x = self[1](self[1](x).tanh()).tanh()
        return self[3](self[2](x).tanh())


@pytest.mark.parametrize("optimizers", [sgd(**MOMENTUM), adam(AdamW)])
def test_module_called_twice_and_tied_weights(optimizers):
    torch.manual_seed(0)
    net = Twice().double()
    run = Run(Follower(net, 6, layers=["1"]), optimizers(net))
    run.follower.attach(run.optimizers)
    follower = train(run, plain)
    ledger = follower.ledgers["1"]
    for name, parts in ledger.weights().items():
        assert (parts.sum(0) - getattr(net[1], name)).abs().max() <= 1e-10
    assert ledger.untraced_share < 1e-10


def test_layer_that_some_batches_leave_out():
    class Sometimes(nn.Sequential):
        on = True

        def forward(self, x):
            x = self[0](x).relu()
            return self[1](x) if self.on else x[:, :CLASSES]

    def sometimes(run):
        run.net.on = run.step % 3 > 0
        plain(run)

    torch.manual_seed(0)
    net = Sometimes(nn.Linear(6, 8), nn.Linear(8, CLASSES)).double()
    run = Run(Follower(net, 6), adam(weight_decay=0.01)(net))
    run.follower.attach(run.optimizers)
    follower = train(run, sometimes)
    net.on = True
    assert follower.residual() <= 1e-10


# The proof must be able to fail.


def noise(run):
    plain(run)
    if run.step == 20:
        with torch.no_grad():
            run.heads[-1].weight.add_(0.1 * torch.randn(run.heads[-1].weight.shape))


def averaged(run):
    plain(run)
    with torch.no_grad():
        average = [p.detach().clone() for p in run.net.parameters()] if run.kept is None else run.kept
        run.kept = [0.9 * a + 0.1 * p for a, p in zip(average, run.net.parameters(), strict=True)]
        if run.step == 39:
            for parameter, average in zip(run.net.parameters(), run.kept, strict=True):
                parameter.copy_(average)


@pytest.mark.parametrize("condition", [noise, averaged])
def test_weights_changed_behind_the_optimizer_show(condition):
    run = start("mlp", torch.float64, adam())
    assert train(run, condition, 40).residual() > 1e-3


def test_learning_rate_that_is_not_the_one_of_the_step_shows():
    def misread(run):
        run.backward()
        group = run.optimizers[0].param_groups[0]
        # Steps are made with 1 % more than what is read after them.
        before = run.optimizers[0].register_step_pre_hook(lambda *_: group.update(lr=0.0303))
        run.end()
        before.remove()

    run = start("mlp", torch.float64, lambda net: [])
    run.optimizers = sgd()(run.net)
    group = run.optimizers[0].param_groups[0]
    run.optimizers[0].register_step_post_hook(lambda *_: group.update(lr=0.03))
    run.follower.attach(run.optimizers)
    assert train(run, misread, 100).residual() > 1e-3


def test_a_backward_pass_that_is_not_seen_shows_as_untraced():
    def half_blind(run):
        run.backward()
        run.follower.steps.hooks.tracing = False
        x, y = run.follower.batch()
        torch.nn.functional.cross_entropy(run.net(x), y).backward()
        run.end()

    run = start("mlp", torch.float64, adam())
    follower = train(run, half_blind, 30)
    assert all(0.2 < ledger.untraced_share < 1 for ledger in follower.ledgers.values())
    # Spread over the sources in the batch, so the sum still holds.
    assert follower.residual() <= 1e-10


def test_gradients_of_which_no_sample_is_known_are_credited_to_other():
    run = start("mlp", torch.float64, sgd())
    ledger = run.follower.ledgers["0"]
    for parameter in run.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.end()
    assert torch.allclose(ledger.weights()["weight"][-2], torch.tensor(-0.03).double())
    assert not ledger.weights()["weight"][:-2].any()
    assert ledger.untraced_share == 1


def test_rounding_of_gradients_that_cancel_is_not_blown_up():
    """A bias before BatchNorm has no gradient, and Adam makes full steps from its rounding errors."""
    run = start("convnet", torch.float32, adam())
    parts = train(run, plain, 50).ledgers["1"].weights()["bias"]
    assert parts[:-1].abs().max() < 50 * 0.005 * 10  # ten times what the steps could add up to
